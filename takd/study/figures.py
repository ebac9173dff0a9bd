"""Figures, each as Drawn: of a path study, of methods, of a search, and of one network's predictions class by class.

Shared look: ours in blue, the best marked in orange, trained alone in grey, published numbers small and grey.
"""

import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from takd.study.collect import Group, Study
from takd.study.pairs import Table
from takd.study.plan import NetworkPath
from takd.study.ranking import Search


class Drawn(NamedTuple):
    svg: str
    png: bytes
    narrow: str | None = None  # SVG with the panels one below the other, where there are several


Parameters = ParamSpec("Parameters")
Published = Mapping[NetworkPath, float]

INK, GREY, FAINT, GRID = "#1b2733", "#6b7785", "#b8c1cc", "#e6eaef"
BLUE, PALE, BEST, PAPER = "#1f6fb2", "#e3effa", "#d9730d", "#8a94a0"
STEPS = ("#0b3c6f", "#2f7fc1", "#39a3a0", "#8cb369", "#c9a227", "#b5651d", "#7d5ba6", "#c2517c")
SHADES = LinearSegmentedColormap.from_list("shades", ("#a9c95a", "#39a3a0", BLUE, "#0b2545"))
DASHED = (0, (4, 3))
ALONE: dict[str, Any] = {"color": GREY, "ls": (0, (4, 2))}  # a network alone, as a curve
LINES = ("-", (0, (1, 1)), (0, (5, 1, 1, 1)))  # of methods beyond the colours
STYLE = Path(__file__).with_name("figures.mplstyle")


def styled(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Drawn]:
    """The figure as Drawn. Needs no display."""

    @functools.wraps(draw)
    def drawn(*arguments: Parameters.args, **named: Parameters.kwargs) -> Drawn:
        with rc_context(fname=STYLE):
            return _written(draw(*arguments, **named))

    return drawn


def panels(draw: Callable[Concatenate[int, Parameters], Figure]) -> Callable[Parameters, Drawn]:
    """The same for a figure of panels, `draw`n with at most so many beside each other; narrow, with one."""

    @functools.wraps(draw)
    def drawn(*arguments: Parameters.args, **named: Parameters.kwargs) -> Drawn:
        with rc_context(fname=STYLE):
            wide, narrow = (draw(columns, *arguments, **named) for columns in (3, 1))
            return _written(wide)._replace(narrow=_written(narrow).svg)

    return drawn


def _written(figure: Figure) -> Drawn:
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=160)
    return Drawn(svg.getvalue(), png.getvalue())


def _grid(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels of a size in inches, and their axes."""
    width = min(count, columns)
    height = -(-count // width)
    figure = Figure(figsize=(size[0] * width, size[1] * height), layout="constrained")
    axes = list(figure.subplots(height, width, squeeze=False).flat)
    for unused in axes[count:]:
        unused.axis("off")
    return figure, axes[:count]


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Below the panels, in as many columns as fit the figure, which grows by the legend's height."""
    renderer: Any = FigureCanvasAgg(figure).get_renderer()
    for columns in range(len(handles), 0, -1):
        look: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "fontsize": 8.5}
        legend = figure.legend(handles=handles, **look)
        box = legend.get_window_extent(renderer)
        if box.width <= figure.bbox.width or columns == 1:
            width, height = figure.get_size_inches()
            figure.set_size_inches(max(width, box.width / figure.dpi), height + box.height / figure.dpi)
            return
        legend.remove()


# -------------------------------------------------------------------------------------------- the paper's figure 5
@styled
def paths(study: Study, published: Published) -> Figure:
    """Sizes as columns, paths as rows, nodes with the best test accuracy and the published number below."""
    rows, best = study.rows, study.best()
    columns = {network: x for x, network in enumerate(study.sizes)}
    figure = Figure(figsize=(1.75 * len(columns) + 2.2, 0.74 * (len(rows) + 1) + 1.3))
    axes = figure.subplots()
    axes.set(xlim=(-1.55, len(columns) - 0.4), ylim=(len(rows) + 0.75, -1.05))
    axes.axis("off")
    centred: dict[str, Any] = {"ha": "center", "va": "center"}
    for network, x in columns.items():
        role = {study.teacher: "teacher", study.student: "student"}.get(network, "assistant")
        axes.text(x, -0.8, network, fontsize=11.5, weight="bold", **centred)
        axes.text(x, -0.48, role, fontsize=8.5, color=GREY, **centred)
    for y, path in enumerate(rows):
        color, weight = (BEST, "bold") if path == best else (GREY, "normal")
        axes.text(-1.5, y, study.short(path), va="center", fontsize=9, color=color, weight=weight)
        for i, network in enumerate(path):
            prefix = path[: i + 1]
            if i:
                arrow = {"arrowstyle": "-|>", "color": FAINT, "lw": 1.2, "mutation_scale": 11}
                axes.annotate("", (columns[network] - 0.23, y), (columns[path[i - 1]] + 0.23, y), arrowprops=arrow)
            look = (BEST, BEST, "white") if prefix == best else (PALE, BLUE, INK) if i else ("white", FAINT, GREY)
            _node(axes, (columns[network], y), study, prefix, published, look)
    y = len(rows)
    axes.axhline(y - 0.5, color=GRID, lw=1.2)
    axes.text(-1.5, y, "alone (NOKD)", va="center", fontsize=9, color=GREY)
    for network, x in columns.items():
        _node(axes, (x, y), study, (network,), published, ("white", FAINT, GREY))
    figure.tight_layout(pad=0.4)
    return figure


def _node(
    axes: Any,
    place: tuple[float, float],
    study: Study,
    path: NetworkPath,
    published: Published,
    look: tuple[str, str, str],
) -> None:
    """A path's last network: mean, deviation or progress, and the published number. look: face, edge, ink."""
    group, (x, y) = study.cell(path), place
    mean = group.mean("best") if group else None
    face, edge, ink = look if mean is not None else ("white", FAINT, GREY)
    text, below = "   –   ", []
    if mean is not None:
        text = f"{mean:.2f}"
        if group and (deviation := group.deviation("best")) is not None:
            below.append(f"± {deviation:.2f}")
    elif any(path == failed for failed, _ in study.failed):
        text = "failed"
    elif group:
        so_far = max((run.accuracy("best") or 0 for run in group.runs if run.records), default=None)
        text = f"({so_far:.2f})" if so_far is not None else text
        below.append(group.runs[-1].progress)
    dashes: Any = "-" if mean is not None else (0, (2, 2))
    box = {"boxstyle": "round,pad=0.32,rounding_size=0.5", "fc": face, "ec": edge, "lw": 1.3, "ls": dashes}
    weight = "bold" if face == BEST else "normal"
    axes.text(x, y, text, ha="center", va="center", fontsize=10, color=ink, weight=weight, bbox=box)
    if path in published:
        below.append(f"paper {published[path]:.2f}")
    axes.text(x, y + 0.34, "   ".join(below), ha="center", va="center", fontsize=7, color=PAPER)


# ------------------------------------------------------------------------------------------------- assistants
@panels
def assistants(columns: int, study: Study, published: Published) -> Figure:
    """The student's best accuracy by the number of assistants and, with two or more, by the size of a single one."""
    best, means = study.best(), {path: mean for path in study.ends if (mean := study.mean(path)) is not None}
    singles, middle = {path[1]: path for path in means if len(path) == 3}, study.sizes[1:-1]
    figure, axes = _grid(1 + (len(singles) > 1), columns, (5.5, 3.9))
    left = axes[0]
    by_count: dict[int, list[NetworkPath]] = {}
    for path in means:
        by_count.setdefault(len(path) - 2, []).append(path)
    for count, members in by_count.items():
        for i, path in enumerate(sorted(members, key=lambda path: means[path])):
            _point(left, count + 0.12 * (i - (len(members) - 1) / 2), study, path, published)
        mean = sum(means[path] for path in members) / len(members)
        left.hlines(mean, count - 0.3, count + 0.3, color=BLUE, lw=1.5, alpha=0.5)
    counts = range(max((len(path) - 2 for path in study.ends), default=0) + 1)
    left.set(xlabel="number of assistants", title="By number of assistants")
    left.set_xticks(list(counts), [f"{count}" + (" (BLKD)" if count == 0 else "") for count in counts])
    left.set_xlim(-0.6, len(counts) - 0.4)
    for right in axes[1:]:
        for x, network in enumerate(middle):
            if network in singles:
                _point(right, x, study, singles[network], published)
        own = [study.mean((network,)) for network in middle]
        labels = [name if mean is None else f"{name}\nalone {mean:.2f}" for name, mean in zip(middle, own, strict=True)]
        right.set_xticks(range(len(middle)), labels)
        limits = (-0.6, max(len(middle) - 0.4, 0.6))
        right.set(xlabel="the assistant, if there is exactly one", title="By size of a single assistant", xlim=limits)
        right.sharey(left)
    lines = [((study.student,), "alone (NOKD)", GREY), ((study.teacher, study.student), "directly (BLKD)", BLUE)]
    handles = [Line2D([], [], marker="o", ls="", color=BLUE, label="a path (mean ± standard deviation over seeds)")]
    label = f"best: {study.short(best)}" if best else "best"
    handles.append(Line2D([], [], marker="o", ls="", color=BEST, label=label))
    for path, name, color in lines:
        if (value := study.mean(path)) is not None:
            handles.append(Line2D([], [], color=color, lw=1.1, ls=DASHED, label=name))
            for each in axes:
                each.axhline(value, color=color, lw=1.1, ls=DASHED, zorder=1)
    for each in axes:
        each.grid(axis="x", visible=False)
        each.set_ylabel(f"best accuracy of {study.student}, %")
    if any(len(members) > 1 for members in by_count.values()):
        handles.append(Line2D([], [], color=BLUE, alpha=0.5, label="mean of these paths"))
    if any(path in published for path in means):
        handles.append(Line2D([], [], marker="D", ls="", mfc="none", mec=PAPER, ms=5, label="the paper's number"))
    _legend(figure, handles)
    return figure


def _point(axes: Any, x: float, study: Study, path: NetworkPath, published: Published) -> None:
    color, cell = BEST if path == study.best() else BLUE, study.cell(path)
    spread = cell.deviation("best") if cell else None
    axes.errorbar(x, study.mean(path), yerr=spread, fmt="o", ms=7, color=color, capsize=3, lw=1.2, zorder=3)
    if path in published:
        axes.plot(x, published[path], "D", mfc="none", mec=PAPER, ms=5, zorder=2)


# --------------------------------------------------------------------------------------------- learning curves
@panels
def curves(columns: int, study: Study) -> Figure:
    """Test accuracy by epoch: one panel per network, one line per path (mean over its seeds), coloured by teacher."""
    trained = {path[-1] for path, group in study.cells.items() if any(run.records for run in group.runs)}
    shown = [network for network in study.sizes if network in trained]
    figure, grid = _grid(len(shown), columns, (3.9, 3.1))
    color = dict(zip(study.sizes, itertools.cycle(STEPS), strict=False))
    best, alone = study.best(), False
    teachers: set[str] = set()
    for axes, network in zip(grid, shown, strict=True):
        for path in [path for path in study.cells if path[-1] == network]:
            look: dict[str, Any] = {"lw": 1.4} | ({"color": color[path[-2]]} if path[1:] else ALONE)
            if path == best:
                look |= {"color": BEST, "lw": 2.4, "zorder": 4}
            if _curve(axes, study.cell(path), look):
                alone, teachers = alone or len(path) == 1, teachers | set(path[-2:-1])
        _by_epoch(axes, network)
    handles = [Line2D([], [], **ALONE, label="alone")] if alone else []
    taught = [network for network in study.sizes if network in teachers]
    handles += [Line2D([], [], color=color[network], label=f"taught by {network}") for network in taught]
    handles += [Line2D([], [], color=BEST, lw=2.4, label=f"best path: {study.short(best)}")] if best else []
    _legend(figure, handles)
    return figure


def _curve(axes: Any, group: Group | None, look: Mapping[str, Any]) -> bool:
    """The mean over a group's runs, as far as all have come. Whether there is one."""
    runs = [run.records for run in group.runs if run.records] if group else []
    length = min(map(len, runs), default=0)
    values = [sum(records[epoch]["test_accuracy_percent"] for records in runs) / len(runs) for epoch in range(length)]
    axes.plot(range(1, length + 1), values, marker="o" if length < 8 else None, ms=3, **look)
    return bool(runs)


def _by_epoch(axes: Any, title: str) -> None:
    axes.set(title=title, xlabel="epochs trained", ylabel="accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)


@panels
def methods(columns: int, table: Table) -> Figure:
    """Test accuracy by epoch: one panel per pair, one line per method, base dashed."""
    figure, grid = _grid(len(table.pairs), columns, (6.2 if len(table.pairs) == 1 else 4.4, 3.6))
    looks: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(name for name in table.methods if name != "base"):
        looks[name] = {"color": STEPS[i % len(STEPS)], "ls": LINES[i // len(STEPS) % len(LINES)], "lw": 1.5}
    looks["base"] = {"color": GREY, "ls": DASHED, "lw": 1.8, "zorder": 4}
    for axes, pair in zip(grid, table.pairs, strict=True):
        for name, group in pair.cells.items():
            _curve(axes, group, looks[name])
        _by_epoch(axes, pair.name)
    _legend(figure, [Line2D([], [], **looks[name], label=name) for name in table.methods])
    return figure


# ------------------------------------------------------------------------------------------------- a search
@styled
def search(found: Search) -> Figure:
    """Accuracy on the selection split over temperature, a line a lambda; the best setting is marked."""
    series: dict[float, list[Group]] = {}
    for group in found.groups:
        if group.finished:
            series.setdefault(group.options.get("lambda", 0.0), []).append(group)
    figure = Figure(figsize=(8, 4.2))
    axes = figure.subplots()
    shades: Any = ScalarMappable(Normalize(min(series), max(series)), SHADES)
    for value, groups in sorted(series.items()):
        groups.sort(key=lambda group: group.options["temperature"])
        places = [group.options["temperature"] for group in groups]
        means = [group.mean("selection") or 0 for group in groups]
        spreads = [group.deviation("selection") or 0 for group in groups]
        look: dict[str, Any] = {"color": shades.to_rgba(value), "fmt": "o-", "ms": 5, "lw": 1.4, "capsize": 3}
        axes.errorbar(places, means, yerr=spreads, **look)
    best = found.groups[0]
    look = {"ls": "", "ms": 12, "mfc": "none", "mec": BEST, "mew": 2, "zorder": 4}
    axes.plot(best.options["temperature"], best.mean("selection") or 0, "o", label="best setting", **look)
    if len(series) > 1:
        bar: Any = figure.colorbar(shades, ax=axes, ticks=sorted(series) if len(series) < 12 else None)
        bar.ax.set_title("λ")
        bar.outline.set_visible(False)
    axes.set(xlabel="temperature T", ylabel=f"{found.selection} accuracy, %")
    axes.legend(fontsize=8.5)
    figure.tight_layout()
    return figure


# ------------------------------------------------------------------------------------------------- classes
# From ten classes to a thousand: cells (heights in inches) shrink until text would be too small, then the figure stops
# growing and some labels are left out.
BLUES = LinearSegmentedColormap.from_list("blues", ("white", PALE, BLUE, STEPS[0]))
POINTS = 72  # an inch


def _label(axis: Any, places: Sequence[int], labels: Sequence[str], cell: float) -> None:
    """Labels as large as the rows allow, 5 to 9 points; where rows are too thin for that, only some."""
    every = math.ceil(5.5 / (cell * POINTS))
    shown = [label if len(label) < 25 else f"{label[:23]}…" for label in labels]
    axis.set_ticks(places[::every], shown[::every], fontsize=min(9, max(5, cell * POINTS * 0.75)))


Percents = Sequence[float | None]  # per class, None for a class without images


@styled
def class_accuracy(
    classes: Sequence[str], percents: Percents, overall: float, teacher: Percents | None = None
) -> Figure:
    """One bar per class; more than 20 are sorted, the best first."""
    order = list(range(len(classes)))
    if len(order) > 20:
        order.sort(key=lambda i: -(percents[i] or 0))
    cell, places = min(0.34, 18 / len(order)), list(range(len(order)))
    figure = Figure(figsize=(8, cell * len(order) + 1.5))
    axes = figure.subplots()
    widths, title = [percents[i] or 0 for i in order], f"this network, {overall:.2f} % overall"
    axes.barh(places, widths, height=0.75 if cell > 0.05 else 1, color=BLUE, label=title)
    if teacher:
        size = min(5, cell * POINTS * 0.4)
        marks: list[Any] = [teacher[i] for i in order]
        axes.plot(marks, places, "D", ms=size, color=BEST, ls="", label="its teacher")
    axes.axvline(overall, color=GREY, lw=1.1, ls=DASHED)
    if cell >= 0.14:
        for y, (i, width) in enumerate(zip(order, widths, strict=True)):
            text = "no image" if percents[i] is None else f"{percents[i]:.1f}"
            x, ink = (1, "white") if width > 10 else (1 + width, GREY)
            axes.text(x, y, text, va="center", fontsize=min(8, cell * POINTS * 0.7), color=ink)
    _label(axes.yaxis, places, [classes[i] for i in order], cell)
    axes.set(xlim=(0, 102), ylim=(len(order) - 0.4, -0.6), xlabel="correct, % of the class's images")
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8.5)
    figure.tight_layout()
    return figure


@styled
def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure:
    """counts (C, C): images of each class (rows) by prediction (columns), coloured by their share of the class."""
    cell = min(0.5, 14 / len(classes))
    side = cell * len(classes)
    figure = Figure(figsize=(side + 2.6, side + 1.8))
    axes = figure.subplots()
    shares = [[100 * count / max(sum(row), 1) for count in row] for row in counts]
    image = axes.imshow(shares, cmap=BLUES, norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if cell >= 0.3:
        for y, row in enumerate(counts):
            for x, count in enumerate(row):
                ink, size = "white" if shares[y][x] > 35 else INK if count else FAINT, min(9, cell * POINTS * 0.3)
                axes.text(x, y, f"{count}", ha="center", va="center", color=ink, fontsize=size)
    for axis in (axes.xaxis, axes.yaxis):
        _label(axis, list(range(len(classes))), classes, cell)
    axes.tick_params(axis="x", rotation=90)
    axes.set(xlabel="predicted class", ylabel="class")
    axes.grid(visible=False)
    bar: Any = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=30, ticks=(0, 1, 5, 20, 50, 100))
    bar.set_label("share of the class's images, %")
    bar.outline.set_visible(False)
    figure.tight_layout()
    return figure


@styled
def classification(rows: Sequence[Sequence[Any]]) -> Figure:
    """rows: (name, precision, recall, F1, images), each score in 0..1 or None; classes first, averages last."""
    cell, places = min(0.34, 18 / len(rows)), list(range(len(rows)))
    figure = Figure(figsize=(6.4, cell * len(rows) + 1.3))
    axes = figure.subplots()
    scores = [[math.nan if value is None else value for value in row[1:4]] for row in rows]
    axes.imshow(scores, cmap=BLUES, vmin=0, vmax=1.15, aspect="auto", interpolation="nearest")
    if cell >= 0.14:
        size = min(9, cell * POINTS * 0.75)
        for y, row in enumerate(rows):
            for x, value in enumerate(row[1:4]):
                if value is not None:
                    ink = "white" if value > 0.6 else INK
                    axes.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=size, color=ink)
            axes.text(2.6, y, f"{row[4]:,}", va="center", fontsize=size, color=GREY)
    above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "xytext": (0, 4)}
    axes.annotate("images", (2.6, 1), color=GREY, **above)
    _label(axes.yaxis, places, [row[0] for row in rows], cell)
    axes.xaxis.set_ticks(range(3), ["precision", "recall", "F1"])
    axes.xaxis.tick_top()
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.tight_layout()
    figure.subplots_adjust(right=0.88)
    return figure
