"""The sections of a report over runs, as blocks of a Document: the answer first, then tables and figures."""

import statistics as means
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from takd.config import names
from takd.run.console import duration
from takd.study import collect, figures, published, statistics
from takd.study.collect import Group, Run, Study
from takd.study.comparisons import comparison, seeds_sentence
from takd.study.document import Document
from takd.study.formatting import (
    learned_from,
    listed,
    method_of,
    outcome,
    percent,
    points,
    recipe_of,
    recipes_of,
    seeds_of,
    seeds_text,
)
from takd.study.pairs import Table
from takd.study.plan import NetworkPath, arrows
from takd.study.ranking import Search


# -------------------------------------------------------------------------------------------------- a path study
def study_section(document: Document, found: Study, only: bool) -> None:
    """Everything about one study. `only`: there is no other in this document."""
    best = found.best()
    slug = "-".join(map(names.file_name, (found.teacher, found.student, found.dataset.split()[0])))
    document.heading(found.title if only or not found.folder else f"{found.title} ({found.folder})", 1 if only else 2)
    document.text(*lead(found, best))
    paper = published.papers(found)
    document.figure(f"figures/{slug}-paths", figures.paths(found, paper), paths_caption(found, bool(paper)))
    document.heading("All paths", 3)
    ranked = sorted(found.ends, key=lambda path: -(found.mean(path) or -1))
    shown = dict.fromkeys([*ranked, (found.student,), (found.teacher,)])
    path_table(document, found, list(shown), paper, mark=0 if best else None)
    failures(document, [f"{arrows(path)}, seed {seed}: {why}" for (path, seed), why in found.failed.items()])
    cells = {found.short(path): cell for path in ranked if (cell := found.cell(path)) and cell.finished}
    references = {"BLKD": (found.teacher, found.student), "NOKD": (found.student,)}
    known = {name: cell for name, path in references.items() if (cell := found.cell(path)) and cell.finished}
    if not alone_seeds(found):
        known.pop("NOKD", None)
    if found.seeds and cells and known and (len(cells) > 1 or "NOKD" in known):
        document.heading("Against direct distillation (BLKD) and training alone (NOKD)", 3)
        comparison(document, "path", cells, known)
    if best and any(len(path) > 2 and found.mean(path) is not None for path in found.ends):
        drawn = figures.assistants(found, paper)
        document.figure(f"figures/{slug}-assistants", drawn, f"The effect of assistants on {found.student}.")
    between = [path for path in [*found.cells, *found.planned] if path[-1] not in (found.student, found.teacher)]
    ordered = sorted(dict.fromkeys(between), key=lambda path: (found.sizes.index(path[-1]), -(found.mean(path) or -1)))
    if between:
        document.heading("Intermediate networks", 3)
        path_table(document, found, ordered, paper, network=True)
    if any(run.records for group in found.cells.values() for run in group.runs):
        caption = "Learning curves: accuracy by epoch; lines are means over the seeds so far."
        document.figure(f"figures/{slug}-curves", figures.curves(found), caption)


def paths_caption(found: Study, paper: bool) -> str:
    """What figures.paths shows of this study."""
    several = any(len(group.finished) > 1 for group in found.cells.values())
    nodes = [path[: i + 1] for path in (*found.rows, *zip(found.sizes, strict=True)) for i in range(len(path))]
    unfinished = any(not (cell := found.cell(node)) or cell.mean("best") is None for node in nodes)
    below = ["the standard deviation"] * several + ["the paper's number"] * paper
    return (
        "Every path, as in figure 5 of the paper: test accuracy at the best epoch in percent"
        f"{', the mean over seeds' * several}{', with ' * bool(below)}{' and '.join(below)}{' below' * bool(below)}. "
        f"The best path is marked{'; dashed ones are not finished' * unfinished}."
    )


def selection_sentence(groups: Iterable[Group]) -> str:
    """What is to be said where the best epoch was chosen on the images that it is scored on."""
    runs = [run for group in groups for run in group.runs if run.selection == "test"]
    if not runs:
        return ""
    chosen = f"The best epoch was chosen on the {runs[0].test_split} images, as in the paper, so its numbers are"
    return f"{chosen} optimistic; those of the last epoch are not."


def path_table(
    document: Document,
    found: Study,
    paths: Sequence[NetworkPath],
    paper: Mapping[NetworkPath, float],
    mark: int | None = None,
    network: bool = False,
) -> None:
    """A row a path that was run or planned: means over its own seeds and, where seeds are unequal, over those in
    common. `network`: a column with its last network."""
    paths = [path for path in paths if path in found.cells or path in found.planned]
    groups = [found.cells[path] for path in paths if path in found.cells]
    recipes = dict(zip(map(id, groups), recipes_of(groups), strict=True))
    recipes = recipes if len(set(recipes.values())) > 1 else {}
    ends = [found.cells[path] for path in found.ends if path in found.cells]
    unequal = bool(found.seeds) and any(set(group.finished) - found.seeds for group in ends)
    rows = []
    for path in paths:
        group = found.cells.get(path)
        outcomes = [outcome(group, which) for which in collect.OUTCOMES] if group else ["", ""]
        row = [path[-1]] if network else []
        row += [found.short(path) if len(path) > 1 else f"{path[0]} alone"]
        row[-1] += _role(found, path) + _state(found, path)
        row += [method_of(group), recipes.get(id(group), "")] if group else ["", ""]
        common = percent(found.mean(path)) if unequal and group and found.seeds <= set(group.finished) else ""
        row += [seeds_of(group, found.planned.get(path, 0)), *outcomes, common]
        rows.append([*row, published.paper_number(paper.get(path), group.mean("best") if group else None)])
    header = ["network"] if network else []
    header += ["path", "method", "recipe, epochs", "seeds", "best epoch, %", "last epoch, %"]
    document.table([*header, f"best, {seeds_text(found.seeds)}, %" if unequal else "", "paper"], rows, mark=mark)


def _role(found: Study, path: NetworkPath) -> str:
    roles = {(found.teacher, found.student): " (BLKD)", (found.student,): " (NOKD)", (found.teacher,): " (teacher)"}
    return roles.get(path, "")


def _state(found: Study, path: NetworkPath) -> str:
    """What a row says of a path without a finished run."""
    group = found.cells.get(path)
    if group and group.finished:
        return ""
    if any(path == failed for failed, _ in found.failed):
        return ", failed"
    if not group:
        return ", not begun"
    return f", not finished: {', '.join(f'seed {run.seed} {run.progress}' for run in group.runs)}"


def failures(document: Document, failed: Sequence[str]) -> None:
    if failed:
        document.text(f"Failed: {'; '.join(failed)}.")


def lead(found: Study, best: NetworkPath | None) -> Iterator[str]:
    """The best path first, then how complete the study is."""
    total = sum(found.planned.values()) or sum(len(group.runs) for group in found.cells.values())
    done = sum(len(group.finished) for group in found.cells.values())
    group = found.cell(best) if best else None
    if best is None or group is None:
        yield f"No path to {found.student} is finished yet."
    else:
        yield f"The best path is {arrows(best)}: {outcome(group, 'best')} % at its best"
        seeds, images = seeds_text(group.finished), group.test_images
        if len(group.finished) > 1:
            seeds = f"mean of {seeds}"
        elif images and (error := statistics.standard_error(group.mean("best") or 0, images)):
            seeds += f"; {images:,} test images give it a standard error of {error:.2f} points"
        yield f"epoch ({seeds})."
        trained, shared = found.cells.get((found.student,)), alone_seeds(found)
        equal = shared == found.seeds
        direct, alone = found.mean((found.teacher, found.student)), found.mean((found.student,))
        others = {"directly from the teacher": direct if len(best) > 2 else None, "alone": alone if equal else None}
        if known := ", ".join(f"{how} {value:.2f} %" for how, value in others.items() if value is not None):
            yield f"For comparison, {found.student} {known}."
        if trained and shared:
            level = trained.over(shared).mean("best") or 0
            ends = [found.cells[path] for path in found.ends if path in found.cells and found.cells[path].finished]
            gains = {end.path: (end.over(shared).mean("best") or 0) - level for end in ends}
            if not equal:
                gain = points(gains[found.cells[best].path])
                yield f"Over {seeds_text(shared)}, which {found.student} alone has too, it is {gain} points"
                yield f"against training alone ({percent(level)} %)."
            if max(gains.values()) <= 0:
                yield "No path is better than training alone."
        yield seeds_sentence([found.cells[path] for path in found.ends if path in found.cells])
    if done < total:
        marked = "failed and unfinished ones are marked" if found.failed else "unfinished ones are marked"
        yield f"This report is partial: {done} of {total} trainings are finished; {marked}."
    yield selection_sentence(found.cells.values())
    configs = [group.config for group in found.cells.values()]
    lengths = " or ".join(map(str, sorted({config["epochs"] for config in configs})))
    yield f"Recipe {', '.join(sorted({config['recipe'] for config in configs}))}, {lengths} epochs."
    if found.ambiguous:
        ambiguous = ", ".join(dict.fromkeys(map(found.short, found.ambiguous)))
        yield f"Paths with several settings: {ambiguous}; the one with most finished seeds, then the best, is shown;"
        yield "the leaderboard has them all."
    if len(set(map(names.family, found.sizes))) > 1:
        yield "The sizes are of several families."


def alone_seeds(found: Study) -> set[int]:
    """Of the seeds that paths are compared over, those that the student alone has finished too."""
    alone = found.cells.get((found.student,))
    return found.seeds & set(alone.finished) if alone else set()


# -------------------------------------------------------------------------------------------- methods side by side
def methods_section(document: Document, table: Table, only: bool) -> None:
    """Methods in rows and pairs of networks in columns, then every method's accuracy by epoch."""
    pairs = table.pairs
    title = f"Methods: {pairs[0].name}" if len(pairs) == 1 else "Methods"
    document.heading(title, 1 if only else 2)
    groups = [group for pair in pairs for group in pair.rows.values()]
    splits = listed(sorted({run.test_split for group in groups for run in group.runs}))
    with_base = any("base" in pair.cells for pair in pairs)
    document.text(
        f"Recipe and epochs: {listed(sorted({recipe_of(group) for group in groups}))}.",
        f"{splits.capitalize()} accuracy in percent, means over seeds with their standard deviations.",
        f"Seeds of each: {table.seeds[0]}." if len(table.seeds) == 1 else "",
        "In brackets the difference from base, ordinary training with the labels." if with_base else "",
        *(f"{pair.name}: {sentence}" for pair in pairs if (sentence := seeds_sentence(list(pair.rows.values())))),
        *(pair.teacher_sentence for pair in pairs),
        selection_sentence(groups),
    )
    for which in collect.OUTCOMES:
        document.table(*method_rows(table, which), mark=table.methods.index(table.best))
    slug = "-".join(pairs[0].path)
    caption = f"{splits.capitalize()} accuracy of all methods by epoch, means over seeds."
    document.figure(f"figures/{slug}-{pairs[0].dataset.split()[0]}-methods", figures.methods(table), caption)
    for pair in pairs:
        cells = {name: pair.cells[name] for name in table.methods if name in pair.cells and name != "base"}
        if cells and "base" in pair.cells:
            document.heading(f"Against base: {pair.name}", 3)
            comparison(document, "method", cells, {"base": pair.cells["base"]})


def method_rows(table: Table, which: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean, difference from base and seeds for each pair; the average of rows that have all pairs."""
    bases = [pair.cells["base"].mean(which) or 0 if "base" in pair.cells else None for pair in table.pairs]
    rows, unequal = [], len(table.seeds) > 1
    for name in table.methods:
        groups = [pair.cells.get(name) for pair in table.pairs]
        values = [group.mean(which) or 0 if group else None for group in groups]
        row = [name]
        for pair, group, value, base in zip(table.pairs, groups, values, bases, strict=True):
            shown = outcome(group, which) if group else ""
            row += [shown + _gain(value, base, name), seeds_of(pair.rows[name]) if group and unequal else ""]
        average, of_base = (_average(column) if len(column) > 1 else None for column in (values, bases))
        rows.append([*row, percent(average) + _gain(average, of_base, name)])
    header = [word for pair in table.pairs for word in (pair.name, "seeds")]
    return [f"method, {which} epoch", *header, "average"], rows


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return means.fmean(known) if len(known) == len(values) else None


def _gain(value: float | None, base: float | None, method: str) -> str:
    return "" if value is None or base is None or method == "base" else f" ({points(value - base)})"


# ----------------------------------------------------------------------------------------------------- a search
def search_section(document: Document, found: Search, only: bool) -> None:
    """The ranking of a search's settings, the best one's command, and accuracy over T for each lambda."""
    path, dataset = found.groups[0].path, found.groups[0].config["dataset"]
    title = f"Search of {arrows(path)} on {dataset}"
    document.heading(title if only else f"{title} ({found.folder})", 1 if only else 2)
    header, rows = found.table()
    if best := found.best:
        searched = zip(header[: len(found.searched)], rows[0], strict=False)
        values = ", ".join(f"{name} {value}" for name, value in searched)
        judged = f"{outcome(best, 'selection')} % on the {found.selection} images"
        many = f"mean of {len(best.finished)} seeds" if len(best.finished) > 1 else "one seed"
        document.text(f"The best setting is {values or 'the only one'}: {judged} ({many}).")
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
    for name in dict.fromkeys(collect.data_name(group.runs[0]) for group in groups):
        members = ranked([group for group in groups if collect.data_name(group.runs[0]) == name])
        rows, ranks = [], Counter[str]()
        for group, recipe in zip(members, recipes_of(members), strict=True):
            network = group.path[-1]
            ranks[network] += 1
            outcomes = [outcome(group, which) for which in collect.OUTCOMES]
            learned = [learned_from(group.path), method_of(group), recipe, seeds_of(group)]
            seconds = "" if group.epoch_seconds is None else f"{group.epoch_seconds:.1f}"
            rows.append([network, str(ranks[network]) if group.finished else "", *learned, *outcomes, seconds])
        header = ["network", "rank", "learned from", "method", "recipe, epochs", "seeds", "best, %", "last, %"]
        document.heading(name, 3)
        document.table([*header, "s per epoch"], rows)
        loose = [run for group in members for run in group.runs if run.failed and not run.study]
        failures(document, [f"{arrows(run.path)}, seed {run.seed} ({run.folder}): {run.failed}" for run in loose])
        published.table(document, [group for group in members if group.finished])


def ranked(groups: Sequence[Group]) -> list[Group]:
    """Networks in the order of their best rows, and each network's rows best first."""
    top: dict[str, float] = {}
    for group in groups:
        top[group.path[-1]] = max(top.get(group.path[-1], 0), group.mean("best") or 0)
    return sorted(groups, key=lambda group: (-top[group.path[-1]], group.path[-1], -(group.mean("best") or -1)))


def compact_table(groups: Sequence[Group]) -> Document:
    """One table of finished groups, for a README: accuracies, the paper's and ours minus it, mean minutes of a run."""
    document, rows = Document(""), []
    shown = ranked([group for group in groups if group.finished])
    several = len({group.runs[0].data for group in shown}) > 1
    for group, recipe in zip(shown, recipes_of(shown), strict=True):
        paper = published.papers_number(group)
        minutes = sum(run.seconds for run in group.finished.values()) / len(group.finished) / 60
        outcomes = [outcome(group, which) for which in collect.OUTCOMES]
        path = arrows(group.path) + (" alone" if len(group.path) == 1 else "")
        data = collect.data_name(group.runs[0]) if several else ""
        beside = [published.paper_number(paper, group.mean("best")), f"{minutes:.{minutes < 10:d}f}"]
        rows.append([path, data, method_of(group), recipe, seeds_of(group), *outcomes, *beside])
    header = ["network", "data", "method", "recipe, epochs", "seeds", "best epoch, %", "last epoch, %"]
    document.table([*header, "paper", "minutes"], rows)
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
        *place, commit = (str(environment.get(key) or "") for key in shown)
        short = commit[:10] + " (changed)" * commit.endswith("(changed)")
        places.setdefault((*place, short), []).append(run)
    if len(places) == 1:
        [single] = places
        known = [f"{name} {value}" for name, value in zip(shown, single, strict=True) if value]
        document.text(f"All on {', '.join(known)}.")
    else:
        times = {place: duration(sum(run.seconds for run in members)) for place, members in places.items()}
        rows = [[*place, str(len(members)), times[place]] for place, members in places.items()]
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
