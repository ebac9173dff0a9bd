"""Comparisons in a report: tables of differences from references, and the sentences that follow from them.

With several seeds a paired test over these decides, with one seed the sampling error of the test images.
"""

from collections.abc import Iterator, Mapping, Sequence

from takd.study import collect, statistics
from takd.study.collect import Group
from takd.study.document import Document
from takd.study.formatting import p_value, points, seeds_text
from takd.study.statistics import Difference

SAMPLING, SEEDS = "the sampling error of the test images", "the noise between seeds"


def seeds_sentence(groups: Sequence[Group]) -> str:
    """What comparisons are made over, where groups have unequal seeds."""
    groups = [group for group in groups if group.finished]
    common = collect.seeds_in_common(groups)
    if all(set(group.finished) == common for group in groups):
        return ""
    if not common:
        return "They have no seed in common, so each mean is over other seeds, and differences are not tested."
    return f"Comparisons are over what all of these have finished: {seeds_text(common)}."


def comparison(document: Document, kind: str, cells: Mapping[str, Group], references: Mapping[str, Group]) -> None:
    """Differences of groups, best first, from each reference: with several seeds a paired test over these, with one
    the sampling error of the test images. All cells have the same seeds; a reference may have fewer."""
    differences: list[Difference] = []
    for which in collect.OUTCOMES:
        header, rows = [f"{kind}, {which} epoch"], [[name] for name in cells]
        sentences: list[str] = []
        for name, reference in references.items():
            members = [
                statistics.difference(cell, reference, which) if cell.runs != reference.runs else None
                for cell in cells.values()
            ]
            corrected = statistics.holm(members)
            shared = collect.seeds_in_common([*cells.values(), reference])
            over = f", {seeds_text(shared)}" if shared != collect.seeds_in_common(cells.values()) else ""
            header += [f"against {name}{over}, points", f"against {name}: p"]
            for row, difference, p in zip(rows, members, corrected, strict=True):
                row += [_difference(difference), p_value(p)]
            differences += [difference for difference in members if difference]
            sentences += verdict(name, kind, list(cells), members, corrected)
        if len(rows) > 1:
            document.table(header, [row for row in rows if any(row[1:])])
        if sentences:
            document.text(f"At the {which} epoch:", *sentences)
    document.text(*_explained(differences))


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return points(difference.mean, difference.sampling_error if difference.deviation is None else difference.deviation)


def _explained(differences: Sequence[Difference]) -> Iterator[str]:
    """What ± and p are, of those that the tables have."""
    tested = [difference for difference in differences if difference.p is not None]
    if not tested:
        return
    if any(difference.seeds == 1 for difference in tested):
        yield "With one seed, ± is the standard error that the number of test images gives a difference of two"
        yield "accuracies, and p that of a z-test under this error alone, with Holm's correction for the number of"
        yield "comparisons; below 0.05 a difference counts as more than sampling error. How much another seed would"
        yield "change it, only more seeds can tell."
    if any(difference.seeds > 1 for difference in tested):
        yield "With several seeds, ± is the standard deviation over them and p that of a paired t-test, with Holm's"
        yield "correction for the number of comparisons; below 0.05 a difference counts as more than noise. With few"
        yield "seeds the test has little power: absence of evidence is not evidence of absence."


def verdict(
    name: str, kind: str, cells: Sequence[str], members: Sequence[Difference | None], corrected: Sequence[float | None]
) -> Iterator[str]:
    """Plain sentences on one reference."""
    what = {"BLKD": "direct distillation", "NOKD": "training alone"}.get(name, name)
    known = [(cell, d, p) for cell, d, p in zip(cells, members, corrected, strict=True) if d]
    tested = [(cell, d, p) for cell, d, p in known if p is not None]
    if not known:
        return
    if not tested:
        above = sum(d.mean > 0 for _, d, _ in known)
        yield f"{above} of {len(known)} {kind}s {'is' if above == 1 else 'are'} above {what};"
        yield "nothing here tells that from noise."
        return
    one = tested[0][1].seeds == 1
    noise = SAMPLING if one else SEEDS
    if len(known) == 1:
        cell, d, p = tested[0]
        more = "which is more" if p < 0.05 else "which is not more"
        yield f"{cell} is {_difference(d)} points against {what} (p {p_value(p)}), {more} than {noise}."
        return
    better = [cell for cell, d, p in tested if p < 0.05 and d.mean > 0]
    worse = [cell for cell, d, p in tested if p < 0.05 and d.mean < 0]
    if len(better) == len(known):
        yield f"All {len(better)} {kind}s are better than {what} by more than {noise}."
    elif better:
        yield f"Better than {what} by more than {noise}: {', '.join(better)}."
    if worse:
        yield f"Worse than {what} by more than {noise}: {', '.join(worse)}."
    if not better and not worse:
        yield f"No {kind} differs from {what} by more than {noise}."
    elif rest := len(tested) - len(better) - len(worse):
        yield f"The other {rest} do not differ from it by more than that." if rest > 1 else "The other one does not."
