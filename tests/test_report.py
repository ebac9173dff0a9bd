"""report.py: reports of studies, finished and partial, of collections and kept files, and their HTML page."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import listing
from PIL import Image
from scipy.stats import ttest_rel

import report
from takd.study import plan

SIZES = ("plane10", "plane4", "plane2")


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
    verdict = (
        f"10 > 4 > 2 is +1.00 ± 0.10 points against direct distillation (p {expected:.3f}), which is more than the"
    )
    assert f"{verdict} noise between seeds." in text
    assert "3 of 3" not in text and "partial" not in text
    # At the last epoch 42.9 - 41, 44 - 42 and 43.6 - 41.5.
    assert "Through 4 against direct, with an unknown number of training steps: +2.00 points " in text
    assert outcome.out.startswith("answer    Assistants help by 2.00 points (through 4, training steps not matched).")


def test_unfinished_runs_are_marked_and_left_out_of_means(three_seeds, write_run, call):
    shutil.rmtree(three_seeds / "plane10-plane4-plane2-seed2")
    shutil.rmtree(three_seeds / "plane2-seed3")
    write_run(("plane2",), 3, (99,), finished=False)
    planned = plan.plan(three_seeds, SIZES, plan.choose_paths(SIZES, ()), (1, 2, 3), {}, [])
    plan.record(three_seeds, planned)
    assert call(report, three_seeds).status == 0
    text = (three_seeds / "report.md").read_text()
    rows = {row[0]: row for row in rows_of(text, "### All paths")}
    assert "16 of 18 trainings are finished" in text
    assert rows["10 > 4 > 2"][2:4] == ["2 of 3", "43.25 ± 0.49"]
    assert rows["plane2 alone (NOKD)"][2:4] == ["2 of 3", "39.50 ± 0.71"], "99 % of an unfinished run counts nowhere"


def test_one_seed_allows_no_test(write_run, tmp_path, call):
    for path, accuracy in ((("plane10",), 50), (("plane2",), 40), (("plane10", "plane2"), 42)):
        write_run(path, 1, (accuracy,))
    assert call(report, tmp_path / "runs").status == 0
    text = (tmp_path / "runs" / "report.md").read_text()
    assert "paired t-test" not in text and "With one seed, ± is the standard error" in text
    # 42 and 40 % of 359 images: sqrt(.42 x .58 / 359 + .4 x .6 / 359) is 3.67 points, and 2 points p = 0.586.
    assert "+2.00 ± 3.67 points against base (p 0.586), which is not more than the sampling error" in text


def test_the_papers_numbers_stand_beside_ours(write_run, tmp_path, call):
    for path, accuracy in (
        (("plane10",), 57),
        (("plane4",), 47),
        (("plane2",), 41),
        (("plane10", "plane2"), 42),
        (("plane10", "plane4", "plane2"), 45),
    ):
        write_run(path, 1, (accuracy,), dataset="cifar100")
    assert call(report, tmp_path / "runs").status == 0
    rows = {row[0]: row for row in rows_of((tmp_path / "runs" / "report.md").read_text(), "### All paths")}
    assert rows["path"][5] == "paper" and rows["10 > 4 > 2"][5] == "44.92 (+0.08)"
    assert rows["plane2 alone (NOKD)"][5] == "41.09 (−0.09)"


def test_a_collection_becomes_a_leaderboard(three_seeds, write_run, tmp_path, call):
    write_run(("plane10", "plane2"), 1, (60, 61), folder="other", method_options={"temperature": 9.0, "lambda": 0.1})
    write_run(("resnet8",), 7, (88,), folder="other", dataset="cifar10")
    assert call(report, three_seeds, tmp_path / "other", "--output", tmp_path / "board").status == 0
    text = (tmp_path / "board" / "report.md").read_text()
    board = [row[:4] + row[5:7] for row in rows_of(text, "### digits")[2:]]
    plane2 = [row for row in board if row[0] == "plane2"]
    assert plane2[0] == ["plane2", "1", "plane10", "kd (T 9, λ 0.1)", "1", "61.00"], "another setting is another row"
    assert plane2[1][:3] == ["plane2", "2", "plane10 > plane4"] and plane2[1][4:] == ["3", "43.50 ± 0.56"]
    assert ["resnet8 alone", "best", "88.00", "88.52", "−0.52", "paper"] in [
        row[:6] for row in rows_of(text, "Beside published")
    ]
    header, first = rows_of(text, "### digits")[0], rows_of(text, "### digits")[2]
    assert float(first[header.index("s per epoch")]) > 0


def test_two_studies_of_the_same_networks_stand_apart(three_seeds, tmp_path, call):
    shutil.copytree(three_seeds, tmp_path / "again")
    for folder in (three_seeds, tmp_path / "again"):
        plan.record(folder, plan.plan(folder, SIZES, plan.choose_paths(SIZES, ()), (1, 2, 3), {}, []))
    assert call(report, three_seeds, tmp_path / "again", "--output", tmp_path / "both").status == 0
    text = (tmp_path / "both" / "report.md").read_text()
    first, *sections = text.split("## From plane10 to plane2 on digits")
    assert "## Do assistants help? plane2 from plane10 on digits" in first and "a run of the same seed" in first
    assert len(sections) == 2 and "partial" not in text, "each is complete"
    for section in sections:
        assert [row[2] for row in rows_of(section, "### All paths")[2:]] == ["3"] * 4
    figures = re.findall(r"\]\((figures/.*?\.png)\)", text)
    assert len(figures) == len(set(figures)) == 7 and all((tmp_path / "both" / name).exists() for name in figures)


def test_the_html_page_is_self_contained(three_seeds, call):
    assert call(report, three_seeds).status == 0
    page = (three_seeds / "report.html").read_text()
    assert page.count("<svg") == 7 and not re.search(
        r'(src|href)="(?!#)|url\((?!#)|@import', page.replace("xlink:href", "href")
    )
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "figures of one page do not share the names of their parts"
    for name in ("paths", "assistants", "curves"):
        with Image.open(three_seeds / "figures" / f"plane10-plane2-digits-{name}.png") as image:
            assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24)) > 20
        assert (three_seeds / "figures" / f"plane10-plane2-digits-{name}.svg").read_text().rstrip().endswith("</svg>")


def test_damaged_runs_are_left_out_with_a_warning(three_seeds, call):
    (three_seeds / "plane2-seed1" / "summary.json").write_text("{")
    outcome = call(report, three_seeds)
    assert outcome.status == 0 and "left out" in outcome.err and "plane2-seed1" in outcome.err
    assert "Left out, as it cannot be read" in (three_seeds / "report.md").read_text()


def test_unequal_seeds_are_compared_over_those_in_common(write_run, tmp_path, call):
    """Alone once, each path three times: against training alone all is over seed 1, in which both are above it."""
    write_run(("plane2",), 1, (70.0,), dataset="cifar10")
    for seed, direct, through in ((1, 70.28, 70.1), (2, 69.0, 72.0), (3, 69.1, 72.1)):
        write_run(("plane10", "plane2"), seed, (direct,), dataset="cifar10")
        write_run(("plane10", "plane4", "plane2"), seed, (through,), dataset="cifar10")
    assert call(report, tmp_path / "runs").status == 0
    text = (tmp_path / "runs/report.md").read_text()
    best = (
        "The best path is plane10 > plane4 > plane2: 71.40 ± 1.13 % at its best epoch (mean of 3 seeds (1, 2 and 3))."
    )
    alone = "Over seed 1, which plane2 alone has too, it is +0.10 points against training alone (70.00 %)."
    assert best in text and alone in text and "No path is better" not in text
    rows = rows_of(text, "### Against")
    assert rows[0][3] == "against NOKD, seed 1, points" and rows[2][3:] == ["+0.10 ± 0.65", "1.000"]
    assert "No path differs from training alone by more than the sampling error of the test images." in text


def test_rows_never_look_alike(write_run, tmp_path, call):
    """Runs on other images have tables of their own; of other settings, these are in the row."""
    for i, settings in enumerate(
        (
            *({}, {"train_images": 1000}, {"image_size": 64}, {"epochs": 3}),
            *({"label_smoothing": 0.2}, {"batch_size": 64}, {"precision": "auto"}, {"folder": "again"}),
            {"test_images": 1000},
            *({"dataset": "folder", "images": digest, "dataset_dir": "pets"} for digest in ("1" * 32, "2" * 32)),
        )
    ):
        write_run(("plane2",), 1, (60 + i,), **{"dataset": "cifar10"} | settings | {"origins": {"case": str(i)}})
    assert call(report, tmp_path / "runs", tmp_path / "again", "--output", tmp_path / "board").status == 0
    text = (tmp_path / "board/report.md").read_text()
    board = [tuple(row[:1] + row[2:-4]) for row in rows_of(text, "### cifar10")[2:]]
    assert len(board) == len(set(board)) == 9, "in other columns than rank, accuracies and time"
    assert {row[-1] for row in board} > {"paper, 1, precision fp32, 1,000 training images"}
    assert "### folder pets (images 11111111)" in text and "### folder pets (images 22222222)" in text
    beside = [row[2] for row in rows_of(text, "Beside published")[2:]]
    assert sorted(beside) == ["60.00", "63.00", "64.00", "65.00", "66.00", "67.00"], "those on all images as they are"


@pytest.mark.parametrize("epochs, compared", [(2, 0), (3, 1)])
def test_methods_are_compared_once(write_run, tmp_path, call, epochs, compared):
    """In a table of methods where all else is equal, and else as arms."""
    for seed in (1, 2, 3):
        write_run(("plane4", "plane2"), seed, (40, 50 + seed))
        write_run(("plane4", "plane2"), seed, (40, 52 - seed), method="logit", method_options={}, epochs=epochs)
    assert call(report, tmp_path / "runs").status == 0
    text = (tmp_path / "runs/report.md").read_text()
    assert (text.count("## Ways to train plane2"), text.count("# Methods: plane4 > plane2")) == (compared, 1 - compared)


def test_failed_trainings_are_marked_with_their_reason(three_seeds, call, tmp_path):
    trainings = plan.plan(three_seeds, SIZES, plan.choose_paths(SIZES, ()), (1, 2, 3, 4), {}, [])
    plan.record(three_seeds, trainings)
    for training in trainings:
        if not training.finished and training.path != ("plane10",):
            training.run.fail(f"its teacher is {training.path[-2:][0]}")
    finished = next(training for training in trainings if training.finished)
    finished.run.fail("an earlier start")
    shutil.rmtree(three_seeds / "plane4-seed1")
    (three_seeds / "plane4-seed1").mkdir()
    (three_seeds / "plane4-seed1/.failed").write_text("out of memory")
    assert call(report, three_seeds, "--keep", tmp_path / "kept.jsonl").status == 0
    for runs in (three_seeds, tmp_path / "kept.jsonl"):
        assert call(report, runs, "--output", tmp_path / "out").status == 0
        text = (tmp_path / "out/report.md").read_text()
        assert "plane10 > plane4, seed 4: its teacher is plane10" in text and "plane4, seed 1: out of memory" in text
        assert "an earlier start" not in text and "failed and unfinished ones are marked" in text


@pytest.mark.parametrize("given", ["nowhere", "empty", "empty.jsonl", "damaged.jsonl", "notes.txt"])
def test_a_report_over_no_runs_is_one_line(call, tmp_path, given):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "damaged.jsonl").write_text('{"run": "plane2-se')
    (tmp_path / "notes.txt").touch()
    before = listing(tmp_path)
    outcome = call(report, tmp_path / given)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and given in outcome.err
    assert listing(tmp_path) == before


def test_a_kept_file_gives_the_same_report(three_seeds, write_run, tmp_path, call):
    """Of an unfinished study too: its plan is kept with the records."""
    shutil.rmtree(three_seeds / "plane2-seed3")
    write_run(("plane2",), 3, (99,), finished=False)
    plan.record(three_seeds, plan.plan(three_seeds, SIZES, plan.choose_paths(SIZES, ()), (1, 2, 3, 4), {}, []))
    assert call(report, three_seeds).status == 0
    kept = tmp_path / "kept.jsonl"
    before = listing(three_seeds)
    outcome = call(report, three_seeds, "--keep", kept)
    assert (outcome.status, outcome.out) == (0, f"kept      18 runs in {kept}\n") and listing(three_seeds) == before
    assert call(report, kept, "--output", tmp_path / "from kept").status == 0
    texts = [(folder / "report.md").read_text() for folder in (three_seeds, tmp_path / "from kept")]
    assert texts[0] == texts[1] and "17 of 24 trainings are finished" in texts[0]
    assert call(report, kept).status == 0 and (tmp_path / "kept/report.md").read_text() == texts[0]


def test_keep_needs_a_jsonl_name(three_seeds, tmp_path, call):
    before = listing(tmp_path)
    outcome = call(report, three_seeds, "--keep", tmp_path / "kept.json")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "ends in .jsonl" in outcome.err
    assert listing(tmp_path) == before


def test_table_prints_markdown(three_seeds, tmp_path, call):
    """Only finished runs of the networks named, the best first; nothing is written."""
    before = listing(tmp_path)
    outcome = call(report, three_seeds, "--table", "plane2")
    assert (outcome.status, outcome.err) == (0, "") and listing(tmp_path) == before
    header, _, *rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in outcome.out.splitlines()]
    assert header[:6] == ["network", "method", "recipe, epochs", "seeds", "best epoch, %", "last epoch, %"]
    kd, recipe = "kd (T 4, λ 0.5)", "paper, 2, precision fp32"
    assert [row[:6] for row in rows] == [
        ["plane10 > plane4 > plane2", kd, recipe, "3", "43.50 ± 0.56", "43.50 ± 0.56"],
        ["plane10 > plane2", kd, recipe, "3", "42.50 ± 0.50", "41.50 ± 0.50"],
        ["plane2 alone", "", recipe, "3", "38.50 ± 1.80", "38.50 ± 1.80"],
    ]
    everything = call(report, three_seeds, "--table").out.splitlines()
    assert len(everything) == 2 + 6 and everything[2].startswith("| plane10 alone |")


def test_torch_is_not_needed(three_seeds):
    code = "import sys, report; report.main([sys.argv[1]]); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, three_seeds], cwd=Path(report.__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_browser_renders_the_page(three_seeds, call, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no Chromium on this machine")
    assert call(report, three_seeds).status == 0
    page, shot = (three_seeds / "report.html").as_uri(), tmp_path / "page.png"

    def browse(*flags):
        switches = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
        command = [browser, *switches, f"--user-data-dir={tmp_path / 'user'}", *flags, page]
        return subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout

    browse(f"--screenshot={shot}", "--window-size=1200,5000", "--hide-scrollbars")
    with Image.open(shot) as image:
        colors = dict(map(reversed, image.convert("RGB").getcolors(1 << 24)))
    assert colors.get((217, 115, 13), 0) > 200, "the best path's mark is drawn"
    dom = browse("--dump-dom")
    assert dom.count("<tr") > 20 and dom.count("</svg>") == 7
