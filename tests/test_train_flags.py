"""Each flag of train.py: its effect on the record and on the weights."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import last_weights, read_json, read_lines, same_weights

import model_factory
import train
from takd.config import flags, methods, run_config
from takd.run import checkpoint


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, call, tiny):
    """The run from which the others differ in one flag."""
    folder = tmp_path_factory.mktemp("baseline") / "run"
    assert call(train, *tiny, "--run-dir", folder).status == 0
    return folder


# Flags that change the weights: {flag: (values unlike the baseline's, the recorded value)}.
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
    "--label-smoothing": (["0.1"], 0.1),
    "--seed": (["0"], 0),
    "--precision": (["bf16"], "bf16"),
    "--image-size": (["40"], 40),
    "--train-images": (["1000"], 1000),
}
SETTINGS = {"--model": "student", "--no-nesterov": "nesterov"}
# {flag: the test of its own}; those elsewhere by "file: test".
OTHER_FLAGS = {
    "--learning-rate-decay": "test_learning_rate_decay",
    "--schedule": "test_schedule_and_warmup_epochs",
    "--warmup-epochs": "test_schedule_and_warmup_epochs",
    "--test-images": "test_test_images",
    "--init-from": "test_init_from_starts_from_a_checkpoints_weights",
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
    "--any-teacher": "test_any_teacher",
    "--cuda": "test_cuda",
    "--run-dir": "test_run_dir",
    "--save-minutes": "test_train.py: test_a_kill_inside_an_epoch_continues_bit_for_bit_from_the_last_save",
    "--pretrained": "test_pretrained",
    "--no-cuda-graph": "test_no_cuda_graph",
    "--workers": "test_workers",
    "--json": "test_train.py: test_json_prints_only_the_summary",
    "--measure": "test_measure",
}


def test_every_flag_has_a_test():
    known = {text for action in flags.train_parser()._actions for text in action.option_strings} - {"-h", "--help"}
    others = {*flags.ALIASES, "--version"} - TRAINING_FLAGS.keys()  # tests/test_usage_errors.py, tests/test_flags.py
    assert known - others == TRAINING_FLAGS.keys() | OTHER_FLAGS.keys()
    for name in OTHER_FLAGS.values():
        file, _, test = name.rpartition(": ")
        assert f"\ndef {test}(" in (Path(__file__).with_name(file) if file else Path(__file__)).read_text(), name


@pytest.mark.parametrize("flag", TRAINING_FLAGS)
def test_a_flag_changes_the_record_and_the_weights(flag, tmp_path, call, tiny, baseline):
    given, value = TRAINING_FLAGS[flag]
    key = SETTINGS.get(flag, flag.removeprefix("--").replace("-", "_"))
    outcome = call(train, *tiny, flag, *given, "--run-dir", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    config = read_json(tmp_path / "run/config.json")
    assert config[key] == value != read_json(baseline / "config.json").get(key)
    assert config["origins"][key] == "command line"
    assert not same_weights(last_weights(tmp_path / "run"), last_weights(baseline))


def distil(call, tiny, teacher_file, folder, *given):
    teacher = ("--teacher", "plane2", "--teacher-checkpoint", teacher_file)
    outcome = call(train, *tiny, *teacher, *given, "--run-dir", folder)
    assert outcome.status == 0, outcome.err
    return outcome


def test_learning_rate_decay(tmp_path, call, tiny):
    command = (*tiny, "--milestones", "0", "--learning-rate-decay", "0.5", "--run-dir", tmp_path)
    assert call(train, *command).status == 0
    assert read_lines(tmp_path / "metrics.jsonl")[0]["learning_rate"] == pytest.approx(0.005)


def test_schedule_and_warmup_epochs(tmp_path, call, tiny):
    """The rates of the epochs; without the flags the folder holds another run."""
    command = (*tiny, "--train-images", "100", "--epochs", "3", "--run-dir", tmp_path)
    assert call(train, *command, "--schedule", "cosine", "--warmup-epochs", "1").status == 0
    rates = [line["learning_rate"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([0.01 / 3, 0.01, 0.005])
    other = call(train, *command)
    assert other.status == 2 and 'schedule "cosine" there, null now, warmup_epochs 1 there, null now' in other.err


def test_test_images(tmp_path, call, tiny, teacher_file):
    """As many of each class are scored, those of the teacher too, and the run says so."""
    outcome = distil(call, tiny, teacher_file, tmp_path / "run", "--test-images", "100")
    assert "1438 images to train, 100 to test" in outcome.out and " % on digits/test-100 (" in outcome.out
    assert read_json(tmp_path / "run/config.json")["test_images"] == 100
    percent = read_json(tmp_path / "run/summary.json")["last"]["test_accuracy_percent"]
    assert percent == pytest.approx(round(percent))  # of 100 images
    assert "there are 359 images to test" in call(train, *tiny, "--test-images", "360", "--run-dir", tmp_path / "x").err


def test_init_from_starts_from_a_checkpoints_weights(tmp_path, call, tiny, teacher_file, photographs):
    """The same classes: every weight. Other classes: a new last layer. Recorded by the weights, not by the path."""
    still = (*tiny, "--learning-rate", "1e-30", "--weight-decay", "0", "--init-from", teacher_file)
    assert call(train, *still, "--run-dir", tmp_path / "same").status == 0
    given, same = checkpoint.read(teacher_file)["model_state_dict"], last_weights(tmp_path / "same")
    weights = [key for key in given if "running" not in key and "tracked" not in key]
    assert all(torch.equal(given[key], same[key]) for key in weights)
    config = read_json(tmp_path / "same/config.json")
    assert config["init_from"] == str(teacher_file) and config["init_weights"] == checkpoint.weights_digest(
        teacher_file
    )
    other = call(train, *tiny, "--learning-rate", "1e-30", "--weight-decay", "0", "--run-dir", tmp_path / "same")
    assert other.status == 2 and "init_weights" in other.err
    folder = (
        "--dataset",
        "folder",
        "--dataset-dir",
        photographs,
        "--image-size",
        "32",
        "--run-dir",
        tmp_path / "three",
    )
    assert call(train, *still, *folder).status == 0
    three = last_weights(tmp_path / "three")
    assert [key for key in weights if three[key].shape != given[key].shape] == weights[-2:]
    assert all(torch.equal(given[key], three[key]) for key in weights[:-2])


def test_more_epochs_in_a_finished_runs_folder_are_refused_with_the_command(tmp_path, call, tiny):
    folder = tmp_path / "run"
    assert call(train, *tiny, "--run-dir", folder).status == 0
    refused = call(train, *tiny, "--epochs", "2", "--run-dir", folder)
    assert refused.status == 2 and refused.err.count("\n") == 1
    command = shlex.split(refused.err.partition("from its weights: ")[2])
    assert command[:2] == ["python3", "train.py"]
    assert call(train, *command[2:]).status == 0
    config = read_json(tmp_path / "run-2/config.json")
    assert config["epochs"] == 2 and config["init_from"] == str(folder / "plane2_seed1_best.pth.tar")


def test_nesterov(tmp_path, call, tiny):
    assert call(train, *tiny, "--recipe", "released-code", "--nesterov", "--run-dir", tmp_path / "run").status == 0
    assert call(train, *tiny, "--recipe", "released-code", "--run-dir", tmp_path / "without").status == 0
    assert read_json(tmp_path / "run/config.json")["nesterov"] is True
    assert not same_weights(last_weights(tmp_path / "run"), last_weights(tmp_path / "without"))


def test_dataset_and_dataset_dir(tmp_path, call, tiny, class_folders):
    class_folders(tmp_path / "images", train_images=4)
    outcome = call(
        train, *tiny, "--dataset", "CIFAR-10", "--dataset-dir", tmp_path / "images", "--run-dir", tmp_path / "run"
    )
    assert outcome.status == 0 and "cifar10: 40 images to train, 10 to test" in outcome.out
    assert read_json(tmp_path / "run/summary.json")["dataset"] == "cifar10"


def test_download(tmp_path, call, tiny, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    command = (*tiny, "--dataset", "cifar10", "--dataset-dir", tmp_path / "images", "--run-dir", tmp_path / "run")
    assert "downloading is off" in call(train, *command, "--no-download").err
    for given in ([], ["--download"]):
        assert "no download (" in call(train, *command, *given).err
    assert not list(tmp_path.iterdir())


def test_teacher_and_teacher_checkpoint(tmp_path, call, tiny, teacher_file, baseline):
    outcome = distil(call, tiny, teacher_file, tmp_path / "run")
    assert re.search(r"teacher +(\d+\.\d\d) % on digits/test \(its file records \d+\.\d\d %\)", outcome.out)
    assert read_json(tmp_path / "run/summary.json")["path"] == ["plane2", "plane2"]
    assert not same_weights(last_weights(tmp_path / "run"), last_weights(baseline))
    assert not (tmp_path / "run/teacher").exists()


def test_method(call, tiny, teacher_file, tmp_path, baseline):
    """The name is recorded in its canonical spelling; the losses are tested in tests/distill."""
    distil(call, tiny, teacher_file, tmp_path / "run", "--method", "ST")
    distil(call, tiny, teacher_file, tmp_path / "default")
    recorded = [read_json(tmp_path / run / "config.json")["method"] for run in ("run", "default")]
    assert recorded == ["st", "kd"]
    assert not same_weights(last_weights(tmp_path / "run"), last_weights(tmp_path / "default"))


def test_method_option(call, tiny, teacher_file, tmp_path):
    distil(call, tiny, teacher_file, tmp_path / "default", "--method", "st")
    distil(call, tiny, teacher_file, tmp_path / "run", "--method", "st", "--method-option", "alpha=3", "temperature=2")
    assert read_json(tmp_path / "run/config.json")["method_options"] == {"temperature": 2.0, "alpha": 3.0}
    assert not same_weights(last_weights(tmp_path / "run"), last_weights(tmp_path / "default"))


def test_help_methods(run_command, nothing_heavy):
    outcome = run_command("train.py", "--help-methods", **nothing_heavy)
    assert (outcome.status, outcome.err) == (0, "") and set(methods.METHODS) <= set(outcome.out.split())


def test_repeat(tmp_path, call, tiny):
    outcome = call(train, *tiny, "--repeat", "2", "--run-dir", tmp_path)
    assert outcome.status == 0
    assert [read_json(tmp_path / f"seed{seed}/config.json")["seed"] for seed in (1, 2)] == [1, 2]
    assert re.match(r"repeated  2 runs, seeds 1 2: test \d+\.\d\d ± \d", outcome.out.splitlines()[-1])


@pytest.mark.parametrize("flag, value", [("--temperature", 2.5), ("--lambda", 0.9)])
def test_temperature_and_lambda(flag, value, tmp_path, call, tiny, teacher_file):
    distil(call, tiny, teacher_file, tmp_path / "default")
    distil(call, tiny, teacher_file, tmp_path / "run", flag, value)
    config = read_json(tmp_path / "run/config.json")
    assert config[flag[2:]] == config["method_options"][flag[2:]] == value
    assert not same_weights(last_weights(tmp_path / "run"), last_weights(tmp_path / "default"))


def test_any_teacher(tmp_path, call, tiny):
    """A teacher trained on a few images for one epoch: refused, or taken to try the command out."""
    torch.manual_seed(0)
    file = tmp_path / "teacher.pth.tar"
    torch.save({"model_state_dict": model_factory.create("plane4", 10).state_dict()}, file)
    command = (*tiny, "--teacher", "plane4", "--teacher-checkpoint", file, "--run-dir", tmp_path / "run")
    assert "or try the command out with --any-teacher" in call(train, *command).err
    assert call(train, *command, "--any-teacher").status == 0 and (tmp_path / "run/summary.json").exists()


def test_teacher_cache(tmp_path, call, tiny, teacher_file):
    """live leaves no table, lazy and full do; the losses are the same."""
    losses, how = [], {"live": "computed for every batch", "lazy": "filled lazily", "full": "filled now"}
    for mode in ("live", "lazy", "full"):
        assert how[mode] in distil(call, tiny, teacher_file, tmp_path / mode, "--teacher-cache", mode).out
        assert any(Path(f"{teacher_file}.logits").glob("*.float*")) == (mode != "live")
        losses.append(read_lines(tmp_path / mode / "metrics.jsonl")[0]["train_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4) and losses[1] == losses[2]


def test_cuda(tmp_path, call, tiny):
    """--cuda 0 is the CPU; more GPUs than there are is an error with their number."""
    assert call(train, *tiny, "--cuda", "off", "--run-dir", tmp_path / "run").status == 0
    assert read_json(tmp_path / "run/config.json")["cuda"] == 0
    present = flags.gpus_present()
    refused = call(train, *tiny, "--cuda", present + 1, "--run-dir", tmp_path / "other")
    assert refused.status == 2 and f"--cuda {present + 1}: this machine has {present or 'no'} GPU" in refused.err
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_cuda_graph(tmp_path, call, tiny):
    losses = []
    for given, graphs in (((), True), (("--no-cuda-graph",), False)):
        outcome = call(train, *tiny, "--cuda", "1", *given, "--run-dir", tmp_path / f"run{len(given)}")
        assert outcome.status == 0, outcome.err
        assert ("as CUDA graphs" in outcome.out and "note: no CUDA graph" not in outcome.out) == graphs
        losses.append(read_lines(tmp_path / f"run{len(given)}/metrics.jsonl")[-1]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_measure(tmp_path, call, monkeypatch):
    """Images per second of several networks, a JSON object each, as distill_paths.py reads them; nothing is written."""
    monkeypatch.chdir(tmp_path)
    outcome = call(train, "--measure", "plane2", "resnet8", "--dataset", "digits", "--cuda", "0")
    assert (outcome.status, outcome.err) == (0, "")
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert [(line["network"], line["parameters"]) for line in lines] == [("plane2", 13_082), ("resnet8", 78_042)]
    rates = {"train_images_per_second", "evaluation_images_per_second"}
    for line in lines:
        assert set(line) == {"network", "parameters"} | rates and all(line[rate] > 0 for rate in rates)
    assert not list(tmp_path.iterdir())
    unknown_size = call(train, "--measure", "plane2", "--dataset", "folder", "--cuda", "0")
    assert unknown_size.status == 2 and unknown_size.err.count("\n") == 1 and "of a known size" in unknown_size.err


def test_pretrained(tmp_path, call, tiny, monkeypatch):
    """Torchvision's weights, from its cache, except the last layer: for a student and for a teacher trained first."""
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
    assert read_json(tmp_path / "run/config.json")["pretrained"] is True
    trained = last_weights(tmp_path / "run")
    parameters = [key for key in published if "running" not in key and "tracked" not in key]
    assert all(
        torch.allclose(trained[key], published[key], 0, 1e-20) for key in parameters if not key.startswith("fc.")
    )
    assert trained["fc.weight"].shape == (10, 1024)
    assert (tmp_path / f"run/torchvision-{name}_seed1_best.pth.tar").exists()
    given = ("--student", "torchvision:resnet18", "--pretrained", "--teacher")
    for teacher, pretrained in (("torchvision:resnet18", True), ("plane4", None)):
        assert run_config.parse([*given, teacher], elsewhere=True).teacher_config().pretrained is pretrained


def test_workers(tmp_path, call, tiny):
    """The weights and the state of PyTorch's generator do not depend on the number of worker processes."""
    for count in ("0", "2"):
        command = (*tiny, "--train-images", "100", "--augment", "rotate-crop-flip", "--workers", count)
        assert call(train, *command, "--run-dir", tmp_path / count).status == 0
    assert same_weights(last_weights(tmp_path / "0"), last_weights(tmp_path / "2"))
    states = [checkpoint.read(tmp_path / count / "last.pth.tar")["random_state"] for count in ("0", "2")]
    assert torch.equal(*states)


def test_run_dir(tmp_path, call, tiny, monkeypatch):
    """Without the flag: a folder under runs/ whose name is made of the settings."""
    monkeypatch.chdir(tmp_path)
    assert call(train, *tiny).status == 0 and call(train, *tiny, "--seed", "2").status == 0
    first, second = sorted((tmp_path / "runs").iterdir())
    assert re.fullmatch(r"digits-plane2-seed1-[0-9a-f]{6}", first.name)
    assert second.name.startswith("digits-plane2-seed2-")


def test_arguments_from_a_file(tmp_path, call, tiny):
    file = tmp_path / "arguments.txt"
    file.write_text("# a comment\n--seed 5 --momentum 0.5\n\n--batch-size\n64  # and another\n")
    assert call(train, *tiny, f"@{file}", "--momentum", "0.6", "--run-dir", tmp_path / "run").status == 0
    config = read_json(tmp_path / "run/config.json")
    assert (config["seed"], config["momentum"], config["batch_size"]) == (5, 0.6, 64)
    origins = {"seed": "arguments file", "momentum": "command line", "epochs": "command line"}
    assert origins.items() <= config["origins"].items()
