"""Runs on folders of images and at other image sizes: training, teaching, scoring, and continuing with workers."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import last_weights, read_json, same_weights, wait_until

import data_loader
import evaluate
import model_factory
import train
from takd.config import names
from takd.distill.teacher import Teacher
from takd.images.split import Transform
from takd.run import checkpoint

FOLDER = tuple("--dataset folder --image-size 40 --student plane2 --cuda 0 --precision fp32 --batch-size 6".split())
BEST = "plane2_seed1_best.pth.tar"


@pytest.fixture
def folder(photographs, tmp_path):
    """A copy of the photographs, to be changed."""
    return shutil.copytree(photographs, tmp_path / "three", ignore=shutil.ignore_patterns("takd-decoded*"))


@pytest.fixture(scope="module")
def trained(photographs, tmp_path_factory, call):
    """A finished run on the photographs, which it has learned."""
    run = tmp_path_factory.mktemp("trained") / "run"
    outcome = call(train, *FOLDER, "--dataset-dir", photographs, "--epochs", "2", "--run-dir", run)
    assert outcome.status == 0, outcome.err
    assert "data      folder: 36 images to train, 18 to validate, 40x40" in outcome.out
    assert read_json(run / "summary.json")["best"]["accuracy_percent"] > 80
    return run


def teacher_percent(outcome):
    return float(re.search(r"teacher   ([\d.]+) %", outcome.out)[1])


# -------------------------------------------------------------------------------------------------- folders
def test_a_checkpoint_has_size_and_classes_and_is_scored_as_recorded(trained, photographs, call):
    contents = checkpoint.read(trained / BEST)
    assert (contents["image_size"], contents["class_names"]) == (40, ["blue", "green", "red"])
    assert contents["mean"] == list(names.IMAGENET_MEAN)
    command = ("--checkpoint", trained / BEST, "--dataset-dir", photographs, "--cuda", "0", "--json")
    scored = json.loads(call(evaluate, *command).out)
    assert scored["test_accuracy_percent"] == pytest.approx(scored["recorded_test_accuracy_percent"])


@pytest.mark.parametrize("flags", ["", "--image-size 32", "--augment rotate-crop-flip --workers 0"])
def test_it_teaches_on_its_own_pixels_on_others_and_on_random_views(flags, trained, photographs, call, tmp_path):
    teacher = ("--teacher", "plane2", "--teacher-checkpoint", trained / BEST)
    command = (*FOLDER, "--dataset-dir", photographs, "--epochs", "1", *teacher, *flags.split())
    outcome = call(train, *command, "--run-dir", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert ("random augmentation (rotate-crop-flip) cannot be cached" in outcome.out) == ("--augment" in flags)
    recorded = read_json(trained / "summary.json")["best"]["test_accuracy_percent"]
    assert abs(teacher_percent(outcome) - recorded) < 12


def test_a_run_is_bound_to_its_images_and_not_to_their_place(trained, folder, call):
    command = (*FOLDER, "--epochs", "2", "--run-dir", trained, "--dataset-dir", folder)
    moved = call(train, *command)  # the same images elsewhere
    assert moved.status == 0 and moved.out.startswith("finished")
    (folder / "train/red/00.jpg").unlink()
    other = call(train, *command)
    assert other.status == 2 and "holds another run (images" in other.err


def test_a_teacher_of_other_classes_is_refused(trained, folder, call, tmp_path):
    for part in ("train", "val"):
        (folder / part / "red").rename(folder / part / "azure")
    command = (*FOLDER, "--teacher", "plane2", "--teacher-checkpoint", trained / BEST, "--dataset-dir", folder)
    outcome = call(train, *command, "--run-dir", tmp_path / "run")
    assert outcome.status == 2 and "was trained on other classes than those of" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_begin_with_a_damaged_image(folder, call, tmp_path):
    (folder / "train/red/05.jpg").write_bytes(b"")
    outcome = call(train, *FOLDER, "--dataset-dir", folder, "--run-dir", tmp_path / "run")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1) and "1 of 54 images cannot be used, first" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_val_folder_selects_the_epoch_and_takes_no_validation_split(folder, call, tmp_path):
    shutil.copytree(folder / "val", folder / "test")
    command = (*FOLDER, "--dataset-dir", folder, "--epochs", "1", "--run-dir", tmp_path / "run")
    assert "leave out --validation-split" in call(train, *command, "--validation-split", "0.1").err
    assert call(train, *command).status == 0
    assert read_json(tmp_path / "run/summary.json")["selection_split"] == "validation"


def test_an_interrupted_run_with_workers_continues_bit_for_bit(photographs, tmp_path, call, start_command):
    """SIGTERM to the whole group, as a cluster sends it: the workers receive it too, and ignore it."""
    command = (*FOLDER, "--dataset-dir", photographs, "--epochs", "3", "--batch-size", "1")
    command += ("--augment", "rotate-crop-flip", "--workers", "2")
    assert call(train, *command, "--run-dir", tmp_path / "whole").status == 0
    stopped = tmp_path / "stopped"
    process = start_command("train.py", *command, "--run-dir", stopped, "--save-minutes", "0.0001")
    last = stopped / "last.pth.tar"
    wait_until(lambda: last.exists() and checkpoint.read(last)["step"] > 0, process)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and err == "", (out, err)
    assert not (stopped / "summary.json").exists()
    assert call(train, *command, "--run-dir", stopped).status == 0
    assert same_weights(last_weights(stopped), last_weights(tmp_path / "whole"))


# --------------------------------------------------------------------------------------------------- sizes
def test_a_teacher_at_another_size_gets_its_own_size_and_its_own_table(tmp_path, call, teacher_file, tiny):
    """A teacher of 32x32 for a student at 48x48, and the other way round."""
    assert call(train, *tiny, "--image-size", "48", "--run-dir", tmp_path / "large").status == 0
    large = tmp_path / "large" / BEST
    for file, size in ((teacher_file, "48"), (large, "48"), (large, "32")):
        command = (*tiny, "--teacher", "plane2", "--teacher-checkpoint", file, "--image-size", size)
        outcome = call(train, *command, "--run-dir", tmp_path / f"{file.stem}-{size}")
        assert outcome.status == 0, outcome.err
        assert teacher_percent(outcome) == pytest.approx(checkpoint.read(file)["test_accuracy_percent"], abs=0.3)
    tables = list(Path(f"{large}.logits").glob("*.float32"))
    assert len(tables) == 1  # both students' table, as the teacher's pixels are the same


def test_a_table_belongs_to_the_teachers_size_and_not_to_the_students():
    halves, bindings = ((0.5,) * 3, (0.5,) * 3), {}
    network = model_factory.create("resnet8", 10)
    for student_size in (32, 48):
        split = data_loader.read("digits", image_size=student_size).test.subset(torch.arange(20), "digits/part")
        for size in (32, 48):
            teacher = Teacher(network, Transform(*halves, size), split, "fp32")
            bindings.setdefault(size, set()).add(teacher.binding(split))
    assert [len(found) for found in bindings.values()] == [1, 1] and bindings[32] != bindings[48]
