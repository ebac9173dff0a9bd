"""Records of runs, gathered from folders and from the files of report.py --keep; published numbers."""

import json

import pytest
from conftest import read_json, read_lines

from takd.errors import UserError
from takd.study import collect, plan, published


def test_runs_that_differ_in_their_seed_are_a_group(three_seeds, write_run):
    """Another method option is another group, another data set folder is not."""
    write_run(("plane10", "plane2"), 4, (40, 41), dataset_dir="elsewhere")
    write_run(("plane10", "plane2"), 1, (40, 41), method_options={"temperature": 9.0, "lambda": 0.5})
    groups = collect.group(collect.collect([three_seeds]).runs.values())
    direct = [sorted(group.finished) for group in groups if group.path == ("plane10", "plane2")]
    assert len(groups) == 7 and sorted(direct) == [[1], [1, 2, 3, 4]]


@pytest.mark.parametrize("parts", [("runs",), ("runs", "again"), ("runs/a", "runs/b")])
def test_kept_runs_are_read_as_the_folders_are(parts, write_run, tmp_path):
    """Even if runs in several folders have the same names, as those of --repeat (seed1, seed2) and teachers do."""
    for part in parts:
        for path in (("plane10",), ("plane10", "plane2"), ("plane2",)):
            for seed in (1, 2):
                if (path, seed) != (("plane2",), 2):
                    write_run(path, seed, (40, 41 + len(part)), folder=part, finished=seed == 1)
        sizes = ("plane10", "plane2")
        plan.record(tmp_path / part, plan.plan(tmp_path / part, sizes, [sizes], (1, 2), {}, []))
    found = collect.collect([tmp_path / part for part in parts])
    collect.keep(found, tmp_path / "kept.jsonl")
    kept = collect.collect([tmp_path / "kept.jsonl"])

    def contents(collection):
        return [(run.config, list(run.records), run.summary) for run in collection.runs.values()]

    def studies(collection):
        return [
            (study.sizes, study.planned, study.ends, study.mean(study.sizes)) for study in collect.studies(collection)
        ]

    assert len(contents(kept)) == 5 * len(parts) and contents(kept) == contents(found)
    assert len(studies(kept)) == len(parts) and studies(kept) == studies(found)
    assert sum(map(len, kept.planned.values())) == 6 * len(parts)


@pytest.mark.parametrize(
    "key", ["path", "seed", "dataset", "recipe", "epochs", "origins", "validation_split", "environment"]
)
def test_a_run_without_a_setting_that_reports_need_is_left_out(key, three_seeds):
    file = three_seeds / "plane2-seed1/config.json"
    config = read_json(file)
    del config[key]
    file.write_text(json.dumps(config))
    found = collect.collect([three_seeds])
    assert len(found.runs) == 17 and found.unreadable == [f"{file} cannot be read ({key} is missing)"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0][:30]],
        lambda lines: ["3"],
        lambda lines: ["[1]"],
        lambda lines: ['"planned"'],
        lambda lines: ['{"study": ".", "planned": 3}'],
        lambda lines: [json.dumps({key: value for key, value in json.loads(lines[0]).items() if key != "config"})],
        lambda lines: ["\x00"],
    ],
)
def test_a_damaged_file_is_a_user_error(damage, three_seeds, tmp_path):
    file = tmp_path / "kept.jsonl"
    collect.keep(collect.collect([three_seeds]), file)
    assert len(read_lines(file)) == 18
    file.write_text("\n".join(damage(file.read_text().splitlines())))
    with pytest.raises(UserError, match="kept.jsonl cannot be read"):
        collect.collect([file])


def test_published_numbers_are_found_by_data_path_and_method():
    cells = [
        ("cifar10", ("resnet20", "resnet20"), "at_st"),
        ("cifar100", ("resnet20", "resnet20"), "base"),
        ("cifar100", ("resnet110", "resnet20"), "rkd"),
        ("cifar100", ("resnet110", "resnet20"), "st"),
    ]
    found = [{entry["source"]: entry["percent"] for entry in published.entries_for(*cell)} for cell in cells]
    assert found[0] == {"hankyul2": 92.6} and found[2] == {"RepDistiller": 69.25} and found[3] == {}
    assert found[1]["hankyul2"] == 67.6 and found[1]["RepDistiller"] == 69.06


def test_published_numbers_are_of_networks_that_exist():
    for entry in published.entries():
        for path in entry["percent"]:
            networks = list(dict.fromkeys(path.split(" > ")))  # a network may teach one of its own kind
            assert plan.check_sizes([*networks, "resnet8" if "plane" in path else "plane2"]), path
