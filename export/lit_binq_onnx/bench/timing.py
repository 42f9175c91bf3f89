"""Timing several candidates so that noise hits all alike: they take turns, and what is reported is a median."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements and what half of them lie between.

    Attributes:
        median: as said.
        low: the first quartile.
        high: the third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Of one sample or more, in its unit; quartiles are interpolated linearly."""
        low, median, high = np.quantile(np.asarray(samples, np.float64), [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high)

    @classmethod
    def of_rates(cls, amount: float, seconds: Sequence[float]) -> Self:
        """Of amount / seconds."""
        return cls.of([amount / max(s, 1e-12) for s in seconds])


def alternate(
    candidates: Mapping[Name, Callable[[], Any]],
    *,
    rounds: int,
    warmup: int = 1,
    pause: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Seconds of every candidate in every round.

    In a round each candidate runs once. The order changes from round to round (a later one starts further on, every
    second one is reversed), so that nobody always follows the same neighbour or always meets the same moment of a
    periodic disturbance.

    Args:
        candidates: what to time, by name. A candidate that returns a float has timed itself: that many seconds
            count instead of the clock's.
        rounds: at least 1.
        warmup: rounds before, not counted.
        pause: seconds of sleep before each run, within which idle threads of the one before stop spinning.
        clock: in seconds.

    Returns:
        {name: seconds}, `rounds` of them, in the order of the rounds: entry i of all candidates was measured in the
        same round.
    """
    names = list(candidates)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        first = number % len(names) if names else 0
        order = [*names[first:], *names[:first]]
        for name in order if number % 2 == 0 else reversed(order):
            if pause:
                time.sleep(pause)
            began = clock()
            own = candidates[name]()
            spent = clock() - began
            if number >= warmup:
                seconds[name].append(own if isinstance(own, float) else spent)
    return seconds
