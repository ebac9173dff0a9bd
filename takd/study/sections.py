"""The sections of a report over runs, as blocks of a Document: the answer first, then tables and figures."""

from collections.abc import Iterator, Mapping, Sequence

from takd.config import names
from takd.config.names import DATASETS
from takd.run.console import duration
from takd.study import collect, figures, statistics
from takd.study.collect import Group, Run, Study
from takd.study.document import Document
from takd.study.formatting import p_value, percent, points, recipe_of, seeds_of, settings_of
from takd.study.plan import NetworkPath, arrows
from takd.study.ranking import Search
from takd.study.statistics import Difference

Published = Mapping[NetworkPath, Mapping[str, float]]


# -------------------------------------------------------------------------------------------------- a path study
def study_section(document: Document, found: Study, only: bool) -> None:
    """Everything about one study. `only`: there is no other in this document."""
    best, slug = found.best(), "-".join(map(names.file_name, (found.teacher, found.student, found.dataset)))
    document.heading(found.title if only or not found.folder else f"{found.title} ({found.folder})", 1 if only else 2)
    document.text(*lead(found, best))
    published = {
        path: collect.published_for(found.dataset, path, found.cells[path].method if path in found.cells else "kd")
        for path in {*found.cells, *found.planned}
        if found.guidance == "last" or len(path) < 3
    }
    paper = {path: cells["paper"] for path, cells in published.items() if "paper" in cells}
    beside = " and the paper's number" if paper else ""
    caption = (
        "Every path, as in figure 5 of the paper: test accuracy at the best epoch in percent, the mean over seeds with "
        f"its standard deviation{beside} below. The best path is marked; dashed ones are not finished."
    )
    document.figure(f"figures/{slug}-paths", figures.paths(found, paper), caption)
    document.heading("All paths", 3)
    cited = [entry["source"] for entry in collect.published()]
    sources = [source for source in dict.fromkeys(cited) if any(source in cells for cells in published.values())]
    ranked = sorted(found.ends, key=lambda path: -(found.mean(path) or -1))
    shown = dict.fromkeys([*ranked, (found.student,), (found.teacher,)])
    rows = [path_row(found, path, published, sources) for path in shown]
    header = ["path", "settings", "seeds", "best epoch, %", "last epoch, %", *sources]
    document.table(header, rows, mark=0 if best else None)
    comparison(document, found)
    if best:
        drawn = figures.assistants(found, paper)
        document.figure(f"figures/{slug}-assistants", drawn, f"The effect of assistants on {found.student}.")
        rule(document, found)
    between = [path for path in [*found.cells, *found.planned] if path[-1] not in (found.student, found.teacher)]
    ordered = sorted(dict.fromkeys(between), key=lambda path: (found.sizes.index(path[-1]), -(found.mean(path) or -1)))
    document.heading("Intermediate networks", 3)
    document.table(["network", *header], [[path[-1], *path_row(found, path, published, sources)] for path in ordered])
    if any(run.records for group in found.cells.values() for run in group.runs):
        caption = "Learning curves on the test images; lines are means over the seeds so far."
        document.figure(f"figures/{slug}-curves", figures.curves(found), caption)
    citations(document, "Published numbers:", found.dataset, sources)


def path_row(found: Study, path: NetworkPath, published: Published, sources: Sequence[str]) -> list[str]:
    group = found.cells.get(path)
    if len(path) > 1:
        name = found.short(path) + (" (BLKD)" if path == (found.teacher, found.student) else "")
    else:
        role = " (NOKD)" if path[0] == found.student else " (teacher)" if path[0] == found.teacher else ""
        name = f"{path[0]} alone{role}"
    if not (group and group.finished):
        progress = ", ".join(f"seed {run.seed} {run.progress}" for run in group.runs) if group else ""
        name += f", not finished: {progress}" if group else ", not begun"
    cells = [percent(group.mean(which), group.deviation(which)) for which in collect.OUTCOMES] if group else ["", ""]
    theirs = [percent(published.get(path, {}).get(source)) for source in sources]
    return [name, settings_of(group) if group else "", seeds_of(group, found.planned.get(path, 0)), *cells, *theirs]


def citations(document: Document, lead_in: str, dataset: str, sources: Sequence[str]) -> None:
    entries = [entry for entry in collect.published() if entry["source"] in sources and entry["dataset"] == dataset]
    if entries:
        document.text(lead_in, "; ".join(sorted({f"{entry['source']}: {entry['title']}" for entry in entries})) + ".")


def lead(found: Study, best: NetworkPath | None) -> Iterator[str]:
    """The best path first, then how complete the study is."""
    total = sum(found.planned.values()) or sum(len(group.runs) for group in found.cells.values())
    done = sum(len(group.finished) for group in found.cells.values())
    if best is None:
        yield f"No path to {found.student} is finished yet."
    else:
        group = found.cells[best]
        mean = percent(found.mean(best), group.deviation("best"))
        yield f"The best path is {arrows(best)}: {mean} % at its best epoch"
        yield f"(mean of {len(group.finished)} seeds)." if len(group.finished) > 1 else "(one seed)."
        direct, alone = found.mean((found.teacher, found.student)), found.mean((found.student,))
        others = {"directly from the teacher": direct if len(best) > 2 else None, "alone": alone}
        if known := ", ".join(f"{how} {value:.2f} %" for how, value in others.items() if value is not None):
            yield f"For comparison, {found.student} {known}."
        if alone is not None and alone >= (found.mean(best) or 0):
            yield "No path is better than training alone."
    if done < total:
        yield f"This report is partial: {done} of {total} trainings are finished; unfinished ones are marked."
    configs = [group.config for group in found.cells.values()]
    if any(not config["validation_split"] for config in configs):
        yield "The best epoch was chosen on the test images, as in the paper, so its numbers are optimistic;"
        yield "those of the last epoch are not."
    lengths = " or ".join(map(str, sorted({config["epochs"] for config in configs})))
    yield f"Recipe {', '.join(sorted({config['recipe'] for config in configs}))}, {lengths} epochs."
    if found.ambiguous:
        ambiguous = ", ".join(dict.fromkeys(map(found.short, found.ambiguous)))
        yield f"Paths with several settings: {ambiguous}; the one with most finished seeds, then the best, is shown;"
        yield "the leaderboard has them all."
    if len(set(map(names.family, found.sizes))) > 1:
        yield "The sizes are of several families."


def comparison(document: Document, found: Study) -> None:
    """Differences from direct distillation and from training alone, with a paired test over seeds."""
    references = {"BLKD": (found.teacher, found.student), "NOKD": (found.student,)}
    have = {name: path for name, path in references.items() if path in found.cells and found.cells[path].finished}
    paths = sorted(
        (path for path in found.ends if found.mean(path) is not None), key=lambda p: found.mean(p) or 0, reverse=True
    )
    if not have or not paths:
        return
    document.heading("Against direct distillation (BLKD) and training alone (NOKD)", 3)
    for which in collect.OUTCOMES:
        header, rows = [f"path, {which} epoch"], [[found.short(path)] for path in paths]
        sentences: list[str] = []
        for name, reference in have.items():
            members = [
                None if path == reference else statistics.difference(found.cells[path], found.cells[reference], which)
                for path in paths
            ]
            corrected = statistics.holm(members)
            header += [f"against {name}, points", f"against {name}: p"]
            for row, difference, p in zip(rows, members, corrected, strict=True):
                spread = f" ± {difference.deviation:.2f}" if difference and difference.deviation is not None else ""
                row += [points(difference.mean) + spread if difference else "", p_value(p)]
            sentences += verdict(found, name, paths, members, corrected)
        document.table(header, rows)
        document.text(f"At the {which} epoch:", *sentences)
    if max(len(found.cells[path].finished) for path in paths) < 2:
        images = DATASETS[found.dataset].test_images if found.dataset in DATASETS else None
        error = statistics.standard_error(found.mean(paths[0]) or 0, images) if images else 0
        document.text(
            "With one seed no test across seeds is possible, and no difference here can be told from the noise between",
            "seeds.",
            f"The {images:,} test images alone give an accuracy a standard error of {error:.2f} points."
            if images
            else "",
        )
    else:
        document.text(
            "p is that of a paired t-test over the seeds, with Holm's correction for the number of paths compared;",
            "below 0.05 a difference counts as more than noise. With few seeds the test has little power: absence of",
            "evidence is not evidence of absence.",
        )


def verdict(
    found: Study,
    name: str,
    paths: Sequence[NetworkPath],
    members: Sequence[Difference | None],
    corrected: Sequence[float | None],
) -> Iterator[str]:
    """Plain sentences on one reference."""
    what = {"BLKD": "direct distillation", "NOKD": "training alone"}[name]
    tested = [
        (found.short(path), d, p) for path, d, p in zip(paths, members, corrected, strict=True) if d and p is not None
    ]
    better = [path for path, d, p in tested if p < 0.05 and d.mean > 0]
    worse = [path for path, d, p in tested if p < 0.05 and d.mean < 0]
    known = [d for d in members if d]
    if not known:
        return
    if not tested:
        above, seeds = sum(d.mean > 0 for d in known), "one seed" if known[0].seeds == 1 else "these seeds"
        yield f"{above} of {len(known)} paths are above {what}, which {seeds} cannot tell from noise."
        return
    if better:
        yield f"Better than {what} by more than the noise between seeds: {', '.join(better)}."
    if worse:
        yield f"Worse than {what} by more than the noise between seeds: {', '.join(worse)}."
    if not better and not worse:
        yield f"No path differs from {what} by more than the noise between seeds."
    elif len(better) + len(worse) < len(tested):
        yield f"The other {len(tested) - len(better) - len(worse)} do not differ from it by more than the noise."


def rule(document: Document, found: Study) -> None:
    """The paper's rule of thumb beside what was measured."""
    if not (known := statistics.rule_of_thumb(found)):
        return
    middle, own, nearest = known
    after = {network: found.mean((found.teacher, network, found.student)) for network in own}
    reached = {network: value for network, value in after.items() if value is not None}
    if not reached:
        return
    measured = max(reached, key=lambda network: reached[network])
    document.heading("The paper's rule of thumb", 3)
    agrees = "It is indeed" if measured == nearest else f"But {measured} is"
    document.text(
        "The best single assistant should be the one whose own accuracy is nearest the mean of teacher and student,",
        f"here {middle:.2f} %:",
        f"{nearest} with {own[nearest]:.2f} %. {agrees} the one with the best student, {reached[measured]:.2f} %.",
    )
    rows = [
        [network, percent(own[network]), f"{abs(own[network] - middle):.2f}", percent(after[network])]
        for network in own
    ]
    header = ["assistant", "alone, %", "from the mean, points", f"{found.student} after it, %"]
    document.table(header, rows, mark=list(own).index(nearest))


# ----------------------------------------------------------------------------------------------------- a search
def search_section(document: Document, found: Search, only: bool) -> None:
    """The ranking of a search's settings, the best one's command, and accuracy over T for each lambda."""
    path, dataset = found.groups[0].path, found.groups[0].config["dataset"]
    title = f"Search of {arrows(path)} on {dataset}"
    document.heading(title if only else f"{title} ({found.folder})", 1 if only else 2)
    header, rows = found.table()
    if best := found.best:
        values = ", ".join(
            f"{name} {value}" for name, value in zip(header, rows[0][: len(found.searched)], strict=False)
        )
        judged = percent(best.mean("selection"), best.deviation("selection"))
        many = f"mean of {len(best.finished)} seeds" if len(best.finished) > 1 else "one seed"
        document.text(
            f"The best setting is {values or 'the only one'}: {judged} % on the {found.selection} images ({many})."
        )
        if found.selection == "test":
            document.text(
                "Settings and epochs were chosen on the test images, so the best one's accuracy is too high;",
                "--validation-split holds training images out for the choice.",
            )
        document.text("The command of its first run:")
        document.code(found.command)
    document.heading("All settings", 3)
    document.table(header, rows, mark=0 if best else None)
    if best and "temperature" in found.searched:
        caption = f"Accuracy on the {found.selection} images, means over seeds with their deviations."
        document.figure(f"figures/{names.file_name(path[-1])}-{dataset}-search", figures.search(found), caption)


# ------------------------------------------------------------------------------------------------ leaderboard
def leaderboard(document: Document, groups: Sequence[Group]) -> None:
    """Every group of seeds, best first, one table per data set."""
    document.heading("Leaderboard")
    for dataset in dict.fromkeys(group.config["dataset"] for group in groups):
        members = ranked([group for group in groups if group.config["dataset"] == dataset])
        rows, cited, ranks = [], [], dict.fromkeys((group.path[-1] for group in members), 0)
        for group in members:
            network, theirs = group.path[-1], collect.published_for(dataset, group.path, group.method)
            ranks[network] += 1
            cited += list(theirs)
            outcomes = [percent(group.mean(which), group.deviation(which)) for which in collect.OUTCOMES]
            learned = [
                arrows(group.path[:-1]) or "labels",
                group.method or "",
                settings_of(group),
                recipe_of(group),
                seeds_of(group),
            ]
            seconds = "" if group.epoch_seconds is None else f"{group.epoch_seconds:.1f}"
            numbers = ", ".join(f"{value:.2f} ({source})" for source, value in theirs.items())
            rows.append([network, str(ranks[network]) if group.finished else "", *learned, *outcomes, seconds, numbers])
        header = [
            "network",
            "rank",
            "learned from",
            "method",
            "settings",
            "recipe, epochs",
            "seeds",
            "best, %",
            "last, %",
        ]
        document.heading(dataset, 3)
        document.table([*header, "s per epoch", "published"], rows)
        lead_in = "Published, of the same data set, path and method, but each with its own recipe:"
        citations(document, lead_in, dataset, cited)


def ranked(groups: Sequence[Group]) -> list[Group]:
    """Networks in the order of their best rows, and each network's rows best first."""
    top = {group.path[-1]: 0.0 for group in groups}
    for group in groups:
        top[group.path[-1]] = max(top[group.path[-1]], group.mean("best") or 0)
    return sorted(groups, key=lambda group: (-top[group.path[-1]], group.path[-1], -(group.mean("best") or -1)))


def compact_table(groups: Sequence[Group]) -> Document:
    """One table of finished groups, for a README: accuracies, the paper's number, and the mean minutes of a run."""
    document, rows = Document(""), []
    for group in ranked([group for group in groups if group.finished]):
        paper = collect.published_for(group.config["dataset"], group.path, group.method).get("paper")
        minutes = sum(run.seconds for run in group.finished.values()) / len(group.finished) / 60
        outcomes = [percent(group.mean(which), group.deviation(which)) for which in collect.OUTCOMES]
        path = arrows(group.path) + (" alone" if len(group.path) == 1 else "")
        options = f" ({settings_of(group)})" if group.options else ""
        method = f"{group.method}{options}" if group.method else ""
        rows.append(
            [
                path,
                method,
                recipe_of(group),
                seeds_of(group),
                *outcomes,
                percent(paper),
                f"{minutes:.{minutes < 10:d}f}",
            ]
        )
    document.table(
        ["network", "method", "recipe, epochs", "seeds", "best epoch, %", "last epoch, %", "paper", "minutes"], rows
    )
    return document


def cost_section(document: Document, runs: Sequence[Run], price: float | None) -> None:
    document.heading("Time, cost and environment")
    seconds = sum(run.seconds for run in runs)
    spent = f", {price * seconds / 3600:.2f} at {price:g} an hour" if price is not None else ""
    finished = sum(run.finished for run in runs)
    document.text(
        f"{len(runs)} run{'s' * (len(runs) != 1)}, {finished} finished: {duration(seconds)} of training and evaluation "
        f"({seconds / 3600:.2f} device hours{spent}), without start-up and the teachers' tables."
    )
    shown = ("device", "threads", "precision", "torch", "python", "host", "commit")
    places: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        environment = run.config["environment"]
        commit = str(environment.get("commit") or "")
        short = commit[:10] + " (changed)" * commit.endswith("(changed)")
        place = tuple(str(environment.get(key) or "") for key in shown[:-1])
        places.setdefault((*place, short), []).append(run)
    rows = [
        [*place, str(len(members)), duration(sum(run.seconds for run in members))] for place, members in places.items()
    ]
    document.table([*shown, "runs", "time"], rows)
    by_network: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.records:
            by_network.setdefault((run.config["dataset"], run.path[-1]), []).append(run)
    order = {name: place for place, name in enumerate(names.NETWORKS)}
    rows = []
    for dataset, network in sorted(by_network, key=lambda key: (key[0], order.get(key[1], len(order)), key[1])):
        members = by_network[dataset, network]
        epochs = sum(len(run.records) for run in members)
        rows.append([dataset, network, str(epochs), f"{sum(run.seconds for run in members) / epochs:.1f}"])
    document.table(["data set", "network", "epochs trained", "seconds per epoch"], rows)
