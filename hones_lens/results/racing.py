"""Racing: finds the K of many arms with the largest means over N examples, without measuring all of them.

Examples come in a random order. Every arm has a confidence sequence for its mean over *these* N examples;
they are sampled without replacement, so the sequence shrinks to a point as the examples run out. Arms that
can no longer be among the K are eliminated, and arms that are certain to be among them are accepted.

The confidence sequences are built by betting (Waudby-Smith and Ramdas, "Estimating means of bounded random
variables by betting", JRSS B 2024, section 5): for each candidate mean m a gambler bets that the mean is
above m, and one that it is below; m is rejected when one of the two has multiplied the stake by 2/α. The
coverage holds uniformly over time, so one may look at any time and stop at any time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LARGEST_BET = 0.75  # as a share of the bet that could ruin the gambler


@dataclass(frozen=True)
class Racing:
    """Options of a race.

    Attributes:
        delta: The K winners are correct, up to epsilon, with probability at least 1 − delta.
        epsilon: An arm whose mean is within epsilon of the K-th largest may win in its stead (ties).
        round_size: Number of examples between two eliminations.
        seed: Seed of the order of the examples.
    """

    delta: float = 0.05
    epsilon: float = 0.01
    round_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1 or self.epsilon < 0 or self.round_size < 1:
            raise ValueError(f"racing needs 0 < delta < 1, epsilon ≥ 0 and a round of examples, not {self}")


class ConfidenceSequences:
    """Confidence sequences for the means of several arms over N examples each, drawn without replacement.

    Args:
        n_arms, n_examples: Number of arms, and of examples (N).
        alpha: Each arm's mean lies within its bounds at all times with probability 1 − alpha.
        low, high: Bounds of the values.
        grid: Number of candidate means, which are denser around `dense`.
        dense: The value around which they are denser.
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
        self._log_for = np.zeros((n_arms, grid))  # log wealth of the gambler who bets on a mean above m
        self._log_against = np.zeros((n_arms, grid))
        self._in_set = np.ones((n_arms, grid), dtype=bool)

    def add(self, arms: np.ndarray, values: np.ndarray) -> None:
        """Add the next values of some arms, [arm example]; these arms must have equal counts so far.

        Raises:
            ValueError: A value out of bounds, or more values than examples.
        """
        if len(arms) == 0 or values.shape[1] == 0:
            return
        if not (self.low <= values.min() and values.max() <= self.high):
            raise ValueError(f"racing needs values between {self.low} and {self.high}")
        if int(self.count[arms].max()) + values.shape[1] > self.n_examples:
            raise ValueError(f"more values than the {self.n_examples} examples")
        sums, spread, count = self._sum[arms], self._spread[arms], self.count[arms].astype(float)
        log_for, log_against, in_set = self._log_for[arms], self._log_against[arms], self._in_set[arms]
        log_stake = 2 * np.log(2 / self.alpha)
        for x in ((values - self.low) / (self.high - self.low)).T:
            n_left = self.n_examples - count
            # The mean of the remaining examples if the candidate is the mean of all.
            mean = (self.n_examples * self.grid - sums[:, None]) / n_left[:, None]
            in_set &= (mean >= -1e-9) & (mean <= 1 + 1e-9)
            mean = mean.clip(1e-9, 1 - 1e-9)
            n = count + 1
            bet = np.sqrt(log_stake / (spread * np.log(n + 1)))[:, None]
            excess = x[:, None] - mean
            log_for += np.log1p(np.minimum(bet, _LARGEST_BET / mean) * excess)
            log_against += np.log1p(-np.minimum(bet, _LARGEST_BET / (1 - mean)) * excess)
            running_mean = (0.5 + sums) / n
            sums, count = sums + x, n
            spread = spread + (x - running_mean) ** 2
            in_set &= np.maximum(log_for, log_against) < np.log(2 / self.alpha)
        self._sum[arms], self._spread[arms], self.count[arms] = sums, spread, count.astype(int)
        self._log_for[arms], self._log_against[arms], self._in_set[arms] = log_for, log_against, in_set

    @property
    def mean(self) -> np.ndarray:
        """Mean of the values so far; NaN before the first."""
        with np.errstate(invalid="ignore"):
            return self.low + (self.high - self.low) * self._sum / np.where(self.count, self.count, np.nan)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of each arm's mean over the N examples."""
        first = self._in_set.argmax(1)
        last = len(self.grid) - 1 - self._in_set[:, ::-1].argmax(1)
        # Where all candidates are rejected, the mean lies between two of them: take the nearest.
        all_rejected = ~self._in_set.any(1)
        nearest = np.abs(self.grid - (self._sum / np.maximum(self.count, 1))[:, None]).argmin(1)
        first[all_rejected] = last[all_rejected] = nearest[all_rejected]
        # The ends of the interval may lie anywhere up to the next rejected candidate.
        low = self.grid[np.maximum(first - 1, 0)]
        high = self.grid[np.minimum(last + 1, len(self.grid) - 1)]
        n_left = self.n_examples - self.count
        # The means if all remaining values were 0, and if all were 1.
        smallest, largest = self._sum / self.n_examples, (self._sum + n_left) / self.n_examples
        low, high = low.clip(smallest, largest), high.clip(smallest, largest)
        span = self.high - self.low
        return self.low + span * low, self.low + span * high


@dataclass(frozen=True)
class RaceResult:
    """Result of a race.

    Attributes:
        winners: Indices of the K arms.
        examples: Number of examples that each arm was measured on.
        low, high: Bounds of each arm's mean, which hold simultaneously with probability 1 − delta.
        racing: Options of the race.
    """

    winners: tuple[int, ...]
    examples: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    racing: Racing


class Race:
    """A race for the K best of several arms.

    Args:
        n_arms, n_examples: Number of arms and of examples.
        k: Number of arms to find.
        racing: Confidence and tolerance.

    Raises:
        ValueError: k is not between 1 and the number of arms.
    """

    def __init__(self, n_arms: int, n_examples: int, k: int, racing: Racing):
        if not 1 <= k <= n_arms:
            raise ValueError(f"k must be between 1 and {n_arms}, not {k}")
        self.k, self.racing = k, racing
        self.confidence = ConfidenceSequences(n_arms, n_examples, racing.delta / n_arms)
        self.running = np.ones(n_arms, dtype=bool)
        self.accepted = np.zeros(n_arms, dtype=bool)

    @property
    def done(self) -> bool:
        """Whether every arm is accepted or eliminated."""
        return not self.running.any()

    def add(self, values: np.ndarray) -> None:
        """Add a round of values of the running arms, [running arm, example]; eliminate and accept arms.

        Let o be K minus the number of accepted arms. An arm is eliminated when its mean can't exceed the
        o-th largest lower bound by more than epsilon / 2 (the arms with the o largest lower bounds stay); it
        is accepted when fewer than o others can exceed it by more than epsilon / 2. Together, at most K − 1
        arms exceed a winner by more than epsilon.
        """
        arms = np.flatnonzero(self.running)
        self.confidence.add(arms, values)
        low, high = (bound[arms] for bound in self.confidence.bounds())
        n_open, tolerance = self.k - int(self.accepted.sum()), self.racing.epsilon / 2
        sorted_high = np.sort(np.append(high, -np.inf))[::-1]
        first = sorted_high[n_open - 1]
        # The o-th largest upper bound among the other arms; for the arms above it, that is the next one.
        rival_high = np.full_like(high, first)
        rival_high[high >= first] = sorted_high[n_open]
        certain = np.flatnonzero(low + tolerance >= rival_high)
        certain = certain[np.argsort(-low[certain], kind="stable")][:n_open]
        leaders = np.argsort(-low, kind="stable")[:n_open]
        eliminated = high <= low[leaders[-1]] + tolerance
        eliminated[leaders] = False
        self.accepted[arms[certain]] = True
        eliminated[certain] = True
        self.running[arms[eliminated]] = False
        if len(certain) == n_open:
            self.running[:] = False

    def result(self) -> RaceResult:
        """The winners and all bounds.

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
    """Race on values that are all known, e.g. stored drops: which of them a race would have measured.

    Args:
        values: Between −1 and 1, [n_arms n_examples].
        k: Number of arms to find.
        racing: Confidence, tolerance, and the seed of the examples' order.

    Raises:
        ValueError: As `Race` and `Confidence.add`.
    """
    n_arms, n_examples = values.shape
    order = np.random.default_rng(racing.seed).permutation(n_examples)
    race, start = Race(n_arms, n_examples, k, racing), 0
    while not race.done:
        race.add(values[race.running][:, order[start : start + racing.round_size]])
        start += racing.round_size
    return race.result()
