"""train.py on digits: the records of a run, agreement with evaluate.py, and continuing bit for bit."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import last_weights, listing, read_json, read_lines, same_weights, wait_until

import data_loader
import evaluate
import model_factory
import train
from takd.config import names
from takd.run import checkpoint

METRICS = {"epoch", "learning_rate", "train_loss", "train_accuracy_percent", "test_loss", "test_accuracy_percent"}
METRICS |= {"train_images_per_second", "train_seconds", "evaluation_seconds"}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, run_command, tiny, teacher_run):
    """A finished distillation by the real script: (folder, outcome)."""
    folder = tmp_path_factory.mktemp("distilled") / "run"
    teacher = teacher_run / "plane2_seed1_best.pth.tar"
    command = (*tiny, "--teacher", "plane2", "--teacher-checkpoint", teacher, "--lambda", "0.3", "--epochs", "2")
    outcome = run_command("train.py", *command, "--teacher-cache", "live", "--run-dir", folder)
    assert outcome.status == 0, outcome.err
    return folder, outcome


def test_files_of_a_run(distilled):
    found = sorted(re.sub(r"tfevents\..*", "tfevents", path.name) for path in distilled[0].iterdir())
    assert [name for name in found if not name.startswith(".")] == [
        "config.json",
        "events.out.tfevents",
        "last.pth.tar",
        "metrics.jsonl",
        "plane2_seed1_best.pth.tar",
        "summary.json",
    ]


def test_config_records_the_origin_of_each_value(distilled):
    config = read_json(distilled[0] / "config.json")
    expected = {
        "student": ("plane2", "command line"),
        "lambda": (0.3, "command line"),
        "temperature": (4.0, "default of kd"),
        "batch_size": (128, "recipe paper"),
        "seed": (1, "default"),
        "momentum": (0.9, "recipe paper"),
        "augment": ("none", "data set digits"),
    }
    for key, (value, origin) in expected.items():
        assert (config[key], config["origins"][key]) == (value, origin)
    assert set(config["origins"]) <= set(config)
    assert config["argv"][1:3] == ["--student", "plane2"]
    assert {"python", "torch", "device", "threads", "commit"} <= set(config["environment"])


def test_metrics_have_a_line_per_epoch(distilled):
    records = read_lines(distilled[0] / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [0, 1]
    assert [record["learning_rate"] for record in records] == pytest.approx([0.01, 0.001])
    for record in records:
        assert set(record) == METRICS | {"train_ce", "train_kd"}
        assert record["train_loss"] == pytest.approx(0.7 * record["train_ce"] + 0.3 * record["train_kd"], rel=1e-5)
        assert 10 < record["test_accuracy_percent"] <= 100
        assert record["train_images_per_second"] == pytest.approx(1438 / record["train_seconds"])


def test_summary_holds_the_best_and_the_last_epoch(distilled):
    summary, records = read_json(distilled[0] / "summary.json"), read_lines(distilled[0] / "metrics.jsonl")
    best = max(records, key=lambda record: record["test_accuracy_percent"])
    for name, record in (("best", best), ("last", records[-1])):
        outcome = summary[name]
        assert outcome["split"] == "test" and outcome["accuracy_percent"] == outcome["test_accuracy_percent"]
        assert all(outcome[key] == record[key] for key in ("epoch", "test_loss", "test_accuracy_percent", "train_loss"))
    assert (summary["model"], summary["teacher"], summary["path"]) == ("plane2", "plane2", ["plane2", "plane2"])
    assert summary["parameters"] == 13_082 and Path(summary["checkpoint"]).is_file()


def test_console_lines(distilled):
    out = distilled[1].out.splitlines()
    heading = next(i for i, line in enumerate(out) if line.split()[:2] == ["epoch", "lr"])
    rows = out[heading + 1 : heading + 3]
    assert [row.split()[0] for row in rows] == ["1/2", "2/2"] and len({len(row) for row in rows}) == 1
    assert out[-1].startswith("done ") and len(out) == heading + 4
    assert any(re.match(r"teacher +\d\d\.\d\d % on digits/test", line) for line in out)
    assert distilled[1].err == ""


def test_tensorboard_events(distilled):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(distilled[0]))
    events.Reload()
    tags = {
        "loss/train",
        "loss/test",
        "accuracy_percent/train",
        "accuracy_percent/test",
        "learning_rate",
        "ce/train",
        "kd/train",
    }
    assert tags | {"images_per_second/train"} <= set(events.Tags()["scalars"])
    for tag, key in (("loss/test", "test_loss"), ("kd/train", "train_kd")):
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(
            [record[key] for record in read_lines(distilled[0] / "metrics.jsonl")]
        )
        assert [event.step for event in events.Scalars(tag)] == [0, 1]


def test_evaluate_agrees_with_the_record(distilled, run_command):
    summary = read_json(distilled[0] / "summary.json")
    outcome = run_command("evaluate.py", "--checkpoint", summary["checkpoint"], "--json", "--cuda", "0")
    assert (outcome.status, outcome.err) == (0, "")
    result = json.loads(outcome.out)
    assert result["test_accuracy_percent"] == pytest.approx(summary["best"]["test_accuracy_percent"], abs=0.01)
    assert result["test_loss"] == pytest.approx(summary["best"]["test_loss"], rel=1e-4)
    assert (result["model"], result["dataset"], result["images"], result["parameters"]) == (
        "plane2",
        "digits",
        359,
        13_082,
    )
    assert result["test_accuracy_percent"] <= result["test_top5_percent"] <= 100


def test_evaluate_agrees_after_a_training_in_bf16(tmp_path, call, tiny):
    assert call(train, *tiny, "--precision", "bf16", "--run-dir", tmp_path / "run").status == 0
    summary = read_json(tmp_path / "run/summary.json")
    result = json.loads(call(evaluate, "--checkpoint", summary["checkpoint"], "--json", "--cuda", "0").out)
    assert result["test_accuracy_percent"] == pytest.approx(summary["best"]["test_accuracy_percent"], abs=0.01)


def test_evaluate_a_checkpoint_of_the_released_code(teacher_run, tmp_path, call):
    """Such files name neither network nor data set, and expect the released code's normalisation on any data set."""
    contents = checkpoint.read(teacher_run / "plane2_seed1_best.pth.tar")
    kept = {key: contents[key] for key in ("model_state_dict", "optimizer_state_dict", "epoch")}
    torch.save(kept, tmp_path / "plane2_None_best.pth.tar")
    command = ("--checkpoint", tmp_path / "plane2_None_best.pth.tar", "--json", "--cuda", "0")
    assert "--model" in call(evaluate, *command).err
    assert "--dataset" in call(evaluate, *command, "--model", "plane2").err
    assert "not plane4" in call(evaluate, *command, "--model", "plane4", "--dataset", "digits").err
    result = json.loads(call(evaluate, *command, "--model", "plain2", "--dataset", "digits").out)
    network = model_factory.create("plane2", 10).eval()
    network.load_state_dict(kept["model_state_dict"])
    test = data_loader.read("digits").test
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (names.RELEASED_MEAN, names.RELEASED_STD))
    with torch.no_grad():
        right = network((test.images.float() / 255 - mean) / std).argmax(1) == test.labels
    assert result["test_accuracy_percent"] == pytest.approx(100 * float(right.double().mean()), abs=0.01)


def test_evaluate_prints_a_table_of_several(distilled, teacher_run, call):
    files = [folder / "plane2_seed1_best.pth.tar" for folder in (teacher_run, distilled[0])]
    out = call(evaluate, "--checkpoint", *files, "--cuda", "0").out.splitlines()
    assert len(out) == 3 and "labels" in out[1] and len({line.index("digits") for line in out[1:]}) == 1


def test_json_prints_only_the_summary(tmp_path, call, tiny):
    outcome = call(train, *tiny, "--run-dir", tmp_path / "run", "--json")
    assert json.loads(outcome.out) == read_json(tmp_path / "run/summary.json")
    assert "epoch" in outcome.err


# -------------------------------------------------------------------------------------- the same folder again
def test_a_finished_run_is_not_repeated(tmp_path, call, tiny):
    command = (*tiny, "--run-dir", tmp_path / "run")
    assert call(train, *command).status == 0
    before = listing(tmp_path)
    again = call(train, *command)
    assert again.status == 0 and again.out.splitlines()[-1].startswith("finished ") and listing(tmp_path) == before


def test_another_configuration_in_the_same_folder_is_refused(tmp_path, call, tiny):
    command = (*tiny, "--run-dir", tmp_path / "run")
    assert call(train, *command).status == 0
    before = listing(tmp_path)
    refused = call(train, *command, "--seed", "7", "--momentum", "0.5")
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert "seed 1 there, 7 now" in refused.err and "momentum 0.9 there, 0.5 now" in refused.err
    assert "epochs" not in refused.err
    assert listing(tmp_path) == before


def test_a_folder_with_other_files_is_refused(tmp_path, call, tiny):
    (tmp_path / "thesis.tex").write_text("precious")
    refused = call(train, *tiny, "--run-dir", tmp_path)
    assert refused.status == 2 and "holds files but no run" in refused.err and len(listing(tmp_path)) == 1


def test_settings_that_do_not_change_the_outcome_may_change(tmp_path, call, tiny):
    command = (*tiny, "--run-dir", tmp_path / "run")
    assert call(train, *command).status == 0
    assert call(train, *command, "--save-minutes", "3", "--no-download").out.splitlines()[-1].startswith("finished ")


# --------------------------------------------------------------------------------------------- continuing
SLOW = ("--batch-size", "2", "--epochs", "2")  # 719 steps per epoch: long enough to interrupt


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, call, tiny):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert call(train, *tiny, *SLOW, "--run-dir", folder).status == 0
    return folder


def interrupted(start_command, tiny, folder, number):
    """The real script, sent a signal inside its second epoch; returns its exit status."""
    process = start_command("train.py", *tiny, *SLOW, "--save-minutes", "0.003", "--run-dir", folder)
    last = folder / "last.pth.tar"
    wait_until(lambda: last.exists() and (saved := checkpoint.read(last))["epoch"] == 1 and saved["step"] > 0, process)
    process.send_signal(number)
    process.communicate(timeout=300)
    return process.returncode


def assert_continues(call, tiny, folder, uninterrupted):
    assert not (folder / "summary.json").exists()
    outcome = call(train, *tiny, *SLOW, "--run-dir", folder)
    assert outcome.status == 0 and "continuing at epoch" in outcome.out, outcome
    assert same_weights(last_weights(folder), last_weights(uninterrupted))
    timeless = [
        [
            {key: value for key, value in record.items() if "second" not in key}
            for record in read_lines(run / "metrics.jsonl")
        ]
        for run in (folder, uninterrupted)
    ]
    assert timeless[0] == timeless[1]
    best = [checkpoint.read(run / "plane2_seed1_best.pth.tar") for run in (folder, uninterrupted)]
    assert best[0]["epoch"] == best[1]["epoch"] and same_weights(
        best[0]["model_state_dict"], best[1]["model_state_dict"]
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_inside_an_epoch_saves_and_the_run_continues_bit_for_bit(
    number, tmp_path, start_command, call, tiny, uninterrupted
):
    assert interrupted(start_command, tiny, tmp_path / "run", number) == 128 + number
    stopped = checkpoint.read(tmp_path / "run/last.pth.tar")
    assert stopped["epoch"] == 1 and stopped["step"] > 0 and stopped["sums"]["images"] == [2] * stopped["step"]
    assert_continues(call, tiny, tmp_path / "run", uninterrupted)


def test_a_kill_inside_an_epoch_continues_bit_for_bit_from_the_last_save(
    tmp_path, start_command, call, tiny, uninterrupted
):
    assert interrupted(start_command, tiny, tmp_path / "run", signal.SIGKILL) == -signal.SIGKILL
    assert_continues(call, tiny, tmp_path / "run", uninterrupted)


def test_the_folder_of_a_running_run_is_refused(tmp_path, start_command, call, tiny):
    process = start_command("train.py", *tiny, *SLOW, "--run-dir", tmp_path / "run")
    wait_until((tmp_path / "run/config.json").exists, process)
    refused = call(train, *tiny, *SLOW, "--run-dir", tmp_path / "run")
    assert refused.status == 2 and f"is in use by process {process.pid}" in refused.err
    process.kill()


def test_a_record_cut_off_by_a_crash_is_repaired(tmp_path, call, tiny):
    """The last line of metrics.jsonl is half written, and last.pth.tar is older than it."""
    command = (*tiny, "--run-dir", tmp_path / "run")
    assert call(train, *command).status == 0
    whole = (tmp_path / "run/metrics.jsonl").read_text()
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/last.pth.tar").unlink()
    (tmp_path / "run/metrics.jsonl").write_text(whole + whole[:30])
    assert call(train, *command).status == 0
    assert [record["epoch"] for record in read_lines(tmp_path / "run/metrics.jsonl")] == [0]
