"""The report: its statistics against hand arithmetic, studies half-way, collections of runs, and the page as a browser shows it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from scipy.stats import ttest_rel

import report
from takd.study import collect as results
from takd.study import plan as study

SIZES = ("plane10", "plane4", "plane2")


@pytest.fixture
def record(teacher_run, tmp_path):
    """record(path, seed, accuracies): a run folder as train.py leaves it, made after a real one."""
    config = json.loads((teacher_run / "config.json").read_text())
    line = json.loads((teacher_run / "metrics.jsonl").read_text().splitlines()[0])
    summary = json.loads((teacher_run / "summary.json").read_text())

    def write(path, seed, accuracies, finished=True, folder="runs", **settings):
        run = tmp_path / folder / "-".join((*path, f"seed{seed}", *map(str, settings.values())))
        run.mkdir(parents=True)
        taught = (
            {"teacher": path[-2], "method": "kd", "method_options": {"temperature": 4.0, "lambda": 0.5}} if len(path) > 1 else {}
        )
        own = {"student": path[-1], "path": path, "seed": seed, "epochs": 2, "argv": [str(run)], **taught, **settings}
        (run / "config.json").write_text(json.dumps(config | own))
        lines = [line | {"epoch": i, "test_accuracy_percent": accuracy} for i, accuracy in enumerate(accuracies)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        if finished:
            (run / "summary.json").write_text(json.dumps(summary | {"model": path[-1], "path": path}))
        return run

    return write


@pytest.fixture
def three_seeds(record, tmp_path):
    """A study of three sizes and three seeds; 4 > 2 wins by .9, 1.0 and 1.1 points over direct distillation."""
    direct = {1: 42.0, 2: 43.0, 3: 42.5}
    for seed, accuracy in direct.items():
        record(("plane10",), seed, (50, 56 + seed))
        record(("plane4",), seed, (40, 48))
        record(("plane2",), seed, (30, accuracy - 2 * seed))
        record(("plane10", "plane4"), seed, (45, 51))
        record(("plane10", "plane2"), seed, (accuracy, accuracy - 1))
        record(("plane10", "plane4", "plane2"), seed, (30, accuracy + 0.8 + 0.1 * seed))
    return tmp_path / "runs"


def rows_of(markdown, heading):
    """The cells of the first table after a heading."""
    table = markdown.split(heading, 1)[1].split("\n\n|", 1)[1].split("\n\n")[0]
    return [[cell.strip(" *") for cell in line.strip("| ").split("|")] for line in table.splitlines()]


def test_means_differences_and_tests_are_right(three_seeds, call):
    outcome = call(report, three_seeds)
    assert outcome.status == 0, outcome.err
    text = (three_seeds / "report.md").read_text()
    rows = {row[0]: row for row in rows_of(text, "### All paths")}
    # 42.9, 44.0 and 43.6; 42, 43 and 42.5 at the first epoch, a point less at the last.
    assert rows["10 > 4 > 2"][2:] == ["3", "43.50 ± 0.56", "43.50 ± 0.56"]
    assert rows["10 > 2 (BLKD)"][2:] == ["3", "42.50 ± 0.50", "41.50 ± 0.50"]
    assert rows["plane10 alone (teacher)"][2:] == ["3", "58.00 ± 1.00", "58.00 ± 1.00"]
    assert list(rows)[2] == "10 > 4 > 2", "the best is first"
    expected = ttest_rel((42.9, 44.0, 43.6), (42.0, 43.0, 42.5)).pvalue
    differences = {row[0]: row for row in rows_of(text, "### Against")}
    assert differences["10 > 4 > 2"][1:3] == ["+1.00 ± 0.10", f"{expected:.3f}"]
    assert "Better than direct distillation by more than the noise between seeds: 10 > 4 > 2." in text
    assert "3 of 3" not in text and "half-way" not in text


def test_holm_corrects_in_order_and_never_falls():
    made = [results.Difference(1, 1, 3, p) for p in (0.04, 0.01, 0.03)]
    assert results.holm([made[0], None, made[1], made[2]]) == [pytest.approx(0.06), None, pytest.approx(0.03), pytest.approx(0.06)]


def test_equal_differences_are_no_test(record, tmp_path):
    for seed in (1, 2):
        record(("plane10", "plane2"), seed, (40, 41))
        record(("plane2",), seed, (39, 40))
    groups = {group.path: group for group in results.group(results.collect([tmp_path / "runs"])[0])}
    made = results.difference(groups["plane10", "plane2"], groups[("plane2",)], "best")
    assert (made.mean, made.deviation, made.seeds, made.p) == (1, 0, 2, None)


def test_half_way_is_marked_and_left_out_of_means(three_seeds, record, call):
    shutil.rmtree(three_seeds / "plane10-plane4-plane2-seed2")
    shutil.rmtree(three_seeds / "plane2-seed3")
    record(("plane2",), 3, (99,), finished=False)
    planned = study.plan(three_seeds, SIZES, study.choose_paths(SIZES, ()), (1, 2, 3), {}, [])
    study.record(three_seeds, planned)
    assert call(report, three_seeds).status == 0
    text = (three_seeds / "report.md").read_text()
    rows = {row[0]: row for row in rows_of(text, "### All paths")}
    assert "16 of 18 trainings are finished" in text
    assert rows["10 > 4 > 2"][2:4] == ["2 of 3", "43.25 ± 0.49"]
    assert rows["plane2 alone (NOKD)"][2:4] == ["2 of 3", "39.50 ± 0.71"], "99 % of an unfinished run counts nowhere"


def test_one_seed_is_said_to_prove_nothing(record, tmp_path, call):
    for path, accuracy in ((("plane10",), 50), (("plane2",), 40), (("plane10", "plane2"), 42)):
        record(path, 1, (accuracy,))
    assert call(report, tmp_path / "runs").status == 0
    assert "With one seed no test across seeds is possible" in (tmp_path / "runs" / "report.md").read_text()


def test_the_papers_numbers_stand_beside_ours(record, tmp_path, call):
    for path, accuracy in ((("plane10",), 57), (("plane4",), 47), (("plane2",), 41), (("plane10", "plane4", "plane2"), 45)):
        record(path, 1, (accuracy,), dataset="cifar100")
    assert call(report, tmp_path / "runs").status == 0
    rows = {row[0]: row for row in rows_of((tmp_path / "runs" / "report.md").read_text(), "### All paths")}
    assert rows["path"][5] == "paper" and rows["10 > 4 > 2"][5] == "44.92" and rows["plane2 alone (NOKD)"][5] == "41.09"


def test_published_numbers_are_found_by_data_path_and_method():
    found = [
        results.published_for("cifar10", ("resnet20", "resnet20"), "at_st"),
        results.published_for("cifar100", ("resnet20",), None),
        results.published_for("cifar100", ("resnet110", "resnet20"), "rkd"),
        results.published_for("cifar100", ("resnet110", "resnet20"), "st"),
    ]
    assert found[0] == {"hankyul2": 92.6} and found[2] == {"RepDistiller": 69.25} and found[3] == {}
    assert found[1]["hankyul2"] == 67.6 and found[1]["RepDistiller"] == 69.06


def test_published_numbers_are_of_networks_that_exist():
    for entry in results.published():
        for path in entry["percent"]:
            networks = list(dict.fromkeys(path.split(" > ")))  # a network may teach one of its own kind
            assert study.check_sizes([*networks, "resnet8" if "plane" in path else "plane2"]), path


def test_rule_of_thumb_takes_the_assistant_nearest_the_mean(record, tmp_path):
    for network, accuracy in (("plane10", 60), ("plane8", 58), ("plane4", 51), ("plane2", 40)):
        record((network,), 1, (accuracy,))
    for assistant in ("plane8", "plane4"):
        record(("plane10", assistant, "plane2"), 1, (45,))
    [found] = results.studies(results.collect([tmp_path / "runs"])[0])
    assert results.rule_of_thumb(found) == (50, {"plane8": 58, "plane4": 51}, "plane4")


def test_a_collection_becomes_a_leaderboard(three_seeds, record, tmp_path, call):
    record(("plane10", "plane2"), 1, (60, 61), folder="other", method_options={"temperature": 9.0, "lambda": 0.1})
    record(("resnet8",), 7, (88,), folder="other", dataset="cifar10")
    assert call(report, three_seeds, tmp_path / "other", "--output", tmp_path / "board").status == 0
    text = (tmp_path / "board" / "report.md").read_text()
    board = [row[:5] + row[6:8] for row in rows_of(text, "### digits")[2:]]
    plane2 = [row for row in board if row[0] == "plane2"]
    assert plane2[0] == ["plane2", "1", "plane10", "kd", "T 9, λ 0.1", "1", "61.00"], "another setting is another row"
    assert plane2[1][:3] == ["plane2", "2", "plane10 > plane4"] and plane2[1][5:] == ["3", "43.50 ± 0.56"]
    assert "88.52 (paper)" in text.split("### cifar10")[1]
    header, first = rows_of(text, "### digits")[0], rows_of(text, "### digits")[2]
    assert float(first[header.index("s an epoch")]) > 0


def test_two_studies_of_the_same_networks_stand_apart(three_seeds, tmp_path, call):
    shutil.copytree(three_seeds, tmp_path / "again")
    for folder in (three_seeds, tmp_path / "again"):
        study.record(folder, study.plan(folder, SIZES, study.choose_paths(SIZES, ()), (1, 2, 3), {}, []))
    assert call(report, three_seeds, tmp_path / "again", "--output", tmp_path / "both").status == 0
    text = (tmp_path / "both" / "report.md").read_text()
    assert text.count("## From plane10 to plane2 on digits") == 2 and text.count("18 of 18") == 0
    figures = re.findall(r"\]\((figures/.*?\.png)\)", text)
    assert len(figures) == len(set(figures)) == 6 and all((tmp_path / "both" / name).exists() for name in figures)


def test_the_page_needs_nothing_else(three_seeds, call):
    assert call(report, three_seeds).status == 0
    page = (three_seeds / "report.html").read_text()
    assert page.count("<svg") == 3 and not re.search(r'(src|href)="(?!#)|url\((?!#)|@import', page.replace("xlink:href", "href"))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "figures of one page do not share the names of their parts"
    for name in ("paths", "assistants", "curves"):
        with Image.open(three_seeds / "figures" / f"plane10-plane2-digits-{name}.png") as image:
            assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24)) > 20
        assert (three_seeds / "figures" / f"plane10-plane2-digits-{name}.svg").read_text().rstrip().endswith("</svg>")


def test_damaged_runs_are_left_out_and_said(three_seeds, call):
    (three_seeds / "plane2-seed1" / "summary.json").write_text("{")
    outcome = call(report, three_seeds)
    assert outcome.status == 0 and "left out" in outcome.err and "plane2-seed1" in outcome.err
    assert "Left out, as it cannot be read" in (three_seeds / "report.md").read_text()


@pytest.mark.parametrize("given", ["nowhere", "empty"])
def test_a_report_over_nothing_is_one_line(call, tmp_path, given):
    (tmp_path / "empty").mkdir()
    outcome = call(report, tmp_path / given)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and given in outcome.err
    assert not list((tmp_path / "empty").iterdir())


def test_torch_is_not_needed(three_seeds):
    code = "import sys, report; report.main([sys.argv[1]]); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, three_seeds], cwd=Path(report.__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_browser_shows_the_page(three_seeds, call, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium on this machine")
    assert call(report, three_seeds).status == 0
    headless = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    page = (three_seeds / "report.html").as_uri()
    shot = tmp_path / "page.png"
    subprocess.run(
        [*headless, f"--screenshot={shot}", "--window-size=1200,5000", "--hide-scrollbars", page],
        check=True,
        timeout=120,
        capture_output=True,
    )
    with Image.open(shot) as image:
        colors = dict(map(reversed, image.convert("RGB").getcolors(1 << 24)))
    assert colors.get((217, 115, 13), 0) > 200, "the best path's mark is drawn"
    dom = subprocess.run([*headless, "--dump-dom", page], check=True, timeout=120, capture_output=True, text=True).stdout
    assert dom.count("<tr") > 20 and dom.count("</svg>") == 3
