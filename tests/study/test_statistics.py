"""Statistics of a report against hand arithmetic."""

import pytest
from scipy.stats import ttest_rel

from takd.study import collect, statistics
from takd.study.statistics import Difference


def groups_below(folder):
    return {group.path: group for group in collect.group(collect.collect([folder]).runs.values())}


def test_paired_differences(three_seeds):
    groups = groups_below(three_seeds)
    found = statistics.difference(groups["plane10", "plane4", "plane2"], groups["plane10", "plane2"], "best")
    assert (found.mean, found.deviation, found.seeds) == (pytest.approx(1), pytest.approx(0.1), 3)
    assert found.p == pytest.approx(ttest_rel((42.9, 44.0, 43.6), (42.0, 43.0, 42.5)).pvalue)


def test_equal_differences_have_no_p_value(write_run, tmp_path):
    for seed in (1, 2):
        write_run(("plane10", "plane2"), seed, (40, 41))
        write_run(("plane2",), seed, (39, 40))
    groups = groups_below(tmp_path / "runs")
    found = statistics.difference(groups["plane10", "plane2"], groups[("plane2",)], "best")
    assert (found.mean, found.deviation, found.seeds, found.p) == (1, 0, 2, None)


def test_no_common_seed_is_no_difference(write_run, tmp_path):
    write_run(("plane10", "plane2"), 1, (40, 41))
    write_run(("plane2",), 2, (39, 40))
    groups = groups_below(tmp_path / "runs")
    assert statistics.difference(groups["plane10", "plane2"], groups[("plane2",)], "best") is None


def test_holm_corrects_in_order_and_never_decreases():
    tests = [Difference(1, 1, 3, p) for p in (0.04, 0.01, 0.03)]
    corrected = statistics.holm([tests[0], None, tests[1], tests[2]])
    assert corrected == [pytest.approx(0.06), None, pytest.approx(0.03), pytest.approx(0.06)]


def test_standard_error():
    assert statistics.standard_error(50.0, 10_000) == pytest.approx(0.5)
    assert statistics.standard_error(90.0, 100) == pytest.approx(3)


def test_the_rule_of_thumb_takes_the_assistant_nearest_the_mean(write_run, tmp_path):
    for network, accuracy in (("plane10", 60), ("plane8", 58), ("plane4", 51), ("plane2", 40)):
        write_run((network,), 1, (accuracy,))
    for assistant in ("plane8", "plane4"):
        write_run(("plane10", assistant, "plane2"), 1, (45,))
    [study] = collect.studies(collect.collect([tmp_path / "runs"]))
    assert statistics.rule_of_thumb(study) == (50, {"plane8": 58, "plane4": 51}, "plane4")
