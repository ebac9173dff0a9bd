"""Published accuracies beside ours: ours minus theirs at the same epoch, and what else differs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from takd.study.collect import Group, Study
from takd.study.document import Document
from takd.study.formatting import changed_settings, options_text, percent, points
from takd.study.plan import NetworkPath, arrows


def entries() -> list[dict[str, Any]]:
    """Of published.json: {source, title, dataset, method, percent: {path as text: number}, selection: "best" or "last"
    epoch}, and where known the epochs, the recipe here that is like theirs, options, and a note on what else differs.
    """
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def entries_for(dataset: str, path: NetworkPath, method: str | None) -> list[dict[str, Any]]:
    """Of the same data set, path and, where something was distilled, method; `percent` is the number."""
    alone = len(path) == 1 or method == "base"
    text = arrows(path[-1:] if alone else path)
    same = [entry for entry in entries() if entry["dataset"] == dataset and text in entry["percent"]]
    return [entry | {"percent": entry["percent"][text]} for entry in same if alone or entry["method"] == method]


def comparable(group: Group) -> bool:
    """Whether the runs saw a whole data set as it is, so that published numbers may stand beside theirs."""
    changed = ("images", "image_size", "test_images", "validation_split")
    return not (group.runs[0].train_images or any(group.config.get(key) for key in changed))


def beside(group: Group) -> list[dict[str, Any]]:
    """The entries that runs may stand beside."""
    return entries_for(group.config["dataset"], group.path, group.method) if comparable(group) else []


def papers(found: Study) -> dict[NetworkPath, float]:
    """{path: the paper's accuracy} where the study's runs may stand beside it."""
    first, numbers = next(iter(found.cells.values()), None), {}
    paths = {path for path in (*found.cells, *found.planned) if found.guidance == "last" or len(path) < 3}
    for path in paths if first and comparable(first) else ():
        method = found.cells[path].method if path in found.cells else "kd"
        for entry in entries_for(found.dataset, path, method):
            if entry["source"] == "paper":
                numbers[path] = entry["percent"]
    return numbers


def papers_number(group: Group) -> float | None:
    """The paper's accuracy that runs may stand beside."""
    return next((entry["percent"] for entry in beside(group) if entry["source"] == "paper"), None)


def paper_number(paper: float | None, mean: float | None) -> str:
    """The paper's accuracy and, in brackets, ours minus it, both of the best epoch."""
    return percent(paper) + (f" ({points(mean - paper)})" if paper is not None and mean is not None else "")


def what_differs(group: Group, entry: Mapping[str, Any]) -> str:
    """How a published result's training differs from ours."""
    config, found = group.config, []
    if entry.get("epochs") != config["epochs"]:
        found.append(f"epochs {entry.get('epochs', 'unknown')}, ours {config['epochs']}")
    ours = ", ".join([config["recipe"], *changed_settings(config, group.settings)])
    if ours != entry.get("recipe"):
        theirs = f"recipe {entry['recipe']}" if "recipe" in entry else "their own recipe"
        found.append(f"{theirs}, ours {ours}")
    options = {key: value for key, value in entry.get("options", {}).items() if group.options.get(key, value) != value}
    if options:
        found.append(f"{options_text(options)}, ours {options_text({key: group.options[key] for key in options})}")
    return "; ".join([*found, *filter(None, [entry.get("note")])])


def table(document: Document, groups: list[Group]) -> None:
    """A row a finished group and published number of it, and the sources."""
    rows, cited = [], set()
    for group in groups:
        for entry in beside(group):
            mean = group.mean(entry["selection"]) or 0
            numbers = [percent(mean), percent(entry["percent"]), points(mean - entry["percent"])]
            path = arrows(group.path) + " alone" * (len(group.path) == 1)
            differs = what_differs(group, entry)
            rows.append([path, group.method or "", entry["selection"], *numbers, entry["source"], differs])
            cited.add(f"{entry['source']}: {entry['title']}")
    if rows:
        document.text("Beside published numbers of the same data set, path and method, at the epoch that these are of:")
        header = ["network", "method", "epoch", "ours, %", "published, %", "points", "source", "what differs"]
        document.table(header, rows)
        document.text(f"Sources: {'; '.join(sorted(cited))}.")
