#!/usr/bin/env python3
"""Report on runs: tables, figures and plain sentences, as report.md and a report.html that needs nothing else.

  python3 report.py runs/paths                     a path study, finished or half-way: beside its runs
  python3 report.py runs results --output board    any collection of runs: a leaderboard, and the studies among them

Reads what train.py recorded (config.json, metrics.jsonl, summary.json); neither torch nor weights are needed.
"""

import dataclasses
import sys

from takd.config import flags as arguments
from takd.config import names, recipes
from takd.config.flags import number
from takd.config.names import UserError
from takd.run import run_directory as runlog
from takd.study.document import Document


def build_parser():
    parser = arguments.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders with runs, however deep")
    parser.flag(parser, "--output", metavar="DIR", help="folder for the report (default: the first of RUNS)")
    parser.flag(parser, "--price-per-hour", type=number(float, minimum=0), metavar="N", help="of the machine, to tell what it cost")
    return parser


# -------------------------------------------------------------------------------------------------- formatting
def percent(mean, deviation=None):
    if mean is None:
        return ""
    return f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def points(value):
    return f"{value:+.2f}".replace("-", "−")


def p_value(p):
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def settings_of(group):
    options = group.options
    shown = {"T": options.get("temperature"), "λ": options.get("lambda")} | {
        key: value for key, value in options.items() if key not in ("temperature", "lambda", "reduction")
    }
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, int | float) else f"{key} {value}"
        for key, value in shown.items()
        if value is not None
    )


def seeds_of(group, planned=0):
    done = len(group.finished) if group else 0
    expected = max(planned, len(group.runs) if group else 0)
    return f"{done}" if done == expected else f"{done} of {expected}"


# ---------------------------------------------------------------------------------------------------- sections
def study_section(document, found, only):
    from takd.study import collect as results
    from takd.study import figures

    best = found.best()
    document.heading(found.title if only or not found.folder else f"{found.title} ({found.folder})", 1 if only else 2)
    document.text(*lead(found, best))
    slug = "-".join((found.teacher, found.student, found.dataset))
    published = {
        path: results.published_for(found.dataset, path, method_of(found, path)) for path in {*found.cells, *found.planned}
    }
    paper = {path: cells["paper"] for path, cells in published.items() if "paper" in cells}
    beside = " and the paper's number" if paper else ""
    document.figure(f"figures/{slug}-paths", figures.paths(found, paper), "Every path, as in figure 5 of the paper: test accuracy at the best epoch in "
                    f"percent, the mean over seeds with its deviation{beside} below. The best path is marked; dashed is not finished.")  # fmt: skip
    document.heading("All paths", 3)
    sources = [s for s in dict.fromkeys(e["source"] for e in results.published()) if any(s in published[p] for p in published)]
    ranked = sorted(found.ends, key=lambda path: -(found.mean(path) or -1))
    rows = [path_row(found, path, published, sources) for path in dict.fromkeys([*ranked, (found.student,), (found.teacher,)])]
    document.table(["path", "settings", "seeds", "best epoch, %", "last epoch, %", *sources], rows, mark=0 if best else None)
    comparison(document, found)
    if any(found.mean(path) is not None for path in found.ends):
        document.figure(f"figures/{slug}-assistants", figures.assistants(found, paper), f"What assistants bring to {found.student}.")
        rule(document, found)
    between = [path for path in [*found.cells, *found.planned] if path[-1] not in (found.student, found.teacher)]
    document.heading("The networks on the way", 3)
    document.table(["network", "path", "settings", "seeds", "best epoch, %", "last epoch, %", *sources],
                   [[path[-1], *path_row(found, path, published, sources)] for path in
                    sorted(dict.fromkeys(between), key=lambda path: (found.sizes.index(path[-1]), -(found.mean(path) or -1)))])  # fmt: skip
    if any(run.records for group in found.cells.values() for run in group.runs):
        document.figure(
            f"figures/{slug}-curves", figures.curves(found), "Learning curves on the test images; lines are means over the seeds so far."
        )
    quoted = {
        f"{e['source']}: {e['title']}" for e in results.published() if e["source"] in sources and e["dataset"] == found.dataset
    }
    if quoted:
        document.text("Published numbers:", "; ".join(sorted(quoted)) + ".")


def method_of(found, path):
    group = found.cells.get(path)
    return group.method if group else "kd"


def path_row(found, path, published, sources):
    group = found.cells.get(path)
    name = (
        found.short(path)
        if len(path) > 1
        else f"{path[0]} alone{' (NOKD)' if path[0] == found.student else ' (teacher)' if path[0] == found.teacher else ''}"
    )
    name += " (BLKD)" if path == (found.teacher, found.student) else ""
    state = [] if group and group.finished else [unfinished(group)]
    cells = [percent(group.mean(which), group.deviation(which)) for which in ("best", "last")] if group else ["", ""]
    theirs = [percent(published.get(path, {}).get(source)) for source in sources]
    return [
        ", ".join([name, *state]),
        settings_of(group) if group else "",
        seeds_of(group, found.planned.get(path, 0)),
        *cells,
        *theirs,
    ]


def unfinished(group):
    return f"not finished: {', '.join(f'seed {run.seed} {run.progress}' for run in group.runs)}" if group else "not begun"


def lead(found, best):
    """The answer first, then how much of it there is."""
    from takd.study import plan as study

    total = sum(found.planned.values()) or sum(len(group.runs) for group in found.cells.values())
    done = sum(len(group.finished) for group in found.cells.values())
    if best is None:
        yield f"No path to {found.student} is finished yet."
    else:
        group = found.cells[best]
        yield f"The best path is {study.arrows(best)}: {percent(found.mean(best), group.deviation('best'))} % at its best epoch"
        yield f"(mean of {len(group.finished)} seeds)." if len(group.finished) > 1 else "(one seed)."
        direct, alone = found.mean((found.teacher, found.student)), found.mean((found.student,))
        others = {"directly from the teacher": direct if len(best) > 2 else None, "alone": alone}
        if said := ", ".join(f"{how} {value:.2f} %" for how, value in others.items() if value is not None):
            yield f"For comparison, {found.student} {said}."
        if alone is not None and alone >= found.mean(best):
            yield "No path is above training alone."
    if done < total:
        yield f"This is a report half-way: {done} of {total} trainings are finished; what is not is marked."
    configs = [group.config for group in found.cells.values()]
    if any(not config["validation_split"] for config in configs):
        yield "The best epoch was chosen on the test images, as the paper does, so its numbers flatter every row; the last epoch's do not."
    lengths = sorted({config["epochs"] for config in configs})
    yield f"Recipe {', '.join(sorted({config['recipe'] for config in configs}))}, {' or '.join(map(str, lengths))} epochs."
    if found.ambiguous:
        ambiguous = ", ".join(dict.fromkeys(map(found.short, found.ambiguous)))
        yield f"Run under several settings, of which the fullest and then best is shown here: {ambiguous}; the leaderboard has them all."
    if len(set(map(names.family, found.sizes))) > 1:
        yield "The sizes are of two families."


def comparison(document, found):
    """Differences to direct distillation and to training alone, with a paired test over seeds."""
    from takd.study import collect as results

    references = {"BLKD": (found.teacher, found.student), "NOKD": (found.student,)}
    have = {name: found.cells[path] for name, path in references.items() if path in found.cells and found.cells[path].finished}
    paths = sorted((path for path in found.ends if found.mean(path) is not None), key=found.mean, reverse=True)
    if not have or not paths:
        return
    document.heading("Against direct distillation (BLKD) and training alone (NOKD)", 3)
    for which in results.OUTCOMES:
        columns, sentences = [], []
        for name, reference in have.items():
            members = [
                None if references[name] == path else results.difference(found.cells[path], reference, which) for path in paths
            ]
            corrected = results.holm(members)
            columns.append((name, members, corrected))
            sentences += verdict(found, name, paths, members, corrected)
        header = [f"path, {which} epoch"] + [f"against {name}{what}" for name, *_ in columns for what in (", points", ": p")]
        rows = []
        for i, path in enumerate(paths):
            row = [found.short(path)]
            for _, members, corrected in columns:
                d = members[i]
                row += [
                    points(d.mean) + (f" ± {d.deviation:.2f}" if d.deviation is not None else "") if d else "",
                    p_value(corrected[i]),
                ]
            rows.append(row)
        document.table(header, rows)
        document.text(f"At the {which} epoch:", *sentences)
    seeds = max(len(found.cells[path].finished) for path in paths)
    images = names.DATASETS[found.dataset].test_images if found.dataset in names.DATASETS else None
    error = results.standard_error(found.mean(paths[0]), images) if images else None
    if seeds < 2:
        document.text("With one seed no test across seeds is possible, and no difference here can be told from the noise between seeds.",
                      f"The {images:,} test images alone leave an accuracy a standard error of {error:.2f} points." if error else "")  # fmt: skip
    else:
        document.text("p is of a paired t-test over the seeds, corrected after Holm for the number of paths compared; below 0.05 a difference "
                      "is called more than noise. Few seeds give such a test little power: no evidence is not evidence of none.")  # fmt: skip


def verdict(found, name, paths, members, corrected):
    """Plain sentences on one reference."""
    what = {"BLKD": "direct distillation", "NOKD": "training alone"}[name]
    tested = [i for i, p in enumerate(corrected) if p is not None]
    better = [found.short(paths[i]) for i in tested if corrected[i] < 0.05 and members[i].mean > 0]
    worse = [found.short(paths[i]) for i in tested if corrected[i] < 0.05 and members[i].mean < 0]
    known = [d for d in members if d]
    if not known:
        return
    if not tested:
        above = sum(d.mean > 0 for d in known)
        yield f"{above} of {len(known)} paths are above {what}, which {'one seed' if known[0].seeds == 1 else 'these seeds'} cannot tell from noise."
        return
    if better:
        yield f"Better than {what} by more than the noise between seeds: {', '.join(better)}."
    if worse:
        yield f"Worse than {what} by more than the noise: {', '.join(worse)}."
    if not better and not worse:
        yield f"No path differs from {what} by more than the noise between seeds."
    elif len(better) + len(worse) < len(tested):
        yield f"The other {len(tested) - len(better) - len(worse)} do not differ from it by more than the noise."


def rule(document, found):
    """The paper's rule of thumb beside what was measured."""
    from takd.study import collect as results

    if not (known := results.rule_of_thumb(found)):
        return
    middle, own, nearest = known
    reached = {network: found.mean((found.teacher, network, found.student)) for network in own}
    reached = {network: value for network, value in reached.items() if value is not None}
    if not reached:
        return
    measured = max(reached, key=reached.get)
    document.heading("The paper's rule of thumb", 3)
    agrees = "That is the one" if measured == nearest else f"Measured best is {measured}"
    document.text(
        f"The best single assistant should be the one whose own accuracy is nearest the mean of teacher and student, here {middle:.2f} %:",
        f"{nearest} with {own[nearest]:.2f} %. {agrees} with the best student here, {reached[measured]:.2f} %.",
    )
    rows = [[network, percent(own[network]), f"{abs(own[network] - middle):.2f}", percent(reached.get(network))] for network in own]
    document.table(
        ["assistant", "alone, %", "from the mean, points", f"{found.student} after it, %"], rows, mark=list(own).index(nearest)
    )


def recipe_of(group):
    """The recipe, the epochs, and what was given in the recipe's stead."""
    config = group.config
    keys = [field.name for field in dataclasses.fields(recipes.Recipe) if field.name in config and field.name not in ("epochs", "method_options")]
    given = [key for key in keys if not config["origins"][key].startswith(("recipe", "default", "data set"))]
    values = {key: " ".join(map(str, config[key])) if isinstance(config[key], list) else config[key] for key in given}
    return ", ".join([config["recipe"], str(config["epochs"]), *(f"{key.replace('_', ' ')} {value}" for key, value in values.items())])


def leaderboard(document, groups):
    """Every group of seeds, best first, a table a data set."""
    from takd.study import collect as results
    from takd.study import plan as study

    document.heading("Leaderboard")
    quoted = {}
    for dataset in dict.fromkeys(group.config["dataset"] for group in groups):
        members = [group for group in groups if group.config["dataset"] == dataset]
        top = {}  # the networks in the order of their best rows
        for group in members:
            top[group.path[-1]] = max(top.get(group.path[-1], 0), group.mean("best") or 0)
        members.sort(key=lambda group: (-top[group.path[-1]], group.path[-1], -(group.mean("best") or -1)))
        rows, students = [], {}
        for group in members:
            students[group.path[-1]] = rank = students.get(group.path[-1], 0) + 1
            theirs = results.published_for(dataset, group.path, group.method)
            quoted |= {f"{e['source']}: {e['title']}": 1 for e in results.published() if e["source"] in theirs and e["dataset"] == dataset}
            rows.append([
                group.path[-1], str(rank) if group.finished else "", study.arrows(group.path[:-1]) or "labels", group.method or "", settings_of(group),
                recipe_of(group), seeds_of(group), percent(group.mean("best"), group.deviation("best")),
                percent(group.mean("last"), group.deviation("last")),
                "" if group.epoch_seconds is None else f"{group.epoch_seconds:.1f}", ", ".join(f"{value:.2f} ({source})" for source, value in theirs.items()),
            ])  # fmt: skip
        document.heading(dataset, 3)
        document.table(
            ["network", "rank", "learned from", "method", "settings", "recipe, epochs", "seeds", "best, %", "last, %", "s an epoch", "published"],
            rows,
        )
    if quoted:
        document.text("Published, of the same data set, path and method, but each with its own recipe:", "; ".join(sorted(quoted)) + ".")


def cost_section(document, runs, price):
    document.heading("Time, cost and environment")
    seconds = sum(run.seconds for run in runs)
    spent = f", {price * seconds / 3600:.2f} at {price:g} an hour" if price is not None else ""
    document.text(f"{len(runs)} run{'s' * (len(runs) != 1)}, {sum(run.finished for run in runs)} finished: {runlog.duration(seconds)} of training and evaluation "
                  f"({seconds / 3600:.2f} hours of a device{spent}), the start of programs and the teachers' tables not counted.")  # fmt: skip
    places = {}
    for run in runs:
        environment = run.config["environment"]
        shown = ("device", "threads", "precision", "torch", "python", "host", "commit")
        places.setdefault(tuple(str(environment.get(key) or "") for key in shown), []).append(run)
    rows = [[*place[:-1], place[-1][:10] + " (changed)" * place[-1].endswith("(changed)"), str(len(members)),
             runlog.duration(sum(run.seconds for run in members))] for place, members in places.items()]  # fmt: skip
    document.table(["device", "threads", "precision", "torch", "python", "host", "commit", "runs", "time"], rows)
    by_network = {}
    for run in runs:
        if run.records:
            by_network.setdefault((run.config["dataset"], run.path[-1]), []).append(run)
    places = {name: place for place, name in enumerate(names.NETWORKS)}
    ordered = sorted(by_network.items(), key=lambda entry: (entry[0][0], places.get(entry[0][1], len(places)), entry[0][1]))
    rows = []
    for (dataset, network), members in ordered:
        epochs = sum(len(run.records) for run in members)
        rows.append([dataset, network, str(epochs), f"{sum(run.seconds for run in members) / epochs:.1f}"])
    document.table(["data set", "network", "epochs trained", "seconds an epoch"], rows)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        with arguments.requirements("report.py"):
            from takd.study import collect as results

        runs, unreadable = results.collect(args.runs)
        if not runs:
            damaged = f" ({len(unreadable)} cannot be read: {unreadable[0]})" if unreadable else ""
            raise UserError(
                f"no runs of train.py in {' '.join(args.runs)}{damaged}; give a folder that train.py or distill_paths.py wrote to"
            )
        document = Document(args.output or args.runs[0])
        found = results.studies(runs)
        if len(found) != 1:
            document.heading("Runs", 1)
            document.text(f"{len(runs)} runs in {', '.join(map(str, args.runs))}.")
        for each in found:
            study_section(document, each, only=len(found) == 1)
        leaderboard(document, results.group(runs))
        cost_section(document, runs, args.price_per_hour)
        if unreadable:
            document.text(f"Left out, as it cannot be read: {'; '.join(unreadable)}.")
        document.write()
    except UserError as error:
        sys.exit(arguments.fail("report.py", error, 2))
    except (ImportError, OSError) as error:
        sys.exit(arguments.fail("report.py", error, 1))
    for line in unreadable:
        print(f"warning: left out {line}", file=sys.stderr)
    print(f"report    {document.folder / 'report.html'} and report.md: {len(runs)} runs")


if __name__ == "__main__":
    main()
