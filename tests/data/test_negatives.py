"""Hard negatives: the most similar captions of other images, none of them true, the same every time."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hones_lens.data.loading import load_examples
from hones_lens.data.negatives import CaptionIndex, hard_negatives, normalize_caption
from hones_lens.data.records import Record

SAMPLE = Path(__file__).parent / "sample_hones_unified.json"


def record(image: str, *captions: str) -> Record:
    return Record(image, image, (f"{image}.jpg",), references=captions)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def cosine(a: str, b: str, texts: list[str]) -> float:
    """TF-IDF similarity of two of the texts, by the formula, word by word."""
    df = Counter(word for text in texts for word in set(words(text)))
    vectors = [
        {w: n * (math.log((len(texts) + 1) / (df[w] + 1)) + 1) for w, n in Counter(words(text)).items()}
        for text in (a, b)
    ]
    dot = sum(vectors[0].get(word, 0) * weight for word, weight in vectors[1].items())
    return dot / math.prod(math.hypot(*v.values()) for v in vectors)


def test_similarities_by_the_formula():
    captions = [c["caption"] for r in json.loads(SAMPLE.read_text())["data"][:12] for c in r["captions"]]
    index = CaptionIndex(captions)
    for text in captions[:3]:
        expected = [cosine(text, other, index.texts) for other in index.texts]
        np.testing.assert_allclose(index.similarities(text), expected, atol=1e-8)


def test_captions_of_the_sample_are_negatives_as_they_should_be():
    records = {str(r["image_id"]): r for r in json.loads(SAMPLE.read_text())["data"]}
    examples = load_examples(SAMPLE, "retrieval", "all")
    positions = Counter()
    for example in examples:
        own = {normalize_caption(c["caption"]) for c in records[example.facts["image_id"]]["captions"]}
        negatives = [normalize_caption(candidate) for candidate in example.candidates]
        assert len(set(negatives)) == 50
        assert negatives[example.positive] == normalize_caption(example.references[0])
        assert [key for key in negatives if key in own] == [negatives[example.positive]]
        positions[example.positive] += 1
    assert len(positions) > 30  # of 50: the positive is anywhere


def test_the_most_similar_ones_come_before_all_others():
    examples = load_examples(SAMPLE, "retrieval", "all", limit=5)
    texts = [c["caption"] for r in json.loads(SAMPLE.read_text())["data"] for c in r["captions"]]
    index = CaptionIndex(texts)
    for example in examples:
        similar = index.similarities(example.references[0])
        chosen = [index.index_of[normalize_caption(c)] for c in example.candidates]
        own = [index.index_of[normalize_caption(c)] for c in example.references]
        others = np.delete(similar, [*chosen, *own])
        assert np.delete(similar[chosen], example.positive).min() >= others.max()


def test_a_true_caption_is_no_negative_in_whatever_letters_or_record(tmp_path):
    pool = [
        record("1", "a red dog", "the dog"),
        record("2", "A red dog!", "a blue dog"),
        Record("1b", "1", ("1.jpg",), references=("a dog, red",)),
        record("3", "a cat"),
    ]
    assert hard_negatives(pool[:1], pool, 0, tmp_path, count=2) == [("a blue dog", "a cat")]
    with pytest.raises(ValueError, match=r"record 1: retrieval needs 3 captions of other images, .* has 2"):
        hard_negatives(pool[:1], pool, 0, tmp_path, count=3)


def test_ties_are_ordered_by_the_seed_alone(tmp_path):
    pool = [record("0", "a dog"), *(record(str(i), f"dog{i}") for i in range(1, 20))]
    negatives = [
        hard_negatives(pool[:1], pool, seed, tmp_path / str(n), count=5) for n, seed in enumerate((1, 1, 2))
    ]
    assert negatives[0] == negatives[1] != negatives[2]
    backwards = hard_negatives(pool[:1], [pool[0], *pool[:0:-1]], 1, tmp_path / "3", count=5)
    assert backwards == negatives[0]


def test_results_are_kept_under_a_key_of_all_that_they_depend_on(tmp_path, monkeypatch):
    first = load_examples(SAMPLE, "retrieval", "test", limit=3, cache_dir=tmp_path)
    (file,) = (tmp_path / "negatives").iterdir()
    monkeypatch.setattr("hones_lens.data.negatives.CaptionIndex", None)  # can't compute any more
    again = load_examples(SAMPLE, "retrieval", "test", limit=3, cache_dir=tmp_path)
    assert [e.candidates for e in again] == [e.candidates for e in first]
    with pytest.raises(TypeError):
        load_examples(SAMPLE, "retrieval", "test", limit=3, seed=1, cache_dir=tmp_path)
    file.write_text("[[")
    with pytest.raises(ValueError, match="in the cache is damaged: delete it"):
        load_examples(SAMPLE, "retrieval", "test", limit=3, cache_dir=tmp_path)
    file.write_text("[[]]")
    with pytest.raises(ValueError, match="in the cache is damaged: delete it"):
        load_examples(SAMPLE, "retrieval", "test", limit=3, cache_dir=tmp_path)


def test_the_cache_is_where_xdg_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_examples(SAMPLE, "retrieval", "dev", limit=1)
    assert len(list((tmp_path / "xdg" / "hones_lens" / "negatives").iterdir())) == 1


def test_a_cache_that_can_not_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="hard negatives are not kept for the next time"):
        examples = load_examples(SAMPLE, "retrieval", "dev", limit=1, cache_dir=tmp_path / "file")
    assert len(examples[0].candidates) == 50


def test_a_smaller_limit_gives_the_same_candidates(tmp_path):
    many = load_examples(SAMPLE, "retrieval", "discovery", cache_dir=tmp_path)
    few = load_examples(SAMPLE, "retrieval", "discovery", limit=4, cache_dir=tmp_path)
    assert [(e.candidates, e.positive) for e in few] == [(e.candidates, e.positive) for e in many[:4]]
