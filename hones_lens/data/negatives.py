"""Hard negatives for retrieval: captions of other images that are most like the true one."""

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
from hones_lens.data.splits import draw

N_NEGATIVES = 49
_VERSION = 1  # of the computation; part of the key of what is cached
_WORDS = re.compile(r"\w+")


def plain(text: str) -> str:
    """A caption as it is compared: words in lower case, without punctuation."""
    return " ".join(_WORDS.findall(text.casefold()))


class CaptionIndex:
    """TF-IDF over distinct captions; cosine similarity of a text with all of them.

    A caption's weight of a word is its count times ln((n + 1) / (df + 1)) + 1, with df of the n captions
    that hold the word; weights are scaled to length 1.

    Attributes:
        texts: The captions as written (the first of those that are equal when `plain`).
        places: Index in `texts` of each plain caption.
    """

    def __init__(self, captions: Sequence[str]):
        distinct: dict[str, str] = {}
        for caption in captions:
            distinct.setdefault(plain(caption), caption)
        self.texts = list(distinct.values())
        self.places = {key: i for i, key in enumerate(distinct)}
        counts = [Counter(key.split()) for key in distinct]
        found = Counter(word for count in counts for word in count)
        n = len(self.texts)
        self._idf = {word: float(np.log((n + 1) / (df + 1)) + 1) for word, df in found.items()}
        postings: dict[str, tuple[list[int], list[float]]] = {word: ([], []) for word in found}
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
        """Cosine similarity of a text with every caption, [n_captions], to nine digits."""
        out = np.zeros(len(self.texts))
        for word, weight in self._weights(Counter(plain(text).split())).items():
            where, weights = self._postings[word]
            out[where] += weight * weights
        return np.round(out, 9)


def captions_by_image(pool: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    """All captions of each image, from however many records."""
    found: dict[str, tuple[str, ...]] = {}
    for record in pool:
        found[record.image_key] = (*found.get(record.image_key, ()), *record.references)
    return found


def hard_negatives(
    queries: Sequence[Record],
    pool: Sequence[Record],
    seed: int,
    cache_dir: Path | None = None,
    count: int = N_NEGATIVES,
) -> list[tuple[str, ...]]:
    """For each query, the captions of other images that are most like its first one.

    None equals a true caption of the image (upper and lower case and punctuation aside), and no two are
    the same. Equally similar ones are ordered by the seed. The result is kept on the disk, under a key
    of all that it depends on. Another image's caption may happen to be true of this one too.

    Args:
        queries: Records with `references`.
        pool: All records of the file, the queries among them.
        seed: Orders captions that are equally similar.
        cache_dir: Where results are kept (default: `hones_lens` in XDG_CACHE_HOME or `~/.cache`).
        count: How many for each query.

    Raises:
        ValueError: Too few captions of other images, or a damaged file in the cache.
    """
    own = captions_by_image(pool)
    texts = [caption for captions in own.values() for caption in captions]
    asked = [(r.references[0], [plain(c) for c in own[r.image_key]]) for r in queries]
    key = json.dumps([_VERSION, seed, count, texts, asked], ensure_ascii=True)
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    file = (cache_dir or default_cache_dir()) / "negatives" / f"{name}.json"
    if file.exists():
        return _read_cache(file, len(queries), count)
    index = CaptionIndex(texts)
    tie = np.array([draw("tie", seed, text) for text in index.texts], dtype=np.uint64)
    found = [
        _nearest(index, record, truth, tie, count) for record, (_, truth) in zip(queries, asked, strict=True)
    ]
    _write_cache(file, found)
    return found


def _nearest(
    index: CaptionIndex, record: Record, truth: Sequence[str], tie: np.ndarray, count: int
) -> tuple[str, ...]:
    similar = index.similarities(record.references[0])
    similar[[index.places[key] for key in truth]] = -1.0
    n_false = int((similar >= 0).sum())
    if n_false < count:
        raise ValueError(
            f"record {record.id}: retrieval needs {count} captions of other images, "
            f"and the file has {n_false} that differ from this image's own"
        )
    threshold = -np.partition(-similar, count - 1)[count - 1]
    near = np.flatnonzero(similar >= threshold)
    order = near[np.lexsort((tie[near], -similar[near]))]
    return tuple(index.texts[i] for i in order[:count])


def default_cache_dir() -> Path:
    """Where computed things are kept: `hones_lens` in XDG_CACHE_HOME or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "hones_lens"


def _read_cache(file: Path, n_queries: int, count: int) -> list[tuple[str, ...]]:
    try:
        found = [tuple(texts) for texts in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} in the cache is damaged: delete it ({error})") from error
    if len(found) != n_queries or any(len(texts) != count for texts in found):
        raise ValueError(f"{file} in the cache is damaged: delete it")
    return found


def _write_cache(file: Path, found: Sequence[tuple[str, ...]]) -> None:
    """Write at once or not at all, also where several processes write the same file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as part:
            json.dump(found, part)
        os.replace(part.name, file)
    except OSError as error:
        warnings.warn(f"hard negatives are not kept for the next time: {error}", stacklevel=2)
