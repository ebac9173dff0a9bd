"""Statistics of a report against hand arithmetic."""

import itertools
import math
import random

import pytest

from takd.study import collect, statistics
from takd.study.statistics import Difference


def groups_below(folder):
    return {group.path: group for group in collect.group(collect.collect([folder]).runs.values())}


def test_paired_differences(three_seeds):
    groups = groups_below(three_seeds)
    found = statistics.difference(groups["plane10", "plane4", "plane2"], groups["plane10", "plane2"], "best")
    assert (found.mean, found.deviation, found.seeds) == (pytest.approx(1), pytest.approx(0.1), 3)
    t = 1 / (0.1 / math.sqrt(3))  # with 2 degrees of freedom p is elementary
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    half = 4.302652729911 * 0.1 / math.sqrt(3)
    assert found.interval == (pytest.approx(1 - half), pytest.approx(1 + half))


def test_equal_differences_have_no_p_value(write_run, tmp_path):
    for seed in (1, 2):
        write_run(("plane10", "plane2"), seed, (40, 41))
        write_run(("plane2",), seed, (39, 40))
    groups = groups_below(tmp_path / "runs")
    found = statistics.difference(groups["plane10", "plane2"], groups[("plane2",)], "best")
    assert (found.mean, found.deviation, found.seeds, found.p) == (1, 0, 2, None)
    assert (found.interval, found.detectable) == (None, None)


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


# ------------------------------------------------------------------------------------------------ distributions
@pytest.mark.parametrize(
    "freedom, tabulated",
    [
        (1, 12.7062047362), (2, 4.3026527299), (3, 3.1824463053), (4, 2.7764451052), (5, 2.5705818356),
        (9, 2.2621571628), (10, 2.2281388520), (30, 2.0422724563), (100, 1.9839715185), (10**6, 1.9599663600),
    ],
)  # fmt: skip
def test_critical_values_are_the_tables(freedom, tabulated):
    assert statistics.critical_t(freedom) == pytest.approx(tabulated, abs=1e-8)
    assert statistics.t_test(tabulated, freedom) == pytest.approx(0.05, abs=1e-8)


def test_p_values_of_one_and_two_degrees_of_freedom_are_elementary():
    for t in (0, 0.01, 1, -2.5, 40):
        assert statistics.t_test(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(abs(t)), abs=1e-12)
        assert statistics.t_test(t, 2) == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t), abs=1e-12)


def test_the_incomplete_beta_function_is_a_binomial_sum_for_whole_numbers():
    for a, b, x in itertools.product((1, 2, 7, 30), (1, 3, 25), (0.0, 1e-6, 0.2, 0.5, 0.93, 1.0)):
        n = a + b - 1
        expected = sum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(a, n + 1))
        assert statistics.incomplete_beta(x, a, b) == pytest.approx(expected, abs=1e-12)


def test_distributions_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom, t in itertools.product((1, 2, 9, 40), (0.3, 2.1, 15.0)):
        assert statistics.t_test(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-10)
    for seeds in (2, 3, 10, 50):
        critical, effect = stats.t.ppf(0.975, seeds - 1), statistics.detectable_effect(seeds)
        for size in (effect, effect / 3):
            noncentral = stats.nct(seeds - 1, size * math.sqrt(seeds))
            expected = noncentral.sf(critical) + noncentral.cdf(-critical)
            assert statistics.power(size, seeds) == pytest.approx(expected, abs=1e-8)


def test_the_detectable_effect_is_found_four_times_in_five():
    draw, n = random.Random(1), 6
    effect = statistics.detectable_effect(n)
    found = [statistics.paired(draw.gauss(effect, 1) for _ in range(n)).p < 0.05 for _ in range(2000)]
    assert sum(found) / len(found) == pytest.approx(0.8, abs=0.03)
    assert statistics.power(0, n) == pytest.approx(0.05)


def test_without_an_effect_intervals_cover_and_holm_keeps_the_error_of_the_family():
    """Four arms alike over ten chains: 95 % of intervals hold 0, and in 5 % of studies at most any pair differs."""
    draw, covered, wrong, uncorrected = random.Random(0), 0, 0, 0
    for _ in range(studies := 600):
        arms = [[draw.gauss(0, 1) for _ in range(10)] for _ in range(4)]
        pairs = [statistics.paired(a - b for a, b in zip(*two, strict=True)) for two in itertools.combinations(arms, 2)]
        covered += sum(pair.interval[0] < 0 < pair.interval[1] for pair in pairs)
        wrong += min(statistics.holm(pairs)) < 0.05
        uncorrected += min(pair.p for pair in pairs) < 0.05
    assert covered / (6 * studies) == pytest.approx(0.95, abs=0.012)
    assert 0.01 < wrong / studies < 0.07 and uncorrected / studies > 0.15


def test_hits_by_chance():
    assert statistics.at_least(0, [0.3, 0.1]) == 1
    assert statistics.at_least(1, [0.5, 0.25, 0.25]) == pytest.approx(1 - 0.5 * 0.75 * 0.75)
    binomial = sum(math.comb(10, k) * 2 ** (10 - k) for k in range(8, 11)) / 3**10
    assert statistics.at_least(8, [1 / 3] * 10) == pytest.approx(binomial)
