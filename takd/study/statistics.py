"""Comparisons of groups of runs: paired differences over seeds, corrected tests, and the paper's rule of thumb."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from takd.study.collect import Group, Study


@dataclass(frozen=True)
class Difference:
    """One group minus another over the seeds that both have, in points."""

    mean: float
    deviation: float | None
    seeds: int
    p: float | None  # of a paired t-test; None with one seed or no spread


def difference(group: Group, reference: Group, which: str) -> Difference | None:
    """None if the two share no finished seed."""
    ours, theirs = group.values(which), reference.values(which)
    pairs = [round(ours[seed] - theirs[seed], 9) for seed in ours if seed in theirs]  # rounding errors are not spread
    if not pairs:
        return None
    deviation = statistics.stdev(pairs) if len(pairs) > 1 else None
    p = None
    if deviation:
        from scipy.special import stdtr  # Student's distribution; scipy.stats takes a second to import

        t = statistics.fmean(pairs) / (deviation / len(pairs) ** 0.5)
        p = float(2 * stdtr(len(pairs) - 1, -abs(t)))
    return Difference(statistics.fmean(pairs), deviation, len(pairs), p)


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


def rule_of_thumb(found: Study) -> tuple[float, dict[str, float], str] | None:
    """(mean of teacher and student alone, {assistant: its own accuracy}, the nearest), or None where one is missing."""
    own = {network: value for network in found.sizes if (value := found.mean((network,))) is not None}
    if found.teacher not in own or found.student not in own:
        return None
    middle = (own[found.teacher] + own[found.student]) / 2
    tried = {path[1] for path in found.ends if len(path) == 3}
    assistants = {network: own[network] for network in found.sizes[1:-1] if network in own and network in tried}
    if not assistants:
        return None
    return middle, assistants, min(assistants, key=lambda network: abs(assistants[network] - middle))
