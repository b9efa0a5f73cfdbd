"""Hard negatives for retrieval: the captions of other images that are most similar to the true one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hones_lens.data.records import Record
from hones_lens.data.splits import stable_hash

N_NEGATIVES = 49
_VERSION = 1  # of the computation; part of the cache key
_WORDS = re.compile(r"\w+")


def normalize_caption(text: str) -> str:
    """A caption normalised for comparison: words in lower case, without punctuation."""
    return " ".join(_WORDS.findall(text.casefold()))


class CaptionIndex:
    """TF-IDF over distinct captions; cosine similarity of a text with all of them.

    The weight of a word in a caption is its count times ln((n + 1) / (df + 1)) + 1, where df of the n
    captions contain the word; the weights of a caption are scaled to unit length.

    Attributes:
        texts: The captions as written (the first of those that are equal after normalisation).
        index_of: Index in `texts` by normalised caption.
    """

    def __init__(self, captions: Sequence[str]):
        distinct: dict[str, str] = {}
        for caption in captions:
            distinct.setdefault(normalize_caption(caption), caption)
        self.texts = list(distinct.values())
        self.index_of = {key: i for i, key in enumerate(distinct)}
        counts = [Counter(key.split()) for key in distinct]
        document_frequency = Counter(word for count in counts for word in count)
        n = len(self.texts)
        self._idf = {word: float(np.log((n + 1) / (df + 1)) + 1) for word, df in document_frequency.items()}
        postings: dict[str, tuple[list[int], list[float]]] = {word: ([], []) for word in document_frequency}
        for i, count in enumerate(counts):
            for word, weight in self._weights(count).items():
                postings[word][0].append(i)
                postings[word][1].append(weight)
        self._postings = {word: (np.array(i), np.array(w)) for word, (i, w) in postings.items()}

    def _weights(self, count: Counter[str]) -> dict[str, float]:
        weights = {word: count[word] * self._idf[word] for word in sorted(count) if word in self._idf}
        length = sum(weight**2 for weight in weights.values()) ** 0.5
        return {word: weight / length for word, weight in weights.items()}

    def similarities(self, text: str) -> np.ndarray:
        """Cosine similarity of a text with every caption, [n_captions], rounded to nine digits."""
        out = np.zeros(len(self.texts))
        for word, weight in self._weights(Counter(normalize_caption(text).split())).items():
            indices, weights = self._postings[word]
            out[indices] += weight * weights
        return np.round(out, 9)


def group_captions_by_image(pool: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    """All captions of each image, over all its records, by image key."""
    captions: dict[str, tuple[str, ...]] = {}
    for record in pool:
        captions[record.image_key] = (*captions.get(record.image_key, ()), *record.references)
    return captions


def hard_negatives(
    queries: Sequence[Record],
    pool: Sequence[Record],
    seed: int,
    cache_dir: Path | None = None,
    count: int = N_NEGATIVES,
) -> list[tuple[str, ...]]:
    """For each query, the captions of other images that are most similar to its first caption.

    No negative equals a true caption of the image (ignoring case and punctuation), and no two are the
    same. Ties are ordered by the seed. The result is cached on disk under a hash of everything that it
    depends on. The caption of another image may happen to be true of this one too.

    Args:
        queries: Records with `references`.
        pool: All records of the file, the queries among them.
        seed: Seed of the order of equally similar captions.
        cache_dir: Cache folder (default: `hones_lens` in XDG_CACHE_HOME or `~/.cache`).
        count: Number of negatives per query.

    Returns:
        `count` captions per query, most similar first.

    Raises:
        ValueError: Too few captions of other images, or a damaged file in the cache.
    """
    captions_of_image = group_captions_by_image(pool)
    texts = [caption for captions in captions_of_image.values() for caption in captions]
    query_captions = [
        (r.references[0], [normalize_caption(c) for c in captions_of_image[r.image_key]]) for r in queries
    ]
    key = json.dumps([_VERSION, seed, count, texts, query_captions], ensure_ascii=True)
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    file = (cache_dir or default_cache_dir()) / "negatives" / f"{name}.json"
    if file.exists():
        return _read_cache(file, len(queries), count)
    index = CaptionIndex(texts)
    tie_breaker = np.array([stable_hash("tie", seed, text) for text in index.texts], dtype=np.uint64)
    negatives = [
        _nearest(index, record, true_captions, tie_breaker, count)
        for record, (_, true_captions) in zip(queries, query_captions, strict=True)
    ]
    _write_cache(file, negatives)
    return negatives


def _nearest(
    index: CaptionIndex, record: Record, true_captions: Sequence[str], tie_breaker: np.ndarray, count: int
) -> tuple[str, ...]:
    similarities = index.similarities(record.references[0])
    similarities[[index.index_of[key] for key in true_captions]] = -1.0
    n_available = int((similarities >= 0).sum())
    if n_available < count:
        raise ValueError(
            f"record {record.id}: retrieval needs {count} captions of other images, "
            f"and the file has {n_available} that differ from this image's own"
        )
    threshold = -np.partition(-similarities, count - 1)[count - 1]
    nearest = np.flatnonzero(similarities >= threshold)
    order = nearest[np.lexsort((tie_breaker[nearest], -similarities[nearest]))]
    return tuple(index.texts[i] for i in order[:count])


def default_cache_dir() -> Path:
    """The cache folder: `hones_lens` in XDG_CACHE_HOME or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "hones_lens"


def _read_cache(file: Path, n_queries: int, count: int) -> list[tuple[str, ...]]:
    try:
        negatives = [tuple(texts) for texts in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} in the cache is damaged: delete it ({error})") from error
    if len(negatives) != n_queries or any(len(texts) != count for texts in negatives):
        raise ValueError(f"{file} in the cache is damaged: delete it")
    return negatives


def _write_cache(file: Path, negatives: Sequence[tuple[str, ...]]) -> None:
    """Write atomically, so that several processes may write the same file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as temporary:
            json.dump(negatives, temporary)
        os.replace(temporary.name, file)
    except OSError as error:
        warnings.warn(f"hard negatives are not kept for the next time: {error}", stacklevel=2)
