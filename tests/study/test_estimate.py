"""Estimates of time and disk: hand arithmetic, earlier runs on this machine, and lines of train.py --measure."""

from conftest import read_json

from takd.config import run_config
from takd.study import estimate, plan
from takd.study.estimate import Cost


def config(*argv):
    return run_config.parse(["--dataset", "digits", *argv], elsewhere=True)


def test_earlier_runs_give_the_costs(teacher_run):
    recorded, summary = read_json(teacher_run / "config.json"), read_json(teacher_run / "summary.json")
    expected = {"plane2": Cost(summary["seconds"] / recorded["epochs"], 13_082)}
    assert estimate.earlier_costs([teacher_run.parent], config(), "cpu") == expected
    for other in (config("--dataset", "cifar10"), config("--batch-size", "64"), config("--train-images", "100")):
        assert estimate.earlier_costs([teacher_run.parent], other, "cpu") == {}
    assert estimate.earlier_costs([teacher_run.parent], config(), "cuda") == {}


def test_a_measured_line_gives_the_seconds_of_an_epoch():
    """Of 1,438 images in training and 359 in evaluation, or of the number that --train-images leaves."""
    line = {"train_images_per_second": 100.0, "evaluation_images_per_second": 50.0, "parameters": 13_082}
    assert estimate.measured_cost(line, config()) == Cost(14.38 + 7.18, 13_082)
    assert estimate.measured_cost(line, config("--train-images", "1000")) == Cost(10 + 7.18, 13_082)


def test_an_estimate_adds_up():
    sizes, common = ("plane10", "plane2"), {"epochs": 10, "dataset": "cifar100", "augment": "none"}
    trainings = plan.plan("runs", sizes, [sizes], (1,), common, [])  # plane10, plane10 > plane2, plane2
    configs = {training: training.config(elsewhere=True) for training in trainings}
    costs = {"plane10": Cost(60, 3_000_000), "plane2": Cost(6, 200_000)}
    seconds, total, disk = estimate.estimate(trainings, configs, costs, jobs=1)
    assert [seconds[training] for training in trainings] == [600, 60 + 20, 60], (
        "the table costs one pass of the teacher"
    )
    assert total == 740
    assert disk == 24 * 3_400_000 + 2 * 50_000 * 100
    assert estimate.estimate(trainings, configs, costs, jobs=2)[1] == 680, "no shorter than the longest chain"
