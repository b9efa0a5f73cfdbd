"""The metrics: official VQA accuracy, POPE's measures, ANLS, BLEU-4 and NDCG, each in 0-1."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein
from sacrebleu.metrics.bleu import BLEU

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(i) for i, word in enumerate(_NUMBER_WORDS.split())}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_GROUPED_DIGITS = re.compile(r"\d,\d")
_CONTRACTION_LIST = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't "
    "he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've "
    "mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't "
    "shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's "
    "something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've "
    "they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's "
    "where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've "
    "wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
# The official table maps each of these with one apostrophe left out, and has one entry the wrong way.
_CONTRACTIONS = {
    w[:i] + w[i + 1 :]: w for w in _CONTRACTION_LIST.split() for i in range(len(w)) if w[i] == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"

_BLEU = BLEU(effective_order=True)
_MAX_ORDER = 4


def normalize_answer(text: str) -> str:
    """The answer normalisation of the official VQA evaluation (Antol et al. 2015, `vqaEval.py`).

    Punctuation is removed, or replaced by a space if it is nowhere next to a space in the text (in texts
    with a digit group such as 1,000 it is always removed). Periods are removed except before a digit. Then
    the text is lower-cased, number words become digits, articles are removed, and contractions get their
    apostrophe.
    """
    text = re.sub(r"[\n\t]", " ", text).strip()
    grouped = _GROUPED_DIGITS.search(text) is not None
    out = text
    for symbol in _PUNCTUATION:
        next_to_space = f"{symbol} " in text or f" {symbol}" in text
        out = out.replace(symbol, "" if next_to_space or grouped else " ")
    out = _PERIOD.sub("", out, count=32)  # official: its re.UNICODE lands in `count`, where it means 32
    words = (_DIGITS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Iterable[str]) -> float:
    """VQA accuracy of one prediction, in 0-1.

    With ten answers or more, the official accuracy: the mean over annotators of min(matches / 3, 1), where
    matches are counted among the other annotators. With fewer, 1 if the prediction equals one of them.
    Both compare whole normalised texts, never substrings. (The official script does not normalise texts if
    all annotators agree exactly; here they are always normalised. With fewer than ten answers, texts of
    which normalisation leaves nothing, such as the letter "a", are compared without it, ignoring case.)

    Raises:
        ValueError: No answers.
    """
    answers = list(answers)
    if not answers:
        raise ValueError("VQA accuracy needs at least one answer")
    if len(answers) < 10:
        return float(any(_same_answer(prediction, answer) for answer in answers if answer.strip()))
    normalized = normalize_answer(prediction)
    matches = [normalize_answer(answer) == normalized for answer in answers]
    return sum(min((sum(matches) - match) / 3, 1.0) for match in matches) / len(matches)


def _same_answer(a: str, b: str) -> bool:
    normalized = normalize_answer(a), normalize_answer(b)
    if any(normalized):
        return normalized[0] == normalized[1]
    return a.strip().lower() == b.strip().lower()


def yes_no_metrics(predictions: Iterable[str], labels: Iterable[str]) -> dict[str, float]:
    """POPE's five measures of answers to yes-or-no questions, `yes` being the positive class.

    As in POPE's `evaluate.py` (Li et al. 2023) a prediction is read up to its first period: it is a no if one
    of its words, without commas, is `No`, `no` or `not`, and a yes otherwise. (Theirs splits at blanks
    alone; here any white space ends a word.)

    Args:
        predictions: What the model says, one text per question.
        labels: The right answers, `yes` or `no`.

    Returns:
        `accuracy`, `precision`, `recall`, `f1` and `yes_ratio`, each in 0-1; NaN where a share is of nothing
        (the precision of a model that never says yes).

    Raises:
        ValueError: No questions, numbers of predictions and labels that differ, or another label.
    """
    predictions, labels = list(predictions), list(labels)
    if len(predictions) != len(labels) or not labels:
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    for label in labels:
        if label not in ("yes", "no"):
            raise ValueError(f"label {label!r} is neither 'yes' nor 'no'")
    counts = [yes_no_statistics(*given) for given in zip(predictions, labels, strict=True)]
    return yes_no_shares(np.sum(counts, axis=0))


def yes_no_statistics(prediction: str, label: str) -> np.ndarray:
    """Which of the four outcomes one answer is; they are summed over questions.

    Returns:
        float64 [4], one 1 and three 0: hit (yes, rightly), false alarm, miss, correct rejection.
    """
    says_yes, is_yes = _says_yes(prediction), label == "yes"
    outcomes = (says_yes and is_yes, says_yes and not is_yes, is_yes and not says_yes)
    return np.array([*outcomes, not (says_yes or is_yes)], dtype=np.float64)


def yes_no_accuracy(statistics: np.ndarray) -> np.ndarray:
    """The share of right answers, [...], of summed `yes_no_statistics`, [..., 4]."""
    return np.asarray((statistics[..., 0] + statistics[..., 3]) / statistics.sum(axis=-1))


def yes_no_shares(statistics: np.ndarray) -> dict[str, float]:
    """POPE's five measures of summed `yes_no_statistics`, [4] (see `yes_no_metrics`)."""
    hits, false_alarms, misses, _ = statistics.tolist()

    def share(count: float, total: float) -> float:
        return count / total if total else math.nan

    return {
        "accuracy": float(yes_no_accuracy(statistics)),
        "precision": share(hits, hits + false_alarms),
        "recall": share(hits, hits + misses),
        "f1": share(2 * hits, 2 * hits + false_alarms + misses),
        "yes_ratio": (hits + false_alarms) / float(statistics.sum()),
    }


def _says_yes(prediction: str) -> bool:
    words = prediction.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def anls(prediction: str, truth: str, threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity of two texts in 0-1, or 0 if it is below the threshold.

    Case and white space at the ends are ignored, and runs of white space count as one space. The mean over
    examples is ANLS (Biten et al. 2019). At the threshold itself their formula gives 0; their evaluation
    script and published scores give the similarity, as here.
    """
    a, b = (" ".join(text.lower().split()) for text in (prediction, truth))
    similarity = Levenshtein.normalized_similarity(a, b)
    return similarity if similarity >= threshold else 0.0


def bleu_statistics(prediction: str, references: Sequence[str]) -> np.ndarray:
    """Sufficient statistics of one sentence for corpus BLEU-4; they are summed over sentences.

    Returns:
        float64 [10]: matching n-grams for n = 1-4, all n-grams for n = 1-4, length of the prediction,
        length of the closest reference, in tokens of sacreBLEU's default tokenizer (13a, case kept).
    """
    score = _BLEU.sentence_score(prediction, list(references))
    return np.array([*score.counts, *score.totals, score.sys_len, score.ref_len], dtype=np.float64)


def corpus_bleu(statistics: np.ndarray) -> np.ndarray:
    """Corpus BLEU-4 in 0-1 (sacreBLEU's `corpus_bleu` / 100, exponential smoothing).

    Args:
        statistics: Summed `bleu_statistics`, [..., 10].

    Returns:
        float64 [...].
    """
    matches, totals = statistics[..., :_MAX_ORDER], statistics[..., _MAX_ORDER : 2 * _MAX_ORDER]
    length, reference_length = statistics[..., -2], statistics[..., -1]
    unmatched = (matches == 0) & (totals > 0)
    smoothed = np.where(unmatched, 0.5 ** unmatched.cumsum(axis=-1), matches)
    with np.errstate(divide="ignore"):
        log_precisions = np.log(smoothed / np.maximum(totals, 1))
    brevity = np.exp(np.minimum(0.0, 1 - reference_length / np.maximum(length, 1)))
    bleu = np.minimum(brevity * np.exp(log_precisions.mean(axis=-1)), 1.0)
    return np.where(matches.any(axis=-1), bleu, 0.0)


def sentence_bleu(prediction: str, references: Iterable[str]) -> float:
    """Smoothed sentence BLEU-4 in 0-1 (sacreBLEU's `sentence_bleu` / 100).

    Exponential smoothing (method 3 of Chen and Cherry 2014) and effective order: a sentence of fewer
    than four tokens is scored by its n-grams up to its own length.
    """
    return min(_BLEU.sentence_score(prediction, list(references)).score / 100, 1.0)


def ndcg(margins: np.ndarray, relevant: int, k: int = 5) -> float:
    """NDCG@k of a ranking with one relevant candidate, in 0-1.

    Args:
        margins: The score of each candidate, [n_candidates], higher is better, none of them NaN.
        relevant: Index of the relevant candidate; it ranks below all others of equal score.
        k: Rank cutoff.
    """
    rank = int((margins >= margins[relevant]).sum())
    return 1 / math.log2(rank + 1) if rank <= k else 0.0


def expected_ndcg(n_candidates: int, k: int = 5) -> float:
    """Mean NDCG@k over all orders of the candidates, of which one is relevant."""
    return sum(1 / math.log2(rank + 1) for rank in range(1, min(k, n_candidates) + 1)) / n_candidates
