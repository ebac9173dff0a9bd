"""The commands on a GPU: epoch times, the same accuracy as on the CPU, two GPUs, and errors of one line."""

import json
import statistics

import pytest
import torch
from conftest import read_lines

import evaluate
import train


@pytest.fixture(scope="module")
def synthetic(cuda, run_command, tmp_path_factory):
    """Flags of learnable images of CIFAR-100's shape: 50,000 to train, on the CPU 500."""
    folder = tmp_path_factory.mktemp("synthetic")
    outcome = run_command("benchmarks/synthetic.py", folder, "--per-class", 500 if cuda else 5)
    assert outcome.status == 0, outcome
    return ("--dataset", "cifar100", "--dataset-dir", folder, "--no-download")


@pytest.mark.parametrize("network", ["plane2", "resnet8", "resnet110"])
def test_epoch_times(network, synthetic, cuda, run, tmp_path, record_property):
    """Median of all epochs but the first, in which steps warm up and are captured."""
    if not cuda and network == "resnet110":
        pytest.skip("takes minutes on the CPU")
    hows = {"as CUDA graphs": (), "kernel by kernel": ("--no-cuda-graph",)} if cuda else {"on the CPU": ()}
    measured = {}
    for how, flags in hows.items():
        run(how, "--student", network, *synthetic, "--epochs", 4, *flags)
        lines = read_lines(tmp_path / how / "metrics.jsonl")
        measured[how] = statistics.median(line["train_seconds"] for line in lines[1:])
    images = 50_000 if cuda else 45
    text = ", ".join(f"{seconds:.3f} s {how}" for how, seconds in measured.items())
    record_property(f"{network}, an epoch of {images} images", text)
    assert not cuda or measured["as CUDA graphs"] < 1.1 * measured["kernel by kernel"]


def test_the_cpu_and_the_gpu_score_a_checkpoint_alike(on_gpu, synthetic, run, call, tmp_path):
    run("run", "--student", "resnet8", *synthetic, "--epochs", 3, "--learning-rate", 0.1)
    command = ("--checkpoint", tmp_path / "run/resnet8_seed1_best.pth.tar", *synthetic, "--json")
    percent = [json.loads(call(evaluate, *command, "--cuda", n).out)["accuracy_percent"] for n in (0, 1)]
    assert percent[0] > 5 and percent[0] == pytest.approx(percent[1], abs=0.1), "chance is 1 %"


def test_two_gpus_share_a_batch(on_gpu, run_command, tmp_path):
    """Gradients and batch norm are those of one GPU, to rounding."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = ("--student", "resnet8", "--dataset", "digits", "--learning-rate", 0.01, "--precision", "fp32")
    losses = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        outcome = run_command("train.py", *command, "--epochs", 3, "--cuda", count, "--run-dir", folder)
        assert outcome.status == 0, outcome
        losses.append([line["train_loss"] for line in read_lines(folder / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def assert_one_line(outcome, *words):
    assert outcome.status in (1, 2) and outcome.err.startswith("train.py: error: "), outcome
    assert outcome.err.count("\n") == 1 and all(word in outcome.err for word in words), outcome.err


def test_out_of_memory_is_one_line_and_leaves_the_process_usable(on_gpu, run, call, tmp_path):
    command = ("--student", "resnet110", "--dataset", "digits", "--cuda", 1, "--batch-size", 1438)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 64e6
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert_one_line(call(train, *command, "--run-dir", tmp_path / "large"), "memory", "--batch-size")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    run("after", "--student", "plane2")


@pytest.mark.parametrize("visible", ["", "99"])
def test_a_gpu_that_cannot_be_used_is_one_line(visible, run_command, tmp_path):
    command = ("--student", "plane2", "--dataset", "digits", "--cuda", 1, "--run-dir", tmp_path / "run")
    assert_one_line(run_command("train.py", *command, CUDA_VISIBLE_DEVICES=visible), "--cuda 0")
    assert not (tmp_path / "run").exists()
