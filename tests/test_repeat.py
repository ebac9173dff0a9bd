"""train.py --repeat: one run per seed, one teacher for all of them."""

import json

import numpy as np
import pytest
from conftest import last_weights, same_weights

import train
from takd.study import collect


def test_repeat_makes_one_run_per_seed_and_the_report_groups_them(tmp_path, call, tiny):
    command = (*tiny, "--teacher", "plane2", "--seed", "4", "--run-dir", tmp_path)
    outcome = call(train, *command, "--repeat", "2", "--json")
    assert outcome.status == 0, outcome.err
    summaries = [json.loads(line) for line in outcome.out.splitlines()]
    assert [summary["seed"] for summary in summaries] == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed4", "seed5", "teacher"]
    best = [summary["best"]["test_accuracy_percent"] for summary in summaries]
    expected = f"{np.mean(best):.2f} ± {np.std(best, ddof=1):.2f} % at the best epoch"
    assert expected in outcome.err.splitlines()[-1] and outcome.err.count("Training the teacher plane2 first:") == 1
    again = call(train, *command, "--repeat", "2")
    assert again.status == 0 and again.out.count("finished ") == 3, "the teacher once, and two students"
    more = call(train, *command, "--repeat", "3")
    assert more.status == 0 and more.out.count("finished ") == 3 and "seeds 4 5 6" in more.out.splitlines()[-1]
    groups = {group.path: group for group in collect.group(collect.collect([tmp_path]).runs.values())}
    students = groups["plane2", "plane2"]
    assert list(students.values("best")) == [4, 5, 6]
    assert students.mean("best") == pytest.approx(np.mean(list(students.values("best").values())))


def test_a_repeated_run_is_the_run_of_its_seed(tmp_path, call, tiny):
    assert call(train, *tiny, "--seed", "2", "--repeat", "1", "--run-dir", tmp_path / "repeated").status == 0
    assert call(train, *tiny, "--seed", "2", "--run-dir", tmp_path / "alone").status == 0
    assert same_weights(last_weights(tmp_path / "repeated/seed2"), last_weights(tmp_path / "alone"))
