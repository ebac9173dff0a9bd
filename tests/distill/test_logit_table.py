"""Tables of a teacher's logits: equal to the teacher's, bound to what they depend on, shared, rebuilt if damaged."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_json

import data_loader
import model_factory
import train
from takd.distill.teacher import Teacher
from takd.errors import UserError
from takd.images.batches import batches
from takd.images.split import Batch, Transform, epoch_plan, step_rows
from takd.run import checkpoint


@pytest.fixture(scope="module")
def digits():
    return data_loader.read("digits").train


@pytest.fixture(scope="module")
def split(digits):
    """Enough images for a few steps per epoch."""
    return digits.subset(torch.arange(300), "digits/part")


def teacher_of(path, split, needs_features=False, **changes):
    """The teacher in a checkpoint; `changes` are of its transform."""
    network, metadata = model_factory.load(path, "plane2")
    transform = Transform(tuple(metadata["mean"]), tuple(metadata["std"]), split.image_size)._replace(**changes)
    return Teacher(network, transform, split, "fp32", needs_features)


def attach(teacher, split, path, augment="crop-flip", mode="lazy"):
    """Give the teacher its table; returns the lines printed."""
    lines = []
    teacher.attach_table(split, augment, mode, path, lines.append)
    return lines


def table_files(path):
    return sorted(Path(f"{path}.logits").glob("*.float*"))


def epochs(split, count, augment="crop-flip", seed=1, batch_size=64):
    for epoch in range(count):
        plan = epoch_plan(split, augment, seed, epoch)
        yield from batches(split, augment, plan, step_rows(len(split), batch_size))


def live(teacher, batch):
    """Computed without the table."""
    table, teacher.table = teacher.table, None
    logits = teacher(batch, batch.split.transform(batch.images)).logits
    teacher.table = table
    return logits


def tabled(teacher, batch):
    return teacher(batch, None).logits  # without images, which the table does not need


def close(ours, theirs):
    """Within float16's rounding of logits."""
    return torch.allclose(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("augment, mode", [("crop-flip", "lazy"), ("none", "full"), ("none", "lazy")])
def test_the_table_holds_the_teachers_logits(teacher_file, split, augment, mode):
    teacher = teacher_of(teacher_file, split)
    attach(teacher, split, teacher_file, augment, mode)
    for batch in epochs(split, 3, augment):
        first, again = tabled(teacher, batch), tabled(teacher, batch)
        assert torch.equal(first, again) and first.dtype == torch.float32
        assert close(first, live(teacher, batch))
    assert len(table_files(teacher_file)) == 1


@pytest.mark.parametrize("view", [0, 1, 80, 81, 161])
def test_views_are_not_mixed_up(view, teacher_file, split):
    """A view's logits are those of its own pixels and not of its mirror image's."""
    teacher, index = teacher_of(teacher_file, split), torch.arange(40)
    attach(teacher, split, teacher_file)
    own, mirrored = (Batch(split, "crop-flip", index, torch.full((40,), number)) for number in (view, view ^ 1))
    assert close(tabled(teacher, own), live(teacher, own))
    assert not close(tabled(teacher, own), live(teacher, mirrored))


def test_a_second_run_reads_the_filled_table(teacher_file, split):
    first = teacher_of(teacher_file, split)
    attach(first, split, teacher_file)
    filled = [tabled(first, batch) for batch in epochs(split, 1)]
    second = teacher_of(teacher_file, split)
    attach(second, split, teacher_file)
    with torch.no_grad():  # what it would compute now is not what the table holds
        for parameter in second.network.parameters():
            parameter.zero_()
    assert all(torch.equal(rows, tabled(second, batch)) for rows, batch in zip(filled, epochs(split, 1), strict=True))


def test_a_table_is_bound_to_everything_that_its_logits_depend_on(teacher_file, split):
    """Teacher, images, their order, normalisation and augmentation: if one differs, so does the file."""
    attach(teacher_of(teacher_file, split), split, teacher_file)
    (first,) = table_files(teacher_file)
    attach(teacher_of(teacher_file, split), split, teacher_file)
    assert table_files(teacher_file) == [first]
    files = {first}

    def attach_another(split, augment="crop-flip", **changes):
        attach(teacher_of(teacher_file, split, **changes), split, teacher_file, augment)
        new = set(table_files(teacher_file)) - files
        assert len(new) == 1
        files.update(new)

    attach_another(split.subset(torch.arange(299, -1, -1), "digits/part"))  # another order
    pixels = split.images.clone()
    pixels[7, 0, 3, 3] ^= 1
    attach_another(dataclasses.replace(split, images=pixels))
    attach_another(split, mean=(0.31, 0.306, 0.306))
    attach_another(split, "none")
    contents = checkpoint.read(teacher_file)
    contents["model_state_dict"]["conv_layers.0.weight"][0, 0, 0, 0] += 0.01
    checkpoint.save(contents, teacher_file)
    attach_another(split)


def edited(edit):
    def damage(file):
        edit(np.fromfile(file, np.float16)).tofile(file)

    return damage


DAMAGES = {
    "other numbers": edited(np.negative),
    "shifted rows": edited(lambda values: np.roll(values, 10 * 162)),
    "not numbers": edited(lambda values: np.full_like(values, np.nan)),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:1000]),
    "emptied": lambda file: file.write_bytes(b""),
    "too long": lambda file: file.write_bytes(file.read_bytes() + b"\0" * 20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_rebuilt(damage, teacher_file, split):
    first = teacher_of(teacher_file, split)
    attach(first, split, teacher_file)
    for batch in epochs(split, 20):
        tabled(first, batch)
    (file,) = table_files(teacher_file)
    DAMAGES[damage](file)
    second = teacher_of(teacher_file, split)
    lines = attach(second, split, teacher_file)
    assert any(line.startswith("warning:") and "rebuilding" in line for line in lines)
    for batch in epochs(split, 1):
        assert close(tabled(second, batch), live(second, batch))


def test_a_disk_without_room_for_the_table(teacher_file, split, small_disk):
    """Writing to a mapped file without room would end the process by SIGBUS. The file is one of an earlier version:
    sparse, so that it has its size and no room."""
    attach(teacher_of(teacher_file, split), split, teacher_file)
    (file,) = table_files(teacher_file)
    assert 512 * file.stat().st_blocks >= file.stat().st_size == 2 * 300 * 162 * 10
    moved = Path(shutil.copy(teacher_file, small_disk("600k")))
    table = Path(f"{moved}.logits") / file.name
    table.parent.mkdir()
    table.touch()
    os.truncate(table, file.stat().st_size)
    teacher = teacher_of(moved, split)
    assert "No space left on device" in attach(teacher, split, moved, mode="auto")[-1] and teacher.table is None
    with pytest.raises(UserError, match="No space left on device"):
        attach(teacher, split, moved, mode="lazy")


def test_a_resident_table_is_filled_before_the_epoch_and_written_in_the_background(teacher_file, split):
    """As on a GPU: no step calls the teacher, and another run finds the rows in the file."""
    teacher, later = (teacher_of(teacher_file, split) for _ in range(2))
    attach(teacher, split, teacher_file)
    teacher.table.hold_on(torch.device("cpu"))
    plan = epoch_plan(split, "crop-flip", 1, 0)
    teacher.table.expect(plan.order, plan.views)
    answer, teacher.answer = teacher.answer, None
    rows = [tabled(teacher, batch) for batch in epochs(split, 1)]
    assert all(close(row, live(teacher, batch)) for row, batch in zip(rows, epochs(split, 1), strict=True))
    teacher.answer = answer
    teacher.table.expect(plan.order, plan.views)  # waits for the writer; nothing is missing
    attach(later, split, teacher_file)
    later.answer = None
    assert all(torch.equal(tabled(later, batch), row) for row, batch in zip(rows, epochs(split, 1), strict=True))


def test_logits_of_zero_are_computed_once(teacher_file, split):
    """0 marks an empty row: a logit of 0 is stored as the smallest number instead."""
    teacher = teacher_of(teacher_file, split)
    attach(teacher, split, teacher_file)
    batch = next(epochs(split, 1))
    with torch.no_grad():
        for parameter in teacher.network.fc_layers.parameters():
            parameter.zero_()
        assert float(tabled(teacher, batch).abs().max()) < 1e-6
        teacher.network.fc_layers[-1].bias.fill_(3.0)
    assert float(tabled(teacher, batch).abs().max()) < 1e-6


def test_a_method_that_uses_features_gets_no_table(teacher_file, split):
    teacher = teacher_of(teacher_file, split, needs_features=True)
    attach(teacher, split, teacher_file, mode="auto")
    assert teacher.table is None and not table_files(teacher_file)
    batch = next(epochs(split, 1))
    assert len(teacher(batch, split.transform(batch.images)).stages) > 1
    with pytest.raises(UserError, match="use live"):
        attach(teacher, split, teacher_file, mode="full")


def test_two_processes_fill_one_table(teacher_file, digits, tmp_path, start_command, call, tiny):
    """Each gets the numbers that it would compute alone, and the rows of both are whole."""
    command = (*tiny, "--teacher", "plane2", "--teacher-checkpoint", teacher_file, "--augment", "crop-flip")
    command += ("--teacher-cache", "lazy")
    folders = {seed: tmp_path / f"together{seed}" for seed in (1, 2)}
    pair = [
        start_command("train.py", *command, "--seed", seed, "--run-dir", folder) for seed, folder in folders.items()
    ]
    ends = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    assert len(table_files(teacher_file)) == 1
    assert call(train, *command, "--seed", 1, "--run-dir", tmp_path / "alone").status == 0
    together, alone = (read_json(folder / "summary.json") for folder in (folders[1], tmp_path / "alone"))
    assert together["last"]["train_loss"] == alone["last"]["train_loss"]
    teacher = teacher_of(teacher_file, digits)
    attach(teacher, digits, teacher_file)
    for seed in folders:
        for batch in epochs(digits, 1, seed=seed, batch_size=128):
            assert close(teacher.table.values[batch.index, batch.views].float(), live(teacher, batch))
