"""One test for each bug of the released code, where it would fail. Those about the tuner are in test_nni.py."""

import json
import os
import re
import signal
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import last_weights, read_json, read_lines, same_weights, softmax, wait_until

import data_loader
import evaluate
import model_factory
import train
from takd.config import flags, names, recipes, run_config
from takd.distill import evaluation
from takd.distill.losses import distillation_kl
from takd.distill.teacher import Teacher
from takd.errors import UserError
from takd.images.split import Batch
from takd.run import checkpoint


def test_kl_is_not_divided_by_the_classes():
    """nn.KLDivLoss() averages over batch and classes, which made the term 10 or 100 times too small."""
    for classes in (10, 100):
        student, teacher_logits = torch.randn(2, 8, classes, generator=torch.Generator().manual_seed(0))
        p, q = (softmax(each.double().numpy() / 3) for each in (teacher_logits, student))
        by_hand = 9 * (p * np.log(p / q)).sum() / 8
        assert float(distillation_kl(student, teacher_logits, 3.0)) == pytest.approx(by_hand, rel=1e-5)


def test_the_learning_rate_decays_at_the_papers_epochs():
    """`epoch < int(epoch / 2.0)` was never true: 0.1 was never used."""
    config = run_config.parse(["--student", "resnet110"], elsewhere=True)
    rates = [config.learning_rate_at(epoch) for epoch in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_learning_rate_has_an_effect(tmp_path, call, tiny):
    """It was overwritten in every epoch."""
    command = (*tiny, "--learning-rate", "0.03", "--epochs", "2", "--milestones", "1")
    assert call(train, *command, "--run-dir", tmp_path).status == 0
    records = read_lines(tmp_path / "metrics.jsonl")
    assert [record["learning_rate"] for record in records] == pytest.approx([0.03, 0.003])
    (group,) = checkpoint.read(tmp_path / "last.pth.tar")["optimizer_state_dict"]["param_groups"]
    assert group["lr"] == pytest.approx(0.003)


def test_batch_size_has_an_effect(tmp_path, call, tiny):
    """It was parsed and never passed on; the number of steps in an epoch shows it."""
    steps = {}
    for size in (50, 1438):
        command = (*tiny, "--batch-size", size, "--run-dir", tmp_path / str(size))
        assert call(train, *command).status == 0
        steps[size] = checkpoint.read(tmp_path / str(size) / "last.pth.tar")
    assert not same_weights(steps[50]["model_state_dict"], steps[1438]["model_state_dict"])
    counts = [int(steps[size]["model_state_dict"]["conv_layers.1.num_batches_tracked"]) for size in (50, 1438)]
    assert counts == [29, 1]


def test_dataset_dir_has_an_effect(tmp_path, call, tiny, class_folders):
    """It was parsed and never passed on."""
    class_folders(tmp_path / "here")
    command = (*tiny, "--dataset", "cifar10", "--no-download", "--run-dir", tmp_path / "run", "--dataset-dir")
    assert f"no cifar10 in {tmp_path / 'elsewhere'}" in call(train, *command, tmp_path / "elsewhere").err
    assert "30 images to train" in call(train, *command, tmp_path / "here").out


def test_the_teacher_builds_no_graph(teacher_file):
    """Every step built its graph and ran a backward pass through it."""
    split = data_loader.read("digits").train
    network, _ = model_factory.load(teacher_file)
    teacher = Teacher(network.requires_grad_(True), split.transform, split, "fp32")
    batch = Batch(split, "none", torch.arange(40), torch.zeros(40, dtype=torch.int64))
    images = split.transform(batch.images).requires_grad_(True)
    with torch.enable_grad():
        assert not teacher(batch, images).logits.requires_grad
        teacher.needs_features = True
        features = teacher(batch, images)
    assert not any(each.requires_grad for each in (*features.stages, features.pooled, features.logits))


def test_a_teacher_trained_in_the_same_run_has_its_own_recipe(tmp_path, call, tiny):
    """It had the settings of the student's family. Here it has its own, and none of the student's optimiser flags."""
    command = (
        *tiny,
        "--student",
        "resnet8",
        "--teacher",
        "plane4",
        "--learning-rate",
        "0.02",
        "--no-nesterov",
        "--seed",
        "3",
    )
    command += ("--run-dir", tmp_path)
    outcome = call(train, *command)
    assert outcome.status == 0, outcome.err
    student, taught = read_json(tmp_path / "config.json"), read_json(tmp_path / "teacher/config.json")
    assert (student["learning_rate"], student["nesterov"], student["milestones"]) == (0.02, False, [])
    own = recipes.recipe("paper", "plane4")
    assert (taught["learning_rate"], taught["nesterov"]) == (own.learning_rate, own.nesterov)
    assert own.learning_rate != recipes.recipe("paper", "resnet8").learning_rate
    assert taught["milestones"] == recipes.milestone_epochs(own, 1)
    assert (taught["student"], taught["seed"]) == ("plane4", 3) and "teacher" not in taught
    assert read_json(tmp_path / "summary.json")["path"] == ["plane4", "resnet8"]
    assert "finished" in call(train, *command).out


def test_an_unknown_data_set_is_not_cifar10():
    for name in ("cifar-11", "imagenet", ""):
        with pytest.raises(UserError, match="data sets: cifar10 cifar100 digits"):
            data_loader.read(name)


@pytest.mark.parametrize("name", ["resnet9", "resnet", "plane3", "10", "", "None"])
def test_an_unknown_network_is_an_error_with_the_list(name):
    """It raised TypeError: 'NoneType' object is not callable."""
    with pytest.raises(UserError, match=rf"unknown network '{name}'.*; networks: resnet8 resnet14"):
        model_factory.create(name, 10)


def test_cuda_on_is_not_the_cpu():
    for word in ("1", "true", "yes", "t", "y", "on", "ON", "True"):
        assert flags.cuda(word) == 1
    for word in ("0", "false", "no", "f", "n", "off", "OFF"):
        assert flags.cuda(word) == 0
    assert flags.cuda("2") == 2
    if flags.gpus_present():
        assert flags.device_name(1) == "cuda"
    else:
        with pytest.raises(UserError, match="this machine has no GPU"):
            flags.device_name(1)


def test_it_runs_without_nni(tmp_path, run_command, tiny):
    """It ended with KeyError: 'seed'. Here importing nni would end the process; the defaults are recorded."""
    (tmp_path / "nni.py").write_text("raise SystemExit('nni was imported')")
    command = (*tiny, "--teacher", "plane2", "--run-dir", tmp_path / "run")
    outcome = run_command("train.py", *command, PYTHONPATH=str(tmp_path))
    assert (outcome.status, outcome.err) == (0, "")
    config = read_json(tmp_path / "run/config.json")
    assert config["temperature"] > 1 and 0 < config["lambda"] < 1 and config["seed"] == 1


def test_runs_do_not_overwrite_each_other(tmp_path, call, tiny, monkeypatch):
    """All files were called ..._None_best."""
    monkeypatch.chdir(tmp_path)
    for given in ([], ["--seed", "2"], ["--momentum", "0.8"]):
        assert call(train, *tiny, *given).status == 0
    files = sorted((tmp_path / "runs").glob("*/*_best.pth.tar"))
    assert len(files) == 3 and not any("None" in file.name for file in files)
    assert {file.name for file in files} == {"plane2_seed1_best.pth.tar", "plane2_seed2_best.pth.tar"}


def test_a_checkpoint_from_a_gpu_loads_on_the_cpu(teacher_file, tmp_path, call):
    """It could not be loaded. The storages of this file are marked cuda:0 by hand."""
    moved = tmp_path / "from_gpu.pth.tar"
    with zipfile.ZipFile(teacher_file) as source, zipfile.ZipFile(moved, "w") as target:
        for member in source.namelist():
            contents = source.read(member)
            if member.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in contents
                contents = contents.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(member, contents)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):  # the file is what it claims to be
            torch.load(moved, weights_only=True)
    assert same_weights(checkpoint.read(moved)["model_state_dict"], checkpoint.read(teacher_file)["model_state_dict"])
    outcome = call(evaluate, "--checkpoint", moved, "--cuda", "0", "--json")
    assert outcome.status == 0 and json.loads(outcome.out)["images"] == 359


def test_an_interrupted_run_continues(tmp_path, call, tiny):
    """It could not. This stops after an epoch; test_train.py sends each signal inside an epoch."""
    command = (*tiny, "--epochs", "3", "--batch-size", "4", "--run-dir")
    assert call(train, *command, tmp_path / "whole").status == 0

    def stop_after_an_epoch():
        wait_until((tmp_path / "stopped/last.pth.tar").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # where the run ends first
    try:
        threading.Thread(target=stop_after_an_epoch, daemon=True).start()
        assert call(train, *command, tmp_path / "stopped").status == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    outcome = call(train, *command, tmp_path / "stopped")
    assert outcome.status == 0 and "continuing at epoch 2" in outcome.out
    assert same_weights(last_weights(tmp_path / "stopped"), last_weights(tmp_path / "whole"))


def test_selection_can_be_on_held_out_images(tmp_path, call, tiny):
    """It was on the test set only. The validation images select the epoch, and the record names them."""
    command = (*tiny, "--epochs", "4", "--batch-size", "16", "--learning-rate", "0.05", "--validation-split", "0.1")
    assert call(train, *command, "--run-dir", tmp_path).status == 0
    summary = read_json(tmp_path / "summary.json")
    records = read_lines(tmp_path / "metrics.jsonl")
    best = max(records, key=lambda record: record["validation_accuracy_percent"])
    for outcome, record in ((summary["best"], best), (summary["last"], records[-1])):
        assert (outcome["epoch"], outcome["split"]) == (record["epoch"], "validation")
        assert outcome["accuracy_percent"] == record["validation_accuracy_percent"]
        assert outcome["test_accuracy_percent"] == record["test_accuracy_percent"]
    assert summary["selection_split"] == "validation"


def test_a_tuned_seed_is_the_students_and_not_the_teachers():
    """The seed is among the tuned values; trials with different teachers could not be compared."""
    words = ["--teacher", "plane4", "--student", "plane2", "--dataset", "digits", "--seed", "55"]
    config = run_config.parse(words, elsewhere=True)
    assert config.teacher_config().seed == 55
    assert config.replace("tuner", seed=55).teacher_config().seed == flags.DEFAULT_SEED


def test_the_same_seed_gives_the_same_bits(tmp_path, call, run_command, tiny):
    """The loader's order was unseeded. This compares with another process, and after other draws from the generator."""
    torch.rand(17)
    assert call(train, *tiny, "--seed", "5", "--run-dir", tmp_path / "here").status == 0
    assert run_command("train.py", *tiny, "--seed", "5", "--run-dir", tmp_path / "process").status == 0
    assert call(train, *tiny, "--seed", "6", "--run-dir", tmp_path / "other").status == 0
    assert same_weights(last_weights(tmp_path / "here"), last_weights(tmp_path / "process"))
    assert not same_weights(last_weights(tmp_path / "here"), last_weights(tmp_path / "other"))


def test_last_and_best_are_both_kept(tmp_path, call, tiny):
    """Only the best was. Each is the network of the epoch that the summary names for it."""
    command = (*tiny, "--epochs", "3", "--batch-size", "16", "--learning-rate", "0.05", "--run-dir", tmp_path)
    assert call(train, *command).status == 0
    summary = read_json(tmp_path / "summary.json")
    best, last = (checkpoint.read(tmp_path / name) for name in ("plane2_seed1_best.pth.tar", "last.pth.tar"))
    assert best["epoch"] == summary["best"]["epoch"] and last["epoch"] == 3 and summary["last"]["epoch"] == 2
    test = data_loader.read("digits").test
    for contents, outcome in ((best, summary["best"]), (last, summary["last"])):
        network = model_factory.from_state("plane2", contents["model_state_dict"], "file")
        percent = evaluation.score(evaluation.predict(network, test), test.labels)["accuracy_percent"]
        assert percent == pytest.approx(outcome["test_accuracy_percent"], abs=0.01)
        assert re.fullmatch(r"plane\d+", contents["model"]) and contents["model"] in names.NETWORKS
