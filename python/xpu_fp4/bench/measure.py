# SPDX-License-Identifier: Apache-2.0
"""Times functions in alternation: what slows the machine down for a while slows all of them down."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Run = Callable[[], object]


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Job:
    """A function to time."""

    run: Run
    rest: Run = _nothing
    """Called after each sample: stops threads that would disturb the others."""


MIN_SAMPLE = 5e-3
"""Seconds of one sample, at least: as many calls as that needs, so that neither the clock nor one interrupt decides."""
MIN_SAMPLES, MAX_SAMPLES = 3, 25


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one figure per round."""

    samples: tuple[float, ...]
    calls: int
    """Calls in one sample."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.median


@dataclass
class Stopwatch:
    """What time it is, once the device has done its work."""

    clock: Callable[[], float] = time.perf_counter
    synchronize: Run = _nothing

    def time(self, run: Run, calls: int) -> float:
        self.synchronize()
        start = self.clock()
        for _ in range(calls):
            run()
        self.synchronize()
        return self.clock() - start


@dataclass
class _Plan:
    """How one function is sampled."""

    job: Job
    calls: int
    samples: int
    warm_up: bool
    times: list[float]


def _plan(job: Job, share: float, watch: Stopwatch) -> _Plan:
    single = watch.time(job.run, 1)  # allocations and caches
    if single < share:
        single = min(single, *(watch.time(job.run, 1) for _ in range(3)))
    job.rest()
    calls = max(1, math.ceil(MIN_SAMPLE / max(single, 1e-9)))
    # A call before each sample takes the caches and threads back from the function before. Long calls need none.
    warm_up = single < 20 * MIN_SAMPLE
    cost = single * (calls + warm_up)
    least = MIN_SAMPLES if single < share else 1
    samples = min(MAX_SAMPLES, max(least, int(share / cost)))
    return _Plan(job, calls, samples, warm_up, [])


def measure(jobs: Mapping[str, Job], seconds: float, watch: Stopwatch | None = None) -> dict[str, Timing]:
    """Times each job in rounds, one sample of each per round, the order turned by one each round.

    Each job has an equal share of `seconds`, which gives it MIN_SAMPLES to MAX_SAMPLES samples, and one if a call takes longer.
    """
    watch = watch or Stopwatch()
    plans = {name: _plan(job, seconds / len(jobs), watch) for name, job in jobs.items()}
    order = list(plans)
    for number in range(max((plan.samples for plan in plans.values()), default=0)):
        for plan in map(plans.__getitem__, order):
            if number < plan.samples:
                watch.time(plan.job.run, int(plan.warm_up))
                plan.times.append(watch.time(plan.job.run, plan.calls) / plan.calls)
                plan.job.rest()
        order.append(order.pop(0))
    return {name: Timing(tuple(plan.times), plan.calls) for name, plan in plans.items()}


def speedup(of: Timing, over: Timing) -> float:
    """How many times as fast `of` is: the median over the rounds that both took part in."""
    return statistics.median(slow / fast for fast, slow in zip(of.samples, over.samples, strict=False))
