"""Comparisons of groups of runs: paired differences over seeds, and corrected tests.

Student's distributions, central and noncentral, are computed from the regularised incomplete beta function.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from takd.study.collect import Group

LEVEL, POWER = 0.05, 0.8  # of two-sided tests


@dataclass(frozen=True)
class Difference:
    """One group minus another over the seeds that both have, in points."""

    mean: float
    deviation: float | None
    seeds: int
    p: float | None  # of a paired t-test over the seeds; with one seed, of a z-test under the sampling error alone
    sampling_error: float | None = None  # standard error that the number of test images gives it, with one seed

    @property
    def interval(self) -> tuple[float, float] | None:
        """The mean's 95 % confidence interval; None with one seed or no spread."""
        if not self.deviation:
            return None
        half = critical_t(self.seeds - 1) * self.deviation / math.sqrt(self.seeds)
        return self.mean - half, self.mean + half

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that the t-test finds at LEVEL with probability POWER, given this deviation."""
        return detectable_effect(self.seeds) * self.deviation if self.deviation else None


def difference(group: Group, reference: Group, which: str) -> Difference | None:
    """None if the two share no finished seed."""
    ours, theirs = group.values(which), reference.values(which)
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not pairs:
        return None
    found = paired(pairs)
    if len(pairs) > 1 or not group.test_images:
        return found
    both = [values[seed] for values in (ours, theirs) for seed in ours if seed in theirs]
    error = math.hypot(*(standard_error(percent, group.test_images) for percent in both))
    p = math.erfc(abs(pairs[0]) / error / math.sqrt(2)) if error else None
    return dataclasses.replace(found, p=p, sampling_error=error)


def paired(values: Iterable[float]) -> Difference:
    """Of one difference a seed, at least one."""
    pairs = [round(value, 9) for value in values]  # rounding errors are not spread
    mean, deviation = statistics.fmean(pairs), statistics.stdev(pairs) if len(pairs) > 1 else None
    p = t_test(mean / (deviation / math.sqrt(len(pairs))), len(pairs) - 1) if deviation else None
    return Difference(mean, deviation, len(pairs), p)


def holm(differences: Sequence[Difference | None]) -> list[float | None]:
    """p values of several tests, after Holm's correction for the family-wise error rate."""
    ranked = sorted((d.p, i) for i, d in enumerate(differences) if d and d.p is not None)
    corrected: list[float | None] = [None] * len(differences)
    highest = 0.0
    for rank, (p, i) in enumerate(ranked):
        highest = max(highest, min(1.0, p * (len(ranked) - rank)))
        corrected[i] = highest
    return corrected


def standard_error(percent: float, images: int) -> float:
    """Of an accuracy measured on this many test images, in points."""
    share = percent / 100
    return 100 * (share * (1 - share) / images) ** 0.5


# ------------------------------------------------------------------------------------------------ distributions
def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22, Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the complement converges faster
        return 1 - incomplete_beta(1 - x, b, a)
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = fraction
        for term in (even, odd):
            d, c = 1 / (1 + term * d or tiny), 1 + term / c or tiny
            fraction *= c * d
        if abs(fraction - before) <= 1e-15 * abs(fraction):
            break
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(scale) * fraction / a


def t_test(t: float, freedom: int) -> float:
    """The two-sided p value of a t statistic: P(|T| >= |t|)."""
    return incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


@functools.cache
def critical_t(freedom: int) -> float:
    """The t beyond which a two-sided test rejects at LEVEL."""
    low, high = 0.0, 1.0  # of freedom / (freedom + t^2), whose distribution is the beta's
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if incomplete_beta(middle, freedom / 2, 0.5) < LEVEL else (low, middle)
    return math.sqrt(freedom * (1 - middle) / middle)


def power(effect: float, seeds: int) -> float:
    """Probability that a two-sided paired t-test at LEVEL rejects, the true mean being `effect` standard deviations.

    Exact: t^2 has the noncentral F distribution, a Poisson mixture of beta distributions (Johnson et al., chapter 30).
    """
    freedom, rate = seeds - 1, seeds * effect**2 / 2
    share = critical_t(freedom) ** 2
    x = share / (freedom + share)
    accepted, last = 0.0, int(rate + 12 * math.sqrt(rate) + 40)
    for j in range(last):
        weight = math.exp(j * math.log(rate) - rate - math.lgamma(j + 1)) if rate else float(j == 0)
        accepted += weight * incomplete_beta(x, j + 0.5, freedom / 2)
    return 1 - accepted


@functools.cache
def detectable_effect(seeds: int) -> float:
    """The smallest effect, in standard deviations of the differences, that a paired t-test finds with POWER."""
    low, high = 0.0, 1.0
    while power(high, seeds) < POWER:
        high *= 2
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, seeds) < POWER else (low, middle)
    return high


def at_least(hits: int, chances: Sequence[float]) -> float:
    """P(at least so many of independent events happen), each having its own probability."""
    exactly = [1.0]
    for chance in chances:
        exactly = [a * (1 - chance) + b * chance for a, b in zip([*exactly, 0], [0, *exactly], strict=True)]
    return min(1.0, sum(exactly[hits:]))
