"""The metrics against values worked out by hand and formulas written another way."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings, strategies as st
from sklearn.metrics import ndcg_score

from hones_lens.tasks import metrics

words = st.sampled_from("a red blue circle small large at the top left and on".split())
sentences = st.lists(words, max_size=9).map(" ".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red bus.", "red bus"),
        ("two", "2"),
        ("None", "0"),
        ("Ten\tbirds\n", "10 birds"),
        ("eleven", "eleven"),
        ("an apple and a pear", "apple and pear"),
        ("theater", "theater"),
        ("Yes!", "yes"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("black-and-white", "black and white"),
        ("10 a.m. - 2 p.m.", "10 am 2 pm"),
        ("1,000", "1000"),
        ("1,000-ton", "1000ton"),
        ("1, 000", "1 000"),
        ("3.5", "3.5"),
        ("1.000.", "1.000"),
        ("version 2.", "version 2"),
        (".5", ".5"),
        ("t-shirt, red", "t shirt red"),
        ("a/c", "c"),
        ("dont know", "don't know"),
        ("hadnt've", "hadn't've"),
        ("hadn'tve", "hadn't've"),
        ("yall'd've", "y'all'd've"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("oclock", "o'clock"),
        ("it's", "it's"),
        ("id've", "id've"),
        ("A", ""),
        ("12:30", "12:30"),
        ("$5", "$5"),
        ("no" + 33 * ".", "no."),
    ],
)
def test_answers_are_normalized_as_in_the_official_vqa_evaluation(text, expected):
    assert metrics.normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)]
)
def test_ten_answers_score_by_leave_one_out(agreeing, expected):
    answers = ["The bus."] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert metrics.vqa_accuracy("bus", answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Red.", "red", 1.0),
        ("the red", "red", 1.0),
        ("3", "three", 1.0),
        ("red", "dark red", 0.0),
        ("not red", "red", 0.0),
        ("re", "red", 0.0),
        ("", "red", 0.0),
        ("a", "A", 1.0),
        ("the", "a", 0.0),
        ("", "a", 0.0),
    ],
)
def test_one_answer_needs_an_exact_match(prediction, answer, expected):
    assert metrics.vqa_accuracy(prediction, [answer]) == expected


def test_a_few_answers_are_alternatives():
    assert metrics.vqa_accuracy("sofa", ["couch", "sofa"]) == 1.0
    assert metrics.vqa_accuracy("chair", ["couch", "sofa"]) == 0.0
    assert metrics.vqa_accuracy("", ["couch", ""]) == 0.0


def test_vqa_accuracy_without_answers_raises():
    with pytest.raises(ValueError, match="at least one answer"):
        metrics.vqa_accuracy("red", [])


@settings(max_examples=60)
@given(st.data(), st.lists(sentences, min_size=10, max_size=10))
def test_vqa_accuracy_ignores_the_order_of_annotators(data, answers):
    said = data.draw(st.sampled_from(answers))
    score = metrics.vqa_accuracy(said, answers)
    assert 0 < score <= 1
    assert metrics.vqa_accuracy(said, data.draw(st.permutations(answers))) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "truth", "expected"),
    [
        ("ACEH", "ACEH", 1.0),
        ("ACEX", "ACEH", 0.75),
        ("ACXX", "ACEH", 0.5),
        ("AXX", "ACE", 0.0),
        ("kitten", "sitting", 4 / 7),
        ("  hello\n world ", "Hello World", 1.0),
        ("helloworld", "hello world", 10 / 11),
        ("", "ACE", 0.0),
        ("the word is ACE", "ACE", 0.0),
    ],
)
def test_anls_by_hand(said, truth, expected):
    assert metrics.anls(said, truth) == pytest.approx(expected, abs=1e-12)


def edit_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        edit_distance(a[1:], b) + 1,
        edit_distance(a, b[1:]) + 1,
        edit_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


@settings(max_examples=60)
@given(st.text("abc", max_size=5), st.text("abc", min_size=1, max_size=5))
def test_anls_is_one_minus_the_edit_distance_per_letter(said, truth):
    similarity = 1 - edit_distance(said, truth) / max(len(said), len(truth))
    expected = similarity if similarity >= 0.5 else 0.0
    assert metrics.anls(said, truth) == pytest.approx(expected, abs=1e-12)
    assert metrics.anls(said.upper(), truth) == metrics.anls(truth, said)


def random_corpus(rng: random.Random, size: int) -> tuple[list[str], list[list[str]]]:
    vocabulary = "a red blue circle square at the top left , and .".split()

    def sentence(low: int) -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randint(low, 12)))

    references = [[sentence(1) for _ in range(rng.randint(1, 4))] for _ in range(size)]
    said = [rng.choice([sentence(0), rng.choice(each)]) for each in references]
    return said, references


def sacrebleu_corpus(said: list[str], references: list[list[str]]) -> float:
    most = max(map(len, references))
    streams = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    return sacrebleu.corpus_bleu(said, streams).score / 100


@pytest.mark.parametrize("size", [1, 2, 3, 8, 30])
def test_bleu_of_summed_statistics_is_sacrebleu_on_the_corpus(size):
    rng = random.Random(size)
    for _ in range(20):
        said, references = random_corpus(rng, size)
        total = sum(metrics.bleu_statistics(s, r) for s, r in zip(said, references, strict=True))
        assert metrics.corpus_bleu(total) == pytest.approx(sacrebleu_corpus(said, references), abs=1e-12)


def test_bleu_of_resampled_statistics_is_sacrebleu_on_the_resampled_corpus():
    rng = random.Random(0)
    said, references = random_corpus(rng, 6)
    each = np.stack([metrics.bleu_statistics(s, r) for s, r in zip(said, references, strict=True)])
    chosen = [[rng.randrange(6) for _ in range(6)] for _ in range(12)]
    bleu = metrics.corpus_bleu(each[np.array(chosen)].sum(axis=1).reshape(3, 4, 10))
    expected = [sacrebleu_corpus([said[i] for i in c], [references[i] for i in c]) for c in chosen]
    assert bleu.shape == (3, 4)
    np.testing.assert_allclose(bleu.ravel(), expected, atol=1e-12)


def test_bleu_of_nothing_said_is_zero():
    assert metrics.corpus_bleu(metrics.bleu_statistics("", ["a red circle"])) == 0
    assert metrics.corpus_bleu(np.zeros(10)) == 0
    assert metrics.sentence_bleu("", ["a red circle"]) == 0


def test_bleu_by_hand():
    said, truth = "a small red circle at left", "a small blue circle at left"
    # Matches 5/6, 3/5, 1/4 and 0/3; the missing order counts as 1 / (2 * 3).
    expected = (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert metrics.corpus_bleu(metrics.bleu_statistics(said, [truth])) == pytest.approx(expected)
    assert metrics.sentence_bleu(said, [truth]) == pytest.approx(expected)


def test_sentence_bleu_of_a_short_sentence_uses_the_orders_it_has():
    assert metrics.sentence_bleu("the cat sat", ["the cat sat down"]) == pytest.approx(math.exp(1 - 4 / 3))
    assert metrics.sentence_bleu("a red circle at the top", ["a red circle at the top"]) == 1.0


@settings(max_examples=60)
@given(sentences, st.lists(sentences.filter(bool), min_size=1, max_size=3))
def test_sentence_bleu_is_sacrebleu_in_zero_to_one(said, references):
    score = metrics.sentence_bleu(said, references)
    assert 0 <= score <= 1
    assert score == pytest.approx(sacrebleu.sentence_bleu(said, references).score / 100, abs=1e-12)
    assert score == pytest.approx(metrics.sentence_bleu(said, references[::-1]))


def ndcg_by_sorting(margins: list[float], relevant: int) -> float:
    order = sorted(range(len(margins)), key=lambda i: (-margins[i], i == relevant))
    gains = [(2.0 ** (i == relevant) - 1) / math.log2(place + 2) for place, i in enumerate(order)]
    return sum(gains[:5]) / (1 / math.log2(2))


@pytest.mark.parametrize(
    ("better", "expected"), [(0, 1.0), (1, 0.63093), (2, 0.5), (3, 0.43068), (4, 0.38685), (5, 0.0)]
)
def test_ndcg_by_hand(better, expected):
    margins = np.array([0.0] + [1.0] * better + [-1.0] * 10)
    assert metrics.ndcg(margins, 0) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=100)
@given(st.data(), st.lists(st.sampled_from([-1.5, 0.0, 0.5, 2.0]), min_size=1, max_size=9))
def test_ndcg_ranks_the_relevant_one_last_among_equals(data, margins):
    relevant = data.draw(st.integers(0, len(margins) - 1))
    score = metrics.ndcg(np.array(margins), relevant)
    assert score == pytest.approx(ndcg_by_sorting(margins, relevant))
    order = data.draw(st.permutations(range(len(margins))))
    assert metrics.ndcg(np.array(margins)[order], order.index(relevant)) == score


def test_ndcg_is_that_of_scikit_learn():
    """Without equal margins, which scikit-learn averages over and we rank against the true candidate."""
    rng = np.random.default_rng(0)
    for n in (2, 5, 6, 50):
        for _ in range(20):
            margins, relevant = rng.permutation(n).astype(float), int(rng.integers(n))
            truth = np.zeros((1, n))
            truth[0, relevant] = 1
            theirs = ndcg_score(truth, margins[None], k=5)
            assert metrics.ndcg(margins, relevant) == pytest.approx(theirs, abs=1e-12)


def test_equal_margins_never_help():
    assert metrics.ndcg(np.zeros(50), 0) == 0
    assert metrics.ndcg(np.zeros(3), 0) == 0.5
    assert metrics.ndcg(np.array([np.inf, np.inf]), 1) == pytest.approx(1 / math.log2(3))
