"""Masking results in words: headline, finding and verdict of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hones_lens.hones import MEASURES, MaskingResult, masking_measure
from hones_lens.viz import join_words, level, number, percent

_DEFAULT_SHARE = 0.01


BOTH, LOG_PROB_ONLY, METRIC_ONLY, NEITHER, UNKNOWN = "both", "log_prob", "metric", "neither", "unknown"


def set_size(result: MaskingResult) -> str:
    """The number of masked neurons and of all neurons: `15 of 1,536 neurons`."""
    return f"{result.n_neurons:,} of {round(result.n_neurons / result.ratio):,} neurons"


def headline(masking: Sequence[MaskingResult], share: float = _DEFAULT_SHARE) -> MaskingResult:
    """The result whose share of neurons is nearest to `share`, as a ratio; of two, the smaller.

    Raises:
        ValueError: No results.
    """
    if not masking:
        raise ValueError("no masking results to choose from")
    return min(masking, key=lambda r: (round(abs(math.log(r.ratio / share)), 9), r.ratio))


def finding(result: MaskingResult) -> str:
    """In which measure the drop is clear: both, metric, log_prob or neither; unknown without random sets."""
    if not result.controls:
        return UNKNOWN
    metric, log_prob = (masking_measure(result, m).clear for m in MEASURES)
    if metric and log_prob:
        return BOTH
    return METRIC_ONLY if metric else LOG_PROB_ONLY if log_prob else NEITHER


def verdict(masking: Sequence[MaskingResult], share: float = _DEFAULT_SHARE) -> str:
    """Text on what masking shows about the selected neurons, derived from the numbers alone.

    A drop counts as clear when it is larger than with every matched random set and its interval lies
    above 0.

    Args:
        masking: Results at one or several shares of all neurons, for one task and method.
        share: The share that the first paragraphs are about (the nearest there is).

    Returns:
        Paragraphs, parted by newlines: the finding in one sentence, what it rests on, the metric's
        numbers, the log-probability's, the other shares, the kinds of question. The last two only where
        there are several.
    """
    if not masking:
        return "No neurons were masked, so nothing is known about what they do for the task."
    main = headline(masking, share)
    paragraphs = [
        _hopeless(main) or _conclusion(main),
        *(_measure_sentence(main, measure) for measure in MEASURES),
    ]
    remaining = [result for result in sorted(masking, key=lambda r: r.ratio) if result is not main]
    if remaining and main.controls:
        paragraphs.append(_other_shares(remaining))
    if len(main.kinds) > 1 and main.controls:
        paragraphs.append(_kinds(sorted(masking, key=lambda r: r.ratio)))
    return "\n".join(paragraphs)


def _hopeless(result: MaskingResult) -> str:
    """A sentence on a task that the unchanged model can't do, and why; empty where it can."""
    if not result.problem:
        return ""
    return (
        f"Nothing can be said of the {result.task} task: the unchanged model does not do it.\n"
        f"{result.problem[0].upper()}{result.problem[1:]}, so that no neurons could lower it."
    )


_UNDECIDED = {BOTH: (), METRIC_ONLY: (), LOG_PROB_ONLY: ("metric",), NEITHER: MEASURES, UNKNOWN: ()}


def _conclusion(result: MaskingResult) -> str:
    """The finding in one sentence, a newline, and the evidence for it."""
    task, metric, count = result.task, result.metric_name, len(result.controls)
    size = f"{percent(result.ratio)} of the FFN neurons ({set_size(result)})"
    case = finding(result)
    # More than every random set, but the interval reaches 0: not refuted either.
    undecided = any(masking_measure(result, m).exceeds for m in _UNDECIDED[case])
    carried = "shown to be carried" if undecided else "carried"
    if case == BOTH:
        return (
            f"These neurons carry part of the {task} task.\nMasking {size} lowers both {metric} and the "
            f"right answer's probability more than masking any of {count} matched random sets does."
        )
    if case == LOG_PROB_ONLY:
        return (
            f"The answers of the {task} task are not {carried} by these neurons, though they add to it.\n"
            f"Masking {size} does not lower {metric} clearly more than masking as many random neurons. Yet "
            f"the right answer loses more probability than with any of {count} matched random sets: these "
            "neurons push towards it, and the rest of the model makes up for their loss."
        )
    if case == METRIC_ONLY:
        return (
            f"The evidence is mixed: what the {task} task asks for is not shown to be carried by these "
            f"neurons.\nMasking {size} lowers {metric} more than masking any of {count} matched random sets "
            "does, but not the probability of the right answer. The answers' form may be what suffers."
        )
    if case == NEITHER and carried != "carried":
        exceeding = join_words([m.name for m in (masking_measure(result, w) for w in MEASURES) if m.exceeds])
        return (
            f"The {task} task is not {carried} by these neurons.\nMasking {size} costs more than masking "
            f"any of {count} matched random sets ({exceeding}), but {result.metric_interval.n} examples do "
            "not settle that it costs anything."
        )
    if case == NEITHER:
        return (
            f"The {task} task is not carried by these neurons.\nMasking {size} does not stand out from "
            f"masking as many random neurons, neither in {metric} nor in the right answer's probability."
        )
    return (
        f"Nothing can be said about these neurons in particular.\nMasking {size} was not compared with "
        f"random sets: any neurons might do as much to the {task} task."
    )


def _measure_sentence(result: MaskingResult, measure: str) -> str:
    """The results in one measure, as a sentence."""
    m = masking_measure(result, measure)
    name = m.name if m.name[1:2].isupper() else m.name[0].upper() + m.name[1:]
    before, after = number(m.baseline), number(m.masked)
    moved = "stays at" if before == after else f"{'falls' if m.drop > 0 else 'rises'} from {before} to"
    interval = f"{level(m.interval)} interval {number(m.interval.low)} to {number(m.interval.high)}"
    text = f"{name} {moved} {after} (drop {number(m.drop)}{m.unit}, {interval}, n = {m.interval.n})"
    if not m.controls:
        return f"{text}."
    count = len(m.controls)
    comparison = f"larger than with {'all' if m.beaten == count else f'{m.beaten} of'} {count} random sets"
    if not m.beaten:
        comparison = f"no larger than with any of {count} random sets"
    mean, largest = (number(m.baseline - value) for value in (m.random_mean, m.random_worst))
    text += f"; the drop is {comparison} (their mean {mean}, largest {largest})."
    if m.exceeds and not m.clear:
        text += f" The interval reaches 0, so {m.interval.n} examples do not settle it."
    return text


_FINDING_TEXTS = {
    BOTH: "in both measures",
    LOG_PROB_ONLY: "in the probability alone",
    METRIC_ONLY: "in the metric alone",
    NEITHER: "in neither",
    UNKNOWN: "not known",
}


def _other_shares(results: Sequence[MaskingResult]) -> str:
    parts = []
    for case, words in _FINDING_TEXTS.items():
        shares = [percent(result.ratio) for result in results if finding(result) == case]
        if shares:
            parts.append(f"at {join_words(shares)} {words}")
    return (
        f"At the other shares the drop is clear (larger than with every random set, its interval above 0) "
        f"{'; '.join(parts)}."
    )


def kind_drop_is_clear(result: MaskingResult, kind: str) -> bool:
    """Whether the metric drops on this kind of question, and more than with every random set."""
    kind_result = result.kinds[kind]
    return kind_result.baseline > kind_result.masked and 0 < len(result.controls) == result.beats(
        "metric", kind
    )


def _kinds(masking: Sequence[MaskingResult]) -> str:
    metric = masking[0].metric_name
    parts = []
    for kind in masking[0].kinds:
        clear = [(r.kinds[kind], percent(r.ratio)) for r in masking if kind_drop_is_clear(r, kind)]
        if clear:
            drops = [
                f"{number(kind_result.baseline - kind_result.masked)} at {share}"
                for kind_result, share in clear
            ]
            parts.append(f"{kind} ({join_words(drops)})")
    if not parts:
        return f"On no single kind of question does {metric} drop more than with every random set."
    return f"By kind of question, {metric} drops more than with every random set for {join_words(parts)}."
