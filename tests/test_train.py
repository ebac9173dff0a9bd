"""The real commands on digits: their records, continuing to the same bits, their flags, and what they refuse."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import evaluate
import model_factory
import train
from takd.config import names
from takd.config import run_config as settings
from takd.run import checkpoint

METRICS = {"epoch", "learning_rate", "train_loss", "train_accuracy_percent", "test_loss", "test_accuracy_percent"}
METRICS |= {"train_images_per_second", "train_seconds", "evaluation_seconds"}


def read(file):
    return json.loads(Path(file).read_text(encoding="utf-8"))


def lines(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def weights(run):
    return checkpoint.read(Path(run) / "last.pth.tar")["model_state_dict"]


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in state.items())


def listing(folder):
    """Every file below with its time of change: what has been written."""
    return {path: path.stat().st_mtime_ns for path in sorted(Path(folder).rglob("*"))}


# ------------------------------------------------------------------------------------------- records
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


def test_config_says_where_each_value_comes_from(distilled):
    config = read(distilled[0] / "config.json")
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


def test_metrics_have_a_line_an_epoch(distilled):
    records = lines(distilled[0] / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [0, 1]
    assert [record["learning_rate"] for record in records] == pytest.approx([0.01, 0.001])
    for record in records:
        assert set(record) == METRICS | {"train_ce", "train_kd"}
        assert record["train_loss"] == pytest.approx(0.7 * record["train_ce"] + 0.3 * record["train_kd"], rel=1e-5)
        assert 10 < record["test_accuracy_percent"] <= 100
        assert record["train_images_per_second"] == pytest.approx(1438 / record["train_seconds"])


def test_summary_holds_best_and_last_and_their_split(distilled):
    summary, records = read(distilled[0] / "summary.json"), lines(distilled[0] / "metrics.jsonl")
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
    assert [row.split()[0] for row in rows] == ["0/1", "1/1"] and len({len(row) for row in rows}) == 1
    assert out[-1].startswith("done ") and len(out) == heading + 4
    assert any(re.match(r"teacher +\d\d\.\d\d % on digits/test", line) for line in out)
    assert distilled[1].err == ""


def test_tensorboard_events(distilled):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(distilled[0]))
    events.Reload()
    tags = {"loss/train", "loss/test", "accuracy_percent/train", "accuracy_percent/test", "learning_rate", "ce/train", "kd/train"}
    assert tags | {"images_per_second/train"} <= set(events.Tags()["scalars"])
    for tag, key in (("loss/test", "test_loss"), ("kd/train", "train_kd")):
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(
            [record[key] for record in lines(distilled[0] / "metrics.jsonl")]
        )
        assert [event.step for event in events.Scalars(tag)] == [0, 1]


def test_evaluate_agrees_with_the_record(distilled, run_command):
    summary = read(distilled[0] / "summary.json")
    outcome = run_command("evaluate.py", "--checkpoint", summary["checkpoint"], "--json", "--cuda", "0")
    assert (outcome.status, outcome.err) == (0, "")
    result = json.loads(outcome.out)
    assert result["test_accuracy_percent"] == pytest.approx(summary["best"]["test_accuracy_percent"], abs=0.01)
    assert result["test_loss"] == pytest.approx(summary["best"]["test_loss"], rel=1e-4)
    assert (result["model"], result["dataset"], result["images"], result["parameters"]) == ("plane2", "digits", 359, 13_082)
    assert result["test_accuracy_percent"] <= result["test_top5_percent"] <= 100


def test_evaluate_agrees_after_a_training_in_bf16(tmp_path, call, tiny):
    assert call(train, *tiny, "--precision", "bf16", "--run-dir", tmp_path / "run").status == 0
    summary = read(tmp_path / "run/summary.json")
    result = json.loads(call(evaluate, "--checkpoint", summary["checkpoint"], "--json", "--cuda", "0").out)
    assert result["test_accuracy_percent"] == pytest.approx(summary["best"]["test_accuracy_percent"], abs=0.01)


def test_evaluate_a_file_of_the_released_code(teacher_run, tmp_path, call):
    """Its files name neither network nor data set, and expect the released normalisation whatever the data."""
    contents = checkpoint.read(teacher_run / "plane2_seed1_best.pth.tar")
    kept = {key: contents[key] for key in ("model_state_dict", "optimizer_state_dict", "epoch")}
    torch.save(kept, tmp_path / "plane2_None_best.pth.tar")
    command = ("--checkpoint", tmp_path / "plane2_None_best.pth.tar", "--json", "--cuda", "0")
    assert "--model" in call(evaluate, *command).err
    assert "--dataset" in call(evaluate, *command, "--model", "plane2").err
    assert "not plane4" in call(evaluate, *command, "--model", "plane4", "--dataset", "digits").err
    result = json.loads(call(evaluate, *command, "--model", "plain2", "--dataset", "digits").out)
    network = model_factory.create_network("plane2", 10).eval()
    network.load_state_dict(kept["model_state_dict"])
    from data_loader import load

    test = load("digits")[1]
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (names.RELEASED_MEAN, names.RELEASED_STD))
    with torch.no_grad():
        right = network((test.images.float() / 255 - mean) / std).argmax(1) == test.labels
    assert result["test_accuracy_percent"] == pytest.approx(100 * float(right.double().mean()), abs=0.01)


def test_evaluate_prints_a_table_of_several(distilled, teacher_run, call):
    files = [folder / "plane2_seed1_best.pth.tar" for folder in (teacher_run, distilled[0])]
    out = call(evaluate, "--checkpoint", *files, "--cuda", "0").out.splitlines()
    assert len(out) == 3 and "labels" in out[1] and len({line.index("digits") for line in out[1:]}) == 1


def test_json_prints_the_summary_alone(tmp_path, call, tiny):
    outcome = call(train, *tiny, "--run-dir", tmp_path / "run", "--json")
    assert json.loads(outcome.out) == read(tmp_path / "run/summary.json")
    assert "epoch" in outcome.err


# ---------------------------------------------------------------------------------------- the same again
def test_the_same_command_again_says_that_it_is_finished(tmp_path, call, tiny):
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
    assert "seed 1 there, 7 now" in refused.err and "momentum 0.9 there, 0.5 now" in refused.err and "epochs" not in refused.err
    assert listing(tmp_path) == before


def test_a_folder_with_other_files_is_refused(tmp_path, call, tiny):
    (tmp_path / "thesis.tex").write_text("precious")
    refused = call(train, *tiny, "--run-dir", tmp_path)
    assert refused.status == 2 and "holds files but no run" in refused.err and len(listing(tmp_path)) == 1


def test_what_does_not_change_the_outcome_may_change(tmp_path, call, tiny):
    command = (*tiny, "--run-dir", tmp_path / "run")
    assert call(train, *command).status == 0
    assert call(train, *command, "--save-minutes", "3", "--no-download").out.splitlines()[-1].startswith("finished ")


# --------------------------------------------------------------------------------------------- continuing
SLOW = ("--batch-size", "2", "--epochs", "2")  # 719 steps an epoch: time enough to be interrupted inside one


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, call, tiny):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert call(train, *tiny, *SLOW, "--run-dir", folder).status == 0
    return folder


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def interrupted(start_command, tiny, folder, number):
    """The real script, sent a signal inside its second epoch; returns its exit status."""
    process = start_command("train.py", *tiny, *SLOW, "--save-minutes", "0.003", "--run-dir", folder)
    last = folder / "last.pth.tar"
    wait_for(lambda: last.exists() and (saved := checkpoint.read(last))["epoch"] == 1 and saved["step"] > 0, process)
    process.send_signal(number)
    process.communicate(timeout=300)
    return process.returncode


def check_continued(call, tiny, folder, undisturbed):
    assert not (folder / "summary.json").exists()
    outcome = call(train, *tiny, *SLOW, "--run-dir", folder)
    assert outcome.status == 0 and "continuing at epoch" in outcome.out, outcome
    assert same(weights(folder), weights(undisturbed))
    timeless = [
        [{key: value for key, value in record.items() if "second" not in key} for record in lines(run / "metrics.jsonl")]
        for run in (folder, undisturbed)
    ]
    assert timeless[0] == timeless[1]
    best = [checkpoint.read(run / "plane2_seed1_best.pth.tar") for run in (folder, undisturbed)]
    assert best[0]["epoch"] == best[1]["epoch"] and same(best[0]["model_state_dict"], best[1]["model_state_dict"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_inside_an_epoch_saves_and_the_run_continues_bit_for_bit(number, tmp_path, start_command, call, tiny, undisturbed):
    assert interrupted(start_command, tiny, tmp_path / "run", number) == 128 + number
    stopped = checkpoint.read(tmp_path / "run/last.pth.tar")
    assert stopped["epoch"] == 1 and stopped["step"] > 0 and stopped["sums"]["images"] == [2] * stopped["step"]
    check_continued(call, tiny, tmp_path / "run", undisturbed)


def test_a_kill_inside_an_epoch_continues_bit_for_bit_from_the_last_save(tmp_path, start_command, call, tiny, undisturbed):
    assert interrupted(start_command, tiny, tmp_path / "run", signal.SIGKILL) == -signal.SIGKILL
    check_continued(call, tiny, tmp_path / "run", undisturbed)


def test_the_folder_of_a_running_run_is_refused(tmp_path, start_command, call, tiny):
    process = start_command("train.py", *tiny, *SLOW, "--run-dir", tmp_path / "run")
    wait_for((tmp_path / "run/config.json").exists, process)
    refused = call(train, *tiny, *SLOW, "--run-dir", tmp_path / "run")
    assert refused.status == 2 and f"is in use by process {process.pid}" in refused.err
    process.kill()


def test_a_record_cut_off_by_a_crash_is_mended(tmp_path, call, tiny):
    """The last line of metrics.jsonl is half written and last.pth.tar is of the epoch before."""
    command = (*tiny, "--run-dir", tmp_path / "run")
    assert call(train, *command).status == 0
    whole = (tmp_path / "run/metrics.jsonl").read_text()
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/last.pth.tar").unlink()
    (tmp_path / "run/metrics.jsonl").write_text(whole + whole[:30])
    assert call(train, *command).status == 0
    assert [record["epoch"] for record in lines(tmp_path / "run/metrics.jsonl")] == [0]


# --------------------------------------------------------------------------------------------------- flags
@pytest.fixture(scope="module")
def baseline(tmp_path_factory, call, tiny):
    """The run that one flag at a time changes."""
    folder = tmp_path_factory.mktemp("baseline") / "run"
    assert call(train, *tiny, "--run-dir", folder).status == 0
    return folder


# Each flag with a value unlike the baseline's, and what it must be recorded as. All of these change the weights.
TRAINING_FLAGS = {
    "--student": (["resnet8"], "resnet8"),
    "--model": (["plane4"], "plane4"),
    "--recipe": (["released-code"], "released-code"),
    "--augment": (["crop-flip"], "crop-flip"),
    "--validation-split": (["0.25"], 0.25),
    "--epochs": (["2"], 2),
    "--batch-size": (["100"], 100),
    "--learning-rate": (["0.02"], 0.02),
    "--milestones": (["0"], [0]),
    "--momentum": (["0.5"], 0.5),
    "--no-nesterov": ([], False),
    "--weight-decay": (["0.01"], 0.01),
    "--seed": (["0"], 0),
    "--precision": (["bf16"], "bf16"),
    "--image-size": (["40"], 40),
    "--train-images": (["1000"], 1000),
}
SETTINGS = {"--model": "student", "--no-nesterov": "nesterov"}
# Those with a test of their own, by the test's name.
OTHER_FLAGS = {
    "--learning-rate-decay": "test_learning_rate_decay",
    "--nesterov": "test_nesterov",
    "--dataset": "test_dataset_and_dataset_dir",
    "--dataset-dir": "test_dataset_and_dataset_dir",
    "--download": "test_download",
    "--no-download": "test_download",
    "--teacher": "test_teacher_and_teacher_checkpoint",
    "--teacher-checkpoint": "test_teacher_and_teacher_checkpoint",
    "--method": "test_method",
    "--method-option": "test_method_option",
    "--help-methods": "test_help_methods",
    "--repeat": "test_repeat",
    "--temperature": "test_temperature_and_lambda",
    "--lambda": "test_temperature_and_lambda",
    "--teacher-cache": "test_teacher_cache",
    "--cuda": "test_cuda",
    "--run-dir": "test_run_dir",
    "--save-minutes": "test_a_kill_inside_an_epoch_continues_bit_for_bit_from_the_last_save",
    "--pretrained": "test_pretrained",
    "--no-cuda-graph": "test_no_cuda_graph",
    "--workers": "test_workers",
    "--json": "test_json_prints_the_summary_alone",
}


def test_every_flag_has_a_test():
    flags = {text for action in settings.build_parser()._actions for text in action.option_strings} - {"-h", "--help"}
    assert flags == TRAINING_FLAGS.keys() | OTHER_FLAGS.keys()
    assert all(name in globals() for name in OTHER_FLAGS.values())


@pytest.mark.parametrize("flag", TRAINING_FLAGS)
def test_a_flag_changes_the_record_and_the_weights(flag, tmp_path, call, tiny, baseline):
    given, value = TRAINING_FLAGS[flag]
    key = SETTINGS.get(flag, flag.removeprefix("--").replace("-", "_"))
    outcome = call(train, *tiny, flag, *given, "--run-dir", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    config = read(tmp_path / "run/config.json")
    assert config[key] == value != read(baseline / "config.json").get(key) and config["origins"][key] == "command line"
    assert not same(weights(tmp_path / "run"), weights(baseline))


def distil(call, tiny, teacher_file, folder, *flags):
    outcome = call(train, *tiny, "--teacher", "plane2", "--teacher-checkpoint", teacher_file, *flags, "--run-dir", folder)
    assert outcome.status == 0, outcome.err
    return outcome


def test_learning_rate_decay(tmp_path, call, tiny):
    assert call(train, *tiny, "--milestones", "0", "--learning-rate-decay", "0.5", "--run-dir", tmp_path / "run").status == 0
    assert lines(tmp_path / "run/metrics.jsonl")[0]["learning_rate"] == pytest.approx(0.005)


def test_nesterov(tmp_path, call, tiny):
    assert call(train, *tiny, "--recipe", "released-code", "--nesterov", "--run-dir", tmp_path / "run").status == 0
    assert call(train, *tiny, "--recipe", "released-code", "--run-dir", tmp_path / "without").status == 0
    assert read(tmp_path / "run/config.json")["nesterov"] is True
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "without"))


def test_dataset_and_dataset_dir(tmp_path, call, tiny, class_folders):
    class_folders(tmp_path / "images", train_images=4)
    outcome = call(train, *tiny, "--dataset", "CIFAR-10", "--dataset-dir", tmp_path / "images", "--run-dir", tmp_path / "run")
    assert outcome.status == 0 and "cifar10: 40 images to train, 10 to test" in outcome.out
    assert read(tmp_path / "run/summary.json")["dataset"] == "cifar10"


def test_download(tmp_path, call, tiny, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    command = (*tiny, "--dataset", "cifar10", "--dataset-dir", tmp_path / "images", "--run-dir", tmp_path / "run")
    assert "downloading is off" in call(train, *command, "--no-download").err
    for flags in ([], ["--download"]):
        assert "no download (" in call(train, *command, *flags).err
    assert not list(tmp_path.iterdir())


def test_teacher_and_teacher_checkpoint(tmp_path, call, tiny, teacher_file, baseline):
    outcome = distil(call, tiny, teacher_file, tmp_path / "run")
    assert re.search(r"teacher +(\d+\.\d\d) % on digits/test \(its file records \d+\.\d\d %\)", outcome.out)
    assert read(tmp_path / "run/summary.json")["path"] == ["plane2", "plane2"]
    assert not same(weights(tmp_path / "run"), weights(baseline))
    assert not (tmp_path / "run/teacher").exists()


def test_method(call, tiny, teacher_file, tmp_path, baseline):
    """Its name is recorded in its own spelling; each method has its tests in test_methods.py."""
    distil(call, tiny, teacher_file, tmp_path / "run", "--method", "ST")
    distil(call, tiny, teacher_file, tmp_path / "default")
    assert read(tmp_path / "run/config.json")["method"] == "st" and read(tmp_path / "default/config.json")["method"] == "kd"
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "default"))


def test_method_option(call, tiny, teacher_file, tmp_path):
    distil(call, tiny, teacher_file, tmp_path / "default", "--method", "st")
    distil(call, tiny, teacher_file, tmp_path / "run", "--method", "st", "--method-option", "alpha=3", "temperature=2")
    assert read(tmp_path / "run/config.json")["method_options"] == {"temperature": 2.0, "alpha": 3.0}
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "default"))


def test_help_methods(run_command, nothing_heavy):
    outcome = run_command("train.py", "--help-methods", **nothing_heavy)
    assert (outcome.status, outcome.err) == (0, "") and set(names.methods()) <= set(outcome.out.split())


def test_repeat(tmp_path, call, tiny):
    outcome = call(train, *tiny, "--repeat", "2", "--run-dir", tmp_path)
    assert outcome.status == 0 and [read(tmp_path / f"seed{seed}/config.json")["seed"] for seed in (1, 2)] == [1, 2]
    assert re.match(r"repeated  2 runs, seeds 1 2: test \d+\.\d\d ± \d", outcome.out.splitlines()[-1])


@pytest.mark.parametrize("flag, value", [("--temperature", 2.5), ("--lambda", 0.9)])
def test_temperature_and_lambda(flag, value, tmp_path, call, tiny, teacher_file):
    distil(call, tiny, teacher_file, tmp_path / "default")
    distil(call, tiny, teacher_file, tmp_path / "run", flag, value)
    config = read(tmp_path / "run/config.json")
    assert config[flag[2:]] == config["method_options"][flag[2:]] == value
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "default"))


def test_teacher_cache(tmp_path, call, tiny, teacher_file):
    """live leaves no table, lazy and full do, each in its own way; what is learned is the same."""
    losses, how = [], {"live": "asked of the teacher for every batch", "lazy": "filled as batches ask", "full": "filled now"}
    for mode in ("live", "lazy", "full"):
        assert how[mode] in distil(call, tiny, teacher_file, tmp_path / mode, "--teacher-cache", mode).out
        assert any(Path(f"{teacher_file}.logits").glob("*.float*")) == (mode != "live")
        losses.append(lines(tmp_path / mode / "metrics.jsonl")[0]["train_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4) and losses[1] == losses[2]


def test_cuda(tmp_path, call, tiny):
    """--cuda 0 is the CPU; a GPU that is not there is an error that says what is."""
    from takd.config import flags as arguments

    assert call(train, *tiny, "--cuda", "off", "--run-dir", tmp_path / "run").status == 0
    assert read(tmp_path / "run/config.json")["cuda"] == 0
    present = arguments.gpus_present()
    refused = call(train, *tiny, "--cuda", present + 1, "--run-dir", tmp_path / "other")
    assert refused.status == 2 and f"--cuda {present + 1}: this machine has {present or 'no'} GPU" in refused.err
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_cuda_graph(tmp_path, call, tiny):
    outcomes = {}
    for flags in ((), ("--no-cuda-graph",)):
        outcomes[flags] = call(train, *tiny, "--cuda", "1", *flags, "--run-dir", tmp_path / f"run{len(flags)}")
        assert outcomes[flags].status == 0, outcomes[flags].err
    said = ["as CUDA graphs" in outcome.out and "note: no CUDA graph" not in outcome.out for outcome in outcomes.values()]
    assert said == [True, False]
    ours, theirs = ([json.loads(line) for line in (tmp_path / f"run{i}/metrics.jsonl").read_text().splitlines()] for i in range(2))
    assert ours[-1]["train_loss"] == pytest.approx(theirs[-1]["train_loss"], rel=1e-2)


def test_pretrained(tmp_path, call, tiny, monkeypatch):
    """Torchvision's weights from its cache: in the student, but for its last layer, and in a teacher trained first."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    name = "shufflenet_v2_x0_5"
    file = tmp_path / "home/hub/checkpoints" / Path(torchvision.models.get_model_weights(name).DEFAULT.url).name
    file.parent.mkdir(parents=True)
    torch.manual_seed(5)
    published = torchvision.models.get_model(name).state_dict()
    torch.save(published, file)
    few = (*tiny, "--train-images", "200", "--epochs", "1", "--learning-rate", "1e-30", "--weight-decay", "0")
    outcome = call(train, *few, "--student", f"torchvision:{name}", "--pretrained", "--run-dir", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert read(tmp_path / "run/config.json")["pretrained"] is True
    trained = weights(tmp_path / "run")
    parameters = [key for key in published if "running" not in key and "tracked" not in key]
    assert all(torch.allclose(trained[key], published[key], 0, 1e-20) for key in parameters if not key.startswith("fc."))
    assert trained["fc.weight"].shape == (10, 1024)
    assert (tmp_path / f"run/torchvision-{name}_seed1_best.pth.tar").exists()
    given = {"teacher": "torchvision:resnet18", "student": "plane2", "seed": 1, "pretrained": True}
    assert train.teacher_settings(given, {"seed": "default"})[0]["pretrained"] is True
    assert "pretrained" not in train.teacher_settings(given | {"teacher": "plane4"}, {"seed": "default"})[0]


def test_workers(tmp_path, call, tiny):
    """However many make the views: the same bits, and none of their making in PyTorch's generator."""
    for count in ("0", "2"):
        command = (*tiny, "--train-images", "100", "--augment", "rotate-crop-flip", "--workers", count)
        assert call(train, *command, "--run-dir", tmp_path / count).status == 0
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"))
    states = [checkpoint.read(tmp_path / count / "last.pth.tar")["random_state"] for count in ("0", "2")]
    assert torch.equal(*states)


def test_run_dir(tmp_path, call, tiny, monkeypatch):
    """Without the flag: a folder under runs/ named after what makes the run."""
    monkeypatch.chdir(tmp_path)
    assert call(train, *tiny).status == 0 and call(train, *tiny, "--seed", "2").status == 0
    first, second = sorted((tmp_path / "runs").iterdir())
    assert re.fullmatch(r"digits-plane2-seed1-[0-9a-f]{6}", first.name) and second.name.startswith("digits-plane2-seed2-")


def test_arguments_from_a_file(tmp_path, call, tiny):
    file = tmp_path / "arguments.txt"
    file.write_text("# a comment\n--seed 5 --momentum 0.5\n\n--batch-size\n64  # and another\n")
    assert call(train, *tiny, f"@{file}", "--momentum", "0.6", "--run-dir", tmp_path / "run").status == 0
    config = read(tmp_path / "run/config.json")
    assert (config["seed"], config["momentum"], config["batch_size"]) == (5, 0.6, 64)
    assert [config["origins"][key] for key in ("seed", "momentum", "epochs")] == ["arguments file", "command line", "command line"]


# ------------------------------------------------------------------------------------------- usage errors
FEW = ("--student", "plane2", "--dataset", "digits")
USAGE_ERRORS = {
    "unknown flag": (["--learn-rate", "1"], "unrecognized arguments"),
    "abbreviation": (["--epoch", "3"], "unrecognized arguments"),
    "unknown network": (["--student", "resnet9"], "did you mean resnet8?"),
    "unknown teacher": (["--teacher", "vgg"], "networks: resnet8"),
    "unknown data set": (["--dataset", "cifar1000"], "did you mean cifar100?"),
    "unknown recipe": (["--recipe", "mine"], "released-code"),
    "unknown method": (["--teacher", "plane4", "--method", "cdr"], "did you mean crd?"),
    "method without a teacher": (["--method", "st"], "--method needs --teacher"),
    "option without a teacher": (["--method-option", "alpha=1"], "--method-option needs --teacher"),
    "option of base without a teacher": (["--method", "base", "--temperature", "3"], "--temperature needs --teacher"),
    "temperature of a method without": (["--teacher", "plane4", "--method", "at", "--temperature", "3"], "options of at: beta"),
    "unknown option": (["--teacher", "plane4", "--method-option", "temprature=3"], "did you mean temperature?"),
    "option given twice": (["--teacher", "plane4", "--lambda", ".1", "--method-option", "lambda=.1"], "lambda is given twice"),
    "option that is no word of it": (["--teacher", "plane4", "--method-option", "reduction=sum"], "batchmean or mean"),
    "option out of bounds": (["--teacher", "plane4", "--method-option", "lambda=2"], "at most 1"),
    "option without a value": (["--teacher", "plane4", "--method-option", "lambda"], "write key=value"),
    "method in no file": (["--teacher", "plane4", "--method", "absent.py:Mine"], "absent.py cannot be read"),
    "no repetition": (["--repeat", "0"], "at least 1"),
    "seeds beyond the last": (["--seed", str(2**63 - 1), "--repeat", "2"], "seeds end at"),
    "unknown torchvision network": (["--student", "torchvision:resnet"], "torchvision is not installed"),
    "network of an absent file": (["--student", "absent.py:Net"], "absent.py cannot be read (No such file"),
    "network that a file lacks": (["--student", "nets.py:Nett"], "nets.py defines no 'Nett'; its classes: Net"),
    "network in a file with a mistake": (["--student", "wrong.py:Net"], "wrong.py is not Python"),
    "pretrained weights of ours": (["--pretrained"], "--pretrained needs a network of torchvision's"),
    "pretrained weights of a trained teacher": (
        ["--pretrained", "--teacher", "resnet50", "--teacher-checkpoint", "x"],
        "--pretrained needs a network",
    ),
    "workers without work": (["--workers", "2", "--augment", "crop-flip"], "--workers needs --augment rotate-crop-flip"),
    "a table of endless views": (
        ["--teacher", "plane4", "--augment", "rotate-crop-flip", "--teacher-cache", "full"],
        "--teacher-cache full: rotate-crop-flip",
    ),
    "a graph on the CPU": (["--no-cuda-graph"], "about GPUs"),
    "images of nothing": (["--image-size", "0"], "at least 8"),
    "no epochs": (["--epochs", "0"], "at least 1"),
    "half an epoch": (["--epochs", "1.5"], "whole number"),
    "huge epochs": (["--epochs", "9" * 400], "whole number"),
    "negative batch": (["--batch-size", "-4"], "at least 1"),
    "rate of zero": (["--learning-rate", "0"], "above 0"),
    "rate not a number": (["--learning-rate", "nan"], "above 0"),
    "infinite rate": (["--learning-rate", "inf"], "above 0"),
    "momentum of 1": (["--momentum", "1"], "below 1"),
    "negative decay": (["--weight-decay", "-1"], "at least 0"),
    "temperature of 0": (["--teacher", "plane4", "--temperature", "0"], "above 0"),
    "lambda above 1": (["--teacher", "plane4", "--lambda", "1.5"], "at most 1"),
    "lambda without a teacher": (["--lambda", "0.5"], "--lambda needs --teacher"),
    "temperature without a teacher": (["--temperature", "4"], "--temperature needs --teacher"),
    "checkpoint without a teacher": (["--teacher-checkpoint", "x"], "--teacher-checkpoint needs --teacher"),
    "Nesterov without momentum": (["--nesterov", "--momentum", "0"], "--momentum above 0"),
    "negative seed": (["--seed", "-1"], "at least 0"),
    "seed too large": (["--seed", str(2**63)], "at most"),
    "cuda maybe": (["--cuda", "maybe"], "neither yes or no"),
    "cuda negative": (["--cuda", "-1"], "neither yes or no"),
    "more GPUs than there are": (["--cuda", "99"], "this machine has"),
    "no value": (["--epochs"], "expected one argument"),
    "a stray word": (["digits"], "unrecognized arguments"),
    "absent arguments file": (["@absent.txt"], "absent.txt"),
    "open quote in an arguments file": (["@quote.txt"], "quotation"),
    "arguments file that names itself": (["@self.txt"], "names itself"),
    "binary arguments file": (["@binary.txt"], "UTF-8"),
}


@pytest.fixture(scope="module")
def nothing_heavy(tmp_path_factory):
    """A folder for PYTHONPATH in which importing anything heavy ends the process."""
    folder = tmp_path_factory.mktemp("nothing-heavy")
    for module in ("torch", "torchvision", "numpy", "PIL", "sklearn", "nni", "tensorboard", "tqdm"):
        (folder / f"{module}.py").write_text("raise SystemExit(f'{__name__} was imported')")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("case", USAGE_ERRORS)
def test_usage_errors_are_one_line_before_anything_heavy(case, tmp_path, run_command, nothing_heavy):
    (tmp_path / "quote.txt").write_text("--epochs '3\n")
    (tmp_path / "self.txt").write_text("@self.txt\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "nets.py").write_text("class Net:\n    pass\n")
    (tmp_path / "wrong.py").write_text("class Net(:\n")
    before = listing(tmp_path)
    argv, message = USAGE_ERRORS[case]
    outcome = run_command("train.py", *FEW, *argv, cwd=tmp_path, **nothing_heavy)
    assert (outcome.status, outcome.out) == (2, ""), outcome
    assert re.fullmatch(r"train\.py: error: [^\n]+\n", outcome.err) and message in outcome.err
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "argv", [[], ["--checkpoint"], ["--checkpoint", "x", "--model", "resnet9"], ["--checkpoint", "x", "--top", "5"]]
)
def test_usage_errors_of_evaluate(argv, tmp_path, run_command, nothing_heavy):
    outcome = run_command("evaluate.py", *argv, cwd=tmp_path, **nothing_heavy)
    assert (outcome.status, outcome.out) == (2, "") and re.fullmatch(r"evaluate\.py: error: [^\n]+\n", outcome.err)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_needs_nothing_heavy(script, run_command, nothing_heavy):
    outcome = run_command(script, "--help", **nothing_heavy)
    assert (outcome.status, outcome.err) == (0, "") and "--dataset-dir" in outcome.out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--teacher", "plane2", "--teacher-checkpoint", "absent.pth.tar"], "does not exist"),
        (["--teacher", "plane2", "--teacher-checkpoint", "."], "is a folder"),
        (["--validation-split", "5000"], "leaves"),
        (["--train-images", "5000"], "there are 1438 images to train on"),
        (["--dataset", "folder", "--dataset-dir", "absent"], "absent/train does not exist"),
        (["--student", "cnn5", "--image-size", "16"], "too small for this network's 5 poolings"),
        (["--student", "torchvision:alexnet"], "does not work with 32x32 images"),
        (["--student", "torchvision:shufflenet_v2_x0_5", "--batch-size", "1437"], "leaves one of 1438 images for the last step"),
        (["--dataset", "cifar10", "--no-download"], "downloading is off"),
    ],
)
def test_errors_found_later_are_one_line_too(argv, message, tmp_path, call, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = call(train, *tiny, *argv, "--run-dir", "run")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1) and message in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_diverging_run_says_so(tmp_path, call, tiny):
    outcome = call(train, *tiny, "--learning-rate", "1e30", "--run-dir", tmp_path / "run")
    assert outcome.status == 1 and "no longer a number at epoch 0" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, call, tiny):
    tmp_path.chmod(0o500)
    outcome = call(train, *tiny, "--run-dir", tmp_path / "run")
    assert outcome.status == 1 and "Permission denied" in outcome.err
