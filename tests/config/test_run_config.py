"""RunConfig: the identity of runs, names of folders, and the runs of teachers and repetitions."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

import train
from takd.config import names, run_config
from takd.config.run_config import RunConfig
from takd.errors import UserError

INCIDENTAL = {
    *("teacher_checkpoint", "teacher_cache", "any_teacher", "init_from", "dataset_dir", "download", "workers", "cuda"),
    *("cuda_graph", "run_dir", "save_minutes", "json"),
}
UNRECORDED = {"device", "repeat", "measure", "learning", "origins"}


def parse(command):
    return run_config.parse(command.split() + ["--cuda", "0"])


@pytest.fixture
def distilled():
    """A configuration with every kind of setting."""
    return parse(
        "--teacher plane10 --student plane2 --dataset digits --epochs 12 --lambda 0.3 --seed 7 --run-dir runs/x"
    )


# ---------------------------------------------------------------------------------------- records and identity
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(RunConfig)])
def test_only_settings_of_the_outcome_are_part_of_the_identity(distilled, name):
    changed = dataclasses.replace(distilled, **{name: {"another": "value"}})
    assert (changed.identity() == distilled.identity()) == (name in INCIDENTAL | UNRECORDED)
    assert (changed.record() == distilled.record()) == (name in UNRECORDED)


def test_a_record_has_the_settings_of_the_run_and_no_others(distilled):
    assert distilled.record() == {
        "student": "plane2", "dataset": "digits", "recipe": "paper", "epochs": 12, "batch_size": 128,
        "learning_rate": 0.01, "milestones": [6, 9], "learning_rate_decay": 0.1, "momentum": 0.9, "nesterov": True,
        "weight_decay": 0.0001, "augment": "none", "precision": "auto", "seed": 7, "validation_split": 0.0,
        "teacher": "plane10", "method": "kd", "temperature": 4.0, "lambda": 0.3,
        "method_options": {"temperature": 4.0, "lambda": 0.3, "reduction": "batchmean"},
        "teacher_cache": "auto", "dataset_dir": "./data", "cuda": 0, "run_dir": "runs/x", "save_minutes": 10.0,
    }  # fmt: skip
    assert json.loads(json.dumps(distilled.record())) == distilled.record()
    alone = parse("--student plane2").record()
    assert not alone.keys() & {"teacher", "method", "method_options", "temperature", "lambda", "teacher_cache"}


def test_every_setting_has_an_origin(distilled):
    assert distilled.origins.keys() == distilled.record().keys()
    given = {"student", "teacher", "dataset", "epochs", "lambda", "seed", "run_dir", "cuda"}
    assert {key for key, origin in distilled.origins.items() if origin == "command line"} == given
    assert distilled.origins["temperature"] == "default of kd" and distilled.origins["method"] == "default"


def test_origins_of_arguments_files_and_of_replaced_settings(tmp_path):
    (tmp_path / "arguments").write_text("--epochs 7 --seed 3  # comment\n")
    config = parse(f"@{tmp_path}/arguments --seed 5")
    assert (config.epochs, config.origins["epochs"]) == (7, "arguments file")
    assert (config.seed, config.origins["seed"]) == (5, "command line")
    replaced = config.replace("its own run", teacher_checkpoint="x")
    assert replaced.origins == config.origins | {"teacher_checkpoint": "its own run"}
    assert config.replace(seed=6).origins == config.origins and config.seed == 5


@pytest.mark.parametrize(
    "flags",
    ["--image-size 32", "--augment auto --precision auto", "--save-minutes 3 --no-download --json", "--run-dir x"],
)
def test_flags_that_change_nothing_leave_the_identity_unchanged(flags):
    command = "--student plane2 --dataset digits"
    assert parse(f"{command} {flags}").identity() == parse(command).identity()


# -------------------------------------------------------------------------------------- names of runs and files
BASE = {
    "student": "plane2", "dataset": "digits", "recipe": "paper", "epochs": 160, "batch_size": 128,
    "learning_rate": 0.01, "milestones": [80, 120], "learning_rate_decay": 0.1, "momentum": 0.9, "nesterov": True,
    "weight_decay": 0.0001, "augment": "none", "precision": "auto", "seed": 1, "validation_split": 0.0,
}  # fmt: skip
TAUGHT = {"teacher": "plane2", "teacher_weights": "66958a4ae1568862215694ff49631b66"}
TAUGHT_BY = "--teacher plane2 --teacher-checkpoint plane2.pth.tar"
# Of an earlier version of the suite: a run that it began must be found again, and continued.
NAMED = {
    "--student plane2 --dataset digits --epochs 3": ("digits-plane2-seed1-1b3d1a", {"epochs": 3, "milestones": [2]}),
    "": (
        "cifar100-resnet8-seed1-53e077",
        {"student": "resnet8", "dataset": "cifar100", "learning_rate": 0.1, "augment": "crop-flip"},
    ),
    f"--student plane2 --dataset digits {TAUGHT_BY} --epochs 12 --lambda 0.3": (
        "digits-plane2-plane2-seed1-35166b",
        TAUGHT
        | {"epochs": 12, "milestones": [6, 9], "method": "kd", "temperature": 4.0, "lambda": 0.3}
        | {"method_options": {"temperature": 4.0, "lambda": 0.3, "reduction": "batchmean"}},
    ),
    "--student resnet20 --dataset cifar10 --recipe repdistiller --augment none --validation-split 0.1 --precision fp32 "
    "--seed 7 --milestones 150": (
        "cifar10-resnet20-seed7-6dd720",
        {"student": "resnet20", "dataset": "cifar10", "recipe": "repdistiller", "epochs": 240, "batch_size": 64}
        | {"learning_rate": 0.05, "milestones": [150], "weight_decay": 0.0005, "nesterov": False, "seed": 7}
        | {"validation_split": 0.1, "precision": "fp32"},
    ),
    "--student cnn5 --dataset folder --dataset-dir three --image-size 64 --train-images 5": (
        "folder-cnn5-seed1-2bf7ad",
        {"student": "cnn5", "dataset": "folder", "augment": "flip", "image_size": 64, "train_images": 5}
        | {"images": "4a596e1d8568e8685509916e4a26e53e"},
    ),
    "--student torchvision:resnet18 --pretrained --image-size 64 --recipe cifar200 --momentum 0": (
        "cifar100-torchvision-resnet18-seed1-6e87b6",
        {"student": "torchvision:resnet18", "dataset": "cifar100", "pretrained": True, "image_size": 64}
        | {"recipe": "cifar200", "epochs": 200, "learning_rate": 0.1, "milestones": [100, 150], "momentum": 0.0}
        | {"nesterov": False, "augment": "crop-flip-reflect", "initialisation": "kaiming-xavier"},
    ),
    f"--student mine.py:Net --dataset digits {TAUGHT_BY} --method mine.py:Mine": (
        "digits-plane2-mine.py-Net-seed1-e7bc8c",
        TAUGHT
        | {"student": "mine.py:Net", "method": "mine.py:Mine", "method_file": "5d6314cc0959984c", "temperature": 3.0}
        | {"method_options": {"weight": 1.0, "temperature": 3.0, "on": True, "word": "x"}},
    ),
}
MINE = '''from torch import nn
class Mine(nn.Module):
    """Mine."""
    needs_features = False
    def __init__(self, *, weight=1.0, temperature=3.0, on=True, word="x"):
        super().__init__()
class Net(nn.Module):
    pass
'''


@pytest.mark.parametrize("command", NAMED)
def test_a_run_of_an_earlier_version_has_the_same_folder(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    shutil.copy(ROOT / "tests/golden/plane2.pth.tar", tmp_path)
    for part in ("train", "val"):
        for name in "abc":
            (tmp_path / "three" / part / name).mkdir(parents=True)
            (tmp_path / "three" / part / name / "0.png").write_bytes(bytes(100))
            (tmp_path / "three" / part / name / "1.jpg").write_bytes(bytes(123))
    folder, differences = NAMED[command]
    config = train.with_digests(parse(command))
    assert config.identity() == BASE | differences
    assert config.run_path == Path("runs") / folder


def test_names_of_files_in_a_trial_in_a_given_folder_and_in_neither(distilled):
    assert distilled.run_path == Path("runs/x")
    assert distilled.best_file == Path("runs/x/plane2_seed7_best.pth.tar")
    trial = distilled.replace(trial="a1")
    assert trial.best_file == Path("runs/x/a1/plane2_a1_best.pth.tar")
    assert trial.replace(run_dir=None).run_path == Path("runs/nni-unknown/a1")
    unnamed = distilled.replace(run_dir=None)
    assert unnamed.run_path.name.startswith("digits-plane10-plane2-seed7-") and unnamed.run_path.parent == Path("runs")
    assert distilled.replace(student="nets/mine.py:Net").best_file.name == "nets-mine.py-Net_seed7_best.pth.tar"


# ------------------------------------------------------------------------------------------------- other runs
TO_TEACHER = (
    "--dataset cifar10 --dataset-dir x --no-download --image-size 48 --train-images 500 --validation-split 0.2 "
    "--epochs 12 --batch-size 32 --recipe repdistiller --augment rotate-crop-flip --workers 2 --precision fp32 "
    "--save-minutes 3 --seed 7"
)
NOT_TO_TEACHER = (
    "--learning-rate 0.3 --momentum 0.5 --weight-decay 0 --milestones 1 --learning-rate-decay 0.5 --nesterov "
    "--warmup-epochs 1 --label-smoothing 0.1 --method dkd --method-option warmup=3 --temperature 3 --json "
    "--teacher-cache live"
)


@pytest.mark.parametrize("student", ["plane2", "resnet8"])
def test_a_teachers_run_is_that_of_its_own_command(student):
    """It has the student's data, length, seed and recipe, and its own family's optimisation settings."""
    config = parse(f"--student {student} --teacher plane10 {TO_TEACHER} {NOT_TO_TEACHER}")
    expected = parse(f"--student plane10 {TO_TEACHER}")
    teacher = config.teacher_config()
    assert teacher.record() == expected.record() and teacher.run_path == expected.run_path
    assert teacher.origins == expected.origins and teacher.device == config.device == "cpu"


def test_a_teachers_recipe_is_its_own_familys():
    config = parse("--student plane2 --teacher resnet20 --dataset cifar10")
    assert (config.learning_rate, config.augment) == (0.01, "none")
    teacher = config.teacher_config()
    assert (teacher.learning_rate, teacher.augment) == (0.1, "crop-flip")
    assert teacher.origins["augment"] == "recipe paper"


def test_a_teacher_is_beside_its_student_in_a_given_folder(distilled):
    assert distilled.teacher_config().run_path == Path("runs/x/teacher")
    assert distilled.replace(run_dir=None).teacher_config().run_dir is None


@pytest.mark.parametrize("teacher, pretrained", [("torchvision:resnet18", True), ("resnet50", True), ("plane4", None)])
def test_only_a_torchvision_teacher_is_pretrained(teacher, pretrained):
    config = parse(f"--student torchvision:resnet18 --teacher {teacher} --pretrained")
    assert config.teacher_config().pretrained is pretrained


def test_all_trials_of_a_tuner_have_one_teacher(distilled):
    """A proposed seed is the student's alone."""
    trials = [distilled.replace("tuner", seed=seed, trial=trial) for seed, trial in ((20, "a"), (31, "b"))]
    teachers = [trial.teacher_config() for trial in trials]
    assert teachers[0].record() == teachers[1].record() == distilled.replace(seed=1).teacher_config().record()
    assert (teachers[0].seed, teachers[0].trial) == (1, None)


def test_repetitions_are_the_runs_of_their_seeds(distilled):
    assert distilled.repetitions() == [distilled]
    command = "--teacher plane10 --student plane2 --dataset digits --teacher-checkpoint x"
    repeated = parse(f"{command} --seed 4 --repeat 3").repetitions()
    singles = [parse(f"{command} --seed {seed}") for seed in (4, 5, 6)]
    assert [each.identity() for each in repeated] == [each.identity() for each in singles]
    assert [each.run_path for each in repeated] == [each.run_path for each in singles]
    in_folder = parse(f"{command} --seed 4 --repeat 2 --run-dir x")
    assert [each.run_path for each in in_folder.repetitions()] == [Path("x/seed4"), Path("x/seed5")]
    assert in_folder.teacher_config().run_path == Path("x/teacher")


# --------------------------------------------------------------------------- what a user's own network declares
@pytest.fixture
def own(tmp_path):
    """own(attributes) writes a file with a class that has these."""

    def write(attributes):
        path = tmp_path / "nets.py"
        path.write_text(f"class Net:\n    {attributes}\n    def __init__(self, classes, pretrained): pass\n")
        return f"{path}:Net"

    return write


def test_the_image_size_of_a_users_class(own):
    """Its students and the teachers trained first get it where no flag says otherwise."""
    name = own("image_size = 48")
    config = parse(f"--student {name} --teacher plane2")
    assert (config.image_size, config.origins["image_size"]) == (48, "its class")
    assert config.teacher_config().image_size is None
    assert parse(f"--student plane2 --teacher {name}").teacher_config().image_size == 48
    assert parse(f"--student {name} --image-size 64").image_size == 64
    assert parse(f"--student {name} --image-size 32").image_size is None  # the data set's usual one
    again = run_config.command(config.record(), config.origins)
    assert "--image-size" not in again and parse(" ".join(again)).identity() == config.identity()


def test_pretrained_weights_of_a_users_class(own):
    assert parse(f"--student plane2 --teacher {own('depth = 1')} --pretrained").teacher_config().pretrained


@pytest.mark.parametrize(
    "attributes, message",
    [
        ("mean = 0.5", "mean must be three numbers, of pixels in 0..1, not 0.5"),
        ("mean = (0.5, 0.5)", "mean must be three numbers"),
        ("mean = ('a', 'b', 'c')", "mean must be three numbers"),
        ("std = (0.5, 0, 0.5)", "std must be three numbers above 0"),
        ("image_size = (224, 224)", "image_size must be a whole number from 8 to 1024, not (224, 224)"),
        ("image_size = 4", "image_size must be a whole number from 8 to 1024, not 4"),
    ],
)
def test_a_users_class_that_declares_something_else(attributes, message, own):
    with pytest.raises(UserError) as caught:
        names.declared_input(own(attributes))
    assert message in str(caught.value)
