"""How far a number could be off, had the test set been drawn anew; and which changes are more.

intervals(partial(concept.summarize, units), len(units["found"]))
differences(partial(summarize, before), partial(summarize, after), count)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# From how often each unit counts to named numbers; every module's `summarize`, its units filled in.
Summarize = Callable[[np.ndarray], Mapping[str, float]]


@dataclass(frozen=True)
class Interval:
    """A number and the range that holds it with a given confidence.

    Args:
        value: On the units as they are.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How much a second result is above a first one on the same units.

    Args:
        first: Number of the first.
        second: Number of the second.
        low: Lower end of the difference.
        high: Upper end.
    """

    first: float
    second: float
    low: float
    high: float

    @property
    def value(self) -> float:
        """The second less the first."""
        return self.second - self.first

    @property
    def exceeds_noise(self) -> bool:
        """The interval of the difference leaves out zero."""
        return self.low > 0 or self.high < 0


def intervals(
    summarize: Summarize,
    count: int,
    *,
    samples: int = 1000,
    level: float = 0.95,
    groups: Sequence | np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of the bootstrap.

    Args:
        summarize: Takes the weight of each unit and returns the numbers.
        count: Number of units.
        samples: How often the units are drawn anew.
        level: Confidence of the intervals.
        groups: What each unit belongs to, such as its image or video. Groups are drawn as a whole,
            since what lies in one picture succeeds or fails together. None draws single units.
        seed: Of the draws: equal seeds draw equally.
    """
    values = summarize(np.ones(count))
    drawn = [summarize(weights) for weights in draws(count, samples, groups, seed)]
    return {
        name: Interval(float(value), *_ends([one[name] for one in drawn], level))
        for name, value in values.items()
    }


def differences(
    first: Summarize,
    second: Summarize,
    count: int,
    *,
    samples: int = 1000,
    level: float = 0.95,
    groups: Sequence | np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Difference]:
    """Intervals of the difference of two results on the same units in the same order.

    Both are drawn alike, so that what makes a unit hard for both cancels out: far smaller changes
    are seen than by looking whether two intervals overlap. Arguments as in `intervals`.
    """
    before, after = first(np.ones(count)), second(np.ones(count))
    names = [name for name in before if name in after]
    drawn: dict[str, list[float]] = {name: [] for name in names}
    for weights in draws(count, samples, groups, seed):
        one, other = first(weights), second(weights)
        for name in names:
            drawn[name].append(other[name] - one[name])
    return {
        name: Difference(float(before[name]), float(after[name]), *_ends(drawn[name], level))
        for name in names
    }


def draws(
    count: int, samples: int, groups: Sequence | np.ndarray | None = None, seed: int = 0
) -> Iterator[np.ndarray]:
    """How often each unit comes up when as many groups as there are get drawn with replacement."""
    if count < 1:
        raise ValueError("There is no unit to draw.")
    member_of = np.arange(count)
    if groups is not None:
        if len(groups) != count:
            raise ValueError(f"{len(groups)} groups named for {count} units.")
        member_of = np.unique(np.asarray(groups), return_inverse=True)[1]
    total = int(member_of.max()) + 1
    generator = np.random.default_rng(seed)
    for _ in range(samples):
        times = np.bincount(generator.integers(total, size=total), minlength=total)
        yield times[member_of].astype(np.float64)


def _ends(values: Sequence[float], level: float) -> tuple[float, float]:
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):  # undefined however the units are drawn
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
