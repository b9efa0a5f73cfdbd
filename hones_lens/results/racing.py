"""Racing: which K of many arms have the largest means over N examples, without measuring all of them.

Examples come in a random order. For every arm a confidence sequence for its mean over *these* N examples
is kept: sampling without replacement, so that it closes as they run out. Arms that can no longer be among
the K leave the race, and those that can no longer be driven out are accepted.

The sequence is that of betting (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", JRSS B 2024, section 5): for each candidate mean m a gambler bets on and against it, and m is out
when one of the two has multiplied the stake by 2/α. It holds at every time at once, so one may look and
stop at will.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LARGEST_BET = 0.75  # of what could ruin the gambler


@dataclass(frozen=True)
class Racing:
    """How to race.

    Attributes:
        delta: The K arms are right, up to epsilon, with probability at least 1 − delta.
        epsilon: An arm whose mean is within epsilon of the K-th largest may take its place (ties).
        round_size: Examples between two looks.
        seed: Of the order of the examples.
    """

    delta: float = 0.05
    epsilon: float = 0.01
    round_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1 or self.epsilon < 0 or self.round_size < 1:
            raise ValueError(f"racing needs 0 < delta < 1, epsilon ≥ 0 and a round of examples, not {self}")


class Confidence:
    """Confidence sequences for the means of several arms over N examples each, drawn without replacement.

    Args:
        n_arms, n_examples: How many (N).
        alpha: Each arm's mean lies within its bounds at all times with probability 1 − alpha.
        low, high: Between which every value lies.
        grid: How many candidate means are kept track of; denser around `dense`.
        dense: Where.
    """

    def __init__(
        self,
        n_arms: int,
        n_examples: int,
        alpha: float,
        low: float = -1.0,
        high: float = 1.0,
        grid: int = 256,
        dense: float = 0.0,
    ):
        self.n_examples, self.alpha, self.low, self.high = n_examples, alpha, low, high
        centre = (dense - low) / (high - low)
        stretched = np.sinh(np.linspace(-6, 6, grid)) / np.sinh(6)
        below, above = centre * (1 + stretched), centre + (1 - centre) * stretched
        self.grid: np.ndarray = np.where(stretched < 0, below, above)
        self.count = np.zeros(n_arms, dtype=int)
        self._sum = np.zeros(n_arms)
        self._spread = np.full(n_arms, 0.25)  # of the values about their running mean, one value assumed
        self._for = np.zeros((n_arms, grid))  # log wealth of the gambler who bets on more than m
        self._against = np.zeros((n_arms, grid))
        self._in = np.ones((n_arms, grid), dtype=bool)

    def add(self, arms: np.ndarray, values: np.ndarray) -> None:
        """Take in the next values of some arms, [arm example], all of equal count so far.

        Raises:
            ValueError: A value out of bounds, or more values than examples.
        """
        if len(arms) == 0 or values.shape[1] == 0:
            return
        if not (self.low <= values.min() and values.max() <= self.high):
            raise ValueError(f"racing needs values between {self.low} and {self.high}")
        if int(self.count[arms].max()) + values.shape[1] > self.n_examples:
            raise ValueError(f"more values than the {self.n_examples} examples")
        total, spread, count = self._sum[arms], self._spread[arms], self.count[arms].astype(float)
        more, less, inside = self._for[arms], self._against[arms], self._in[arms]
        stake = 2 * np.log(2 / self.alpha)
        for x in ((values - self.low) / (self.high - self.low)).T:
            left = self.n_examples - count
            mean = (self.n_examples * self.grid - total[:, None]) / left[:, None]  # of those still to come
            inside &= (mean >= -1e-9) & (mean <= 1 + 1e-9)
            mean = mean.clip(1e-9, 1 - 1e-9)
            n = count + 1
            bet = np.sqrt(stake / (spread * np.log(n + 1)))[:, None]
            gap = x[:, None] - mean
            more += np.log1p(np.minimum(bet, _LARGEST_BET / mean) * gap)
            less += np.log1p(-np.minimum(bet, _LARGEST_BET / (1 - mean)) * gap)
            guess = (0.5 + total) / n
            total, count = total + x, n
            spread = spread + (x - guess) ** 2
            inside &= np.maximum(more, less) < np.log(2 / self.alpha)
        self._sum[arms], self._spread[arms], self.count[arms] = total, spread, count.astype(int)
        self._for[arms], self._against[arms], self._in[arms] = more, less, inside

    @property
    def mean(self) -> np.ndarray:
        """Mean of the values so far; NaN before the first."""
        with np.errstate(invalid="ignore"):
            return self.low + (self.high - self.low) * self._sum / np.where(self.count, self.count, np.nan)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of each arm's mean over the N examples."""
        first = self._in.argmax(1)
        last = len(self.grid) - 1 - self._in[:, ::-1].argmax(1)
        none = ~self._in.any(1)  # between two candidates: the nearest to the mean
        nearest = np.abs(self.grid - (self._sum / np.maximum(self.count, 1))[:, None]).argmin(1)
        first[none] = last[none] = nearest[none]
        # The set is an interval between candidates: its ends may lie up to the next one that is out.
        low = self.grid[np.maximum(first - 1, 0)]
        high = self.grid[np.minimum(last + 1, len(self.grid) - 1)]
        left = self.n_examples - self.count
        least, most = self._sum / self.n_examples, (self._sum + left) / self.n_examples  # all 0, or all 1
        low, high = low.clip(least, most), high.clip(least, most)
        span = self.high - self.low
        return self.low + span * low, self.low + span * high


@dataclass(frozen=True)
class RaceResult:
    """Who won.

    Attributes:
        winners: Numbers of the K arms.
        examples: How many examples each arm was measured on.
        low, high: Bounds of each arm's mean, all true at once with probability 1 − delta.
        racing: How it was raced.
    """

    winners: tuple[int, ...]
    examples: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    racing: Racing


class Race:
    """The K best of several arms.

    Args:
        n_arms, n_examples: How many.
        k: How many to find.
        racing: Confidence and tolerance.

    Raises:
        ValueError: k is not between 1 and the number of arms.
    """

    def __init__(self, n_arms: int, n_examples: int, k: int, racing: Racing):
        if not 1 <= k <= n_arms:
            raise ValueError(f"k must be between 1 and {n_arms}, not {k}")
        self.k, self.racing = k, racing
        self.confidence = Confidence(n_arms, n_examples, racing.delta / n_arms)
        self.running = np.ones(n_arms, dtype=bool)
        self.accepted = np.zeros(n_arms, dtype=bool)

    @property
    def done(self) -> bool:
        """Whether nothing is open."""
        return not self.running.any()

    def add(self, values: np.ndarray) -> None:
        """Take in a round of the running arms, [running arm, example], and let arms leave.

        With `o` open places: an arm leaves when its mean can't be above the o-th largest lower bound by
        more than epsilon / 2 (those that have the o largest lower bounds stay); it is accepted when fewer
        than o others can be above it by more than epsilon / 2. Together, at most K − 1 arms are above a
        winner by more than epsilon.
        """
        arms = np.flatnonzero(self.running)
        self.confidence.add(arms, values)
        low, high = (bound[arms] for bound in self.confidence.bounds())
        places, half = self.k - int(self.accepted.sum()), self.racing.epsilon / 2
        by_high = np.sort(np.append(high, -np.inf))[::-1]
        first = by_high[places - 1]
        # The o-th largest upper bound among the others: one further down for those that are before it.
        rival = np.full_like(high, first)
        rival[high >= first] = by_high[places]
        surely = np.flatnonzero(low + half >= rival)
        surely = surely[np.argsort(-low[surely], kind="stable")][:places]
        best = np.argsort(-low, kind="stable")[:places]
        leaves = high <= low[best[-1]] + half
        leaves[best] = False
        self.accepted[arms[surely]] = True
        leaves[surely] = True
        self.running[arms[leaves]] = False
        if len(surely) == places:
            self.running[:] = False

    def result(self) -> RaceResult:
        """Who won.

        Raises:
            ValueError: The race is not over.
        """
        if not self.done:
            raise ValueError(f"{int(self.running.sum())} arms are still running")
        low, high = self.confidence.bounds()
        return RaceResult(
            winners=tuple(np.flatnonzero(self.accepted).tolist()),
            examples=tuple(self.confidence.count.tolist()),
            low=tuple(low.tolist()),
            high=tuple(high.tolist()),
            racing=self.racing,
        )


def replay(values: np.ndarray, k: int, racing: Racing) -> RaceResult:
    """Race on values that are all known, such as stored drops: what would have been measured, and found.

    Args:
        values: Between −1 and 1, [n_arms n_examples].
        k: How many to find.
        racing: Confidence, tolerance, and the seed of the examples' order.

    Raises:
        ValueError: As `Race` and `Confidence.add`.
    """
    n_arms, n_examples = values.shape
    order = np.random.default_rng(racing.seed).permutation(n_examples)
    race, at = Race(n_arms, n_examples, k, racing), 0
    while not race.done:
        race.add(values[race.running][:, order[at : at + racing.round_size]])
        at += racing.round_size
    return race.result()
