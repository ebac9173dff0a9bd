"""The teacher is frozen and scored, and its table says what it would say."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data_loader
import model_factory
import train
from takd.config.names import UserError
from takd.distill import teacher as teachers
from takd.images import augmentation
from takd.run import checkpoint, engine
from takd.run import run_directory as runlog
from takd.run import trainer as training


@pytest.fixture(scope="module")
def split():
    """Enough images for a few steps an epoch."""
    return data_loader.load("digits")[0].subset(torch.arange(300), "digits/part")


def make(path, split, precision="fp32"):
    network, about = model_factory.load_network(path, "plane2")
    return teachers.Teacher(network, about["mean"], about["std"], split, "cpu", precision)


def attach(teacher, split, path, augment="crop-flip", mode="lazy"):
    """What is said; the teacher has its table afterwards."""
    said = []
    teachers.attach_table(teacher, split, augment, mode, path, 2, said.append)
    return said


def table_files(path):
    return sorted(Path(f"{path}.logits").glob("*.float*"))


def epochs(split, count, augment="crop-flip"):
    for epoch in range(count):
        yield from data_loader.train_batches(split, 64, augment, seed=1, epoch=epoch)


def live(teacher, batch, split):
    """Asked directly, without a table."""
    table, teacher.table = teacher.table, None
    answer = teacher(batch, data_loader.normalise(batch.images, split.mean, split.std)).logits
    teacher.table = table
    return answer


def tabled(teacher, batch):
    return teacher(batch, None).logits  # no images: they cannot have been looked at


def close(ours, theirs):
    """Within float16's rounding of logits."""
    return torch.allclose(ours, theirs, rtol=2e-3, atol=2e-3)


# ------------------------------------------------------------------------------------------- frozen
def test_training_does_not_touch_the_teacher(teacher_file, tmp_path):
    given, origins, device = train.given_settings(
        ["--teacher", "plane2", "--teacher-checkpoint", str(teacher_file), "--student", "plane2", "--dataset", "digits"]
        + ["--epochs", "1", "--cuda", "0", "--teacher-cache", "live", "--run-dir", str(tmp_path / "run")]
    )
    settings, origins = train.resolve(given, origins)
    session = training.Session(settings, None, device, runlog.Console(io.StringIO()))
    network = session.teacher.network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    student = {key: value.clone() for key, value in session.student.state_dict().items()}
    directory = runlog.RunDirectory(tmp_path / "run")
    with checkpoint.StopSignals() as signals, directory.claim():
        training.fit(session, directory, None, origins, {}, signals)
    assert before and all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not all(torch.equal(student[key], value) for key, value in session.student.state_dict().items())
    assert not network.training and all(not value.requires_grad and value.grad is None for value in network.parameters())


@pytest.mark.parametrize("name", ["plane2", "plane10", "resnet8", "resnet20"])
def test_freezing_changes_no_answer_and_not_the_network(name):
    torch.manual_seed(0)
    network = model_factory.create_network(name, 10)
    with torch.no_grad():  # statistics that are not 0 and 1, as after training
        for _ in range(3):
            network(torch.rand(32, 3, 32, 32) * 3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    frozen = teachers.frozen(network, torch.device("cpu"), torch.float32)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())  # folded away
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), network.eval()(images), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_the_score_is_the_networks_own(teacher_file, split):
    network, about = model_factory.load_network(teacher_file)
    test = data_loader.load("digits")[1]
    plain = engine.score(engine.predict(network, test), test.labels)["accuracy_percent"]
    said = []
    assert make(teacher_file, split).score(test, teacher_file, plain, said.append) == pytest.approx(plain, abs=0.3)
    assert len(said) == 1 and f"{plain:.2f}" in said[0]


def test_a_score_unlike_the_recorded_one_is_a_warning(teacher_file, split):
    said = []
    make(teacher_file, split).score(data_loader.load("digits")[1], teacher_file, 50.0, said.append)
    assert said[-1].startswith("warning:")


def test_a_teacher_at_chance_is_refused_and_nothing_written(tmp_path, call, tiny):
    torch.manual_seed(0)
    file = tmp_path / "untrained.pth.tar"
    torch.save({"model_state_dict": model_factory.create_network("plane2", 10).state_dict()}, file)
    outcome = call(train, *tiny, "--teacher", "plane2", "--teacher-checkpoint", file, "--run-dir", tmp_path / "run")
    assert outcome.status == 2 and "no better than guessing" in outcome.err and outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_a_teacher_of_other_classes_is_refused(tmp_path, call, tiny):
    file = tmp_path / "hundred.pth.tar"
    torch.save({"model_state_dict": model_factory.create_network("plane2", 100).state_dict()}, file)
    outcome = call(train, *tiny, "--teacher", "plane2", "--teacher-checkpoint", file, "--run-dir", tmp_path / "run")
    assert outcome.status == 2 and "tells 100 classes apart, digits has 10" in outcome.err
    assert list(tmp_path.iterdir()) == [file]


def test_a_teacher_keeps_its_own_normalisation(teacher_file, split):
    """The released code's files expect other constants than digits': the pixels are normalised for them apart."""
    contents = checkpoint.read(teacher_file)
    shifted = make(teacher_file, split)
    shifted.mean, shifted.std, shifted.shares_normalisation = (0.5,) * 3, (0.25,) * 3, False
    batch = next(epochs(split, 1))
    network = model_factory.create_network("plane2", 10)
    network.load_state_dict(contents["model_state_dict"])
    expected = network.eval()((batch.images.float() / 255 - 0.5) / 0.25)
    torch.testing.assert_close(live(shifted, batch, split), expected, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize("augment, mode", [("crop-flip", "lazy"), ("none", "full"), ("none", "lazy")])
def test_the_table_says_what_the_teacher_says(teacher_file, split, augment, mode):
    teacher = make(teacher_file, split)
    attach(teacher, split, teacher_file, augment, mode)
    for batch in epochs(split, 3, augment):
        first, again = tabled(teacher, batch), tabled(teacher, batch)
        assert torch.equal(first, again) and first.dtype == torch.float32
        assert close(first, live(teacher, batch, split))
    assert len(table_files(teacher_file)) == 1


def test_views_are_not_mixed_up(teacher_file, split):
    """A view's logits are those of its own pixels and not of its mirror image's or its neighbour's."""
    teacher = make(teacher_file, split)
    attach(teacher, split, teacher_file)
    index = torch.arange(40)
    for view in (0, 1, 80, 81, 161):
        views = torch.full((40,), view)
        pixels = augmentation.apply("crop-flip", split.images[index], views)
        batch = data_loader.Batch(index, views, pixels, split.labels[index])
        others = batch._replace(images=augmentation.apply("crop-flip", split.images[index], views ^ 1))
        assert close(tabled(teacher, batch), live(teacher, batch, split))
        assert not close(tabled(teacher, batch), live(teacher, others, split))


def test_a_second_run_finds_the_table_filled(teacher_file, split):
    first = make(teacher_file, split)
    attach(first, split, teacher_file)
    filled = [tabled(first, batch) for batch in epochs(split, 1)]
    second = make(teacher_file, split)
    attach(second, split, teacher_file)
    with torch.no_grad():  # a teacher that would answer otherwise, were it asked
        for parameter in second.network.parameters():
            parameter.zero_()
    assert all(torch.equal(rows, tabled(second, batch)) for rows, batch in zip(filled, epochs(split, 1), strict=True))


def test_a_table_is_bound_to_teacher_data_and_normalisation(teacher_file, split):
    """Whatever the logits depend on gives another file, so that nothing false can be found in it."""
    attach(make(teacher_file, split), split, teacher_file)
    (first,) = table_files(teacher_file)
    attach(make(teacher_file, split), split, teacher_file)
    assert table_files(teacher_file) == [first]
    seen = {first}

    def another(teacher, split, augment="crop-flip"):
        attach(teacher, split, teacher_file, augment)
        made = set(table_files(teacher_file)) - seen
        assert len(made) == 1
        seen.update(made)

    another(make(teacher_file, split), split.subset(torch.arange(299, -1, -1), "digits/part"))  # another order
    pixels = split.images.clone()
    pixels[7, 0, 3, 3] ^= 1
    another(make(teacher_file, split), dataclasses.replace(split, images=pixels))
    shifted = make(teacher_file, split)
    shifted.mean = (0.31, *shifted.mean[1:])
    another(shifted, split)
    another(make(teacher_file, split), split, "none")
    contents = checkpoint.read(teacher_file)
    contents["model_state_dict"]["conv_layers.0.weight"][0, 0, 0, 0] += 0.01
    checkpoint.save(contents, teacher_file)
    another(make(teacher_file, split), split)


def tampered(file, damage):
    values = np.fromfile(file, np.float16)
    damage(values)
    values.tofile(file)


DAMAGES = {
    "other numbers": lambda file: tampered(file, lambda values: np.negative(values, out=values)),
    "shifted rows": lambda file: tampered(file, lambda values: values.__setitem__(slice(None), np.roll(values, 10 * 162))),
    "not numbers": lambda file: tampered(file, lambda values: values.__setitem__(slice(None), np.nan)),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:1000]),
    "emptied": lambda file: file.write_bytes(b""),
    "too long": lambda file: file.write_bytes(file.read_bytes() + b"\0" * 20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_rebuilt(damage, teacher_file, split):
    first = make(teacher_file, split)
    attach(first, split, teacher_file)
    for batch in epochs(split, 20):
        tabled(first, batch)
    (file,) = table_files(teacher_file)
    DAMAGES[damage](file)
    second = make(teacher_file, split)
    assert any(line.startswith("warning:") and "rebuilding" in line for line in attach(second, split, teacher_file))
    for batch in epochs(split, 1):
        assert close(tabled(second, batch), live(second, batch, split))


def test_logits_of_zero(teacher_file, split):
    """0 marks an empty row; a teacher that really answers 0 is answered by a number that rounds to it, and asked once."""
    teacher = make(teacher_file, split)
    attach(teacher, split, teacher_file)
    with torch.no_grad():
        for parameter in teacher.network.fc_layers.parameters():
            parameter.zero_()
    batch = next(epochs(split, 1))
    assert float(tabled(teacher, batch).abs().max()) < 1e-6
    with torch.no_grad():
        teacher.network.fc_layers[-1].bias.fill_(3.0)
    assert float(tabled(teacher, batch).abs().max()) < 1e-6


def test_a_method_that_needs_features_gets_no_table(teacher_file, split):
    teacher = make(teacher_file, split)
    teacher.needs_features = True
    attach(teacher, split, teacher_file, mode="auto")
    assert teacher.table is None and not table_files(teacher_file)
    batch = next(epochs(split, 1))
    assert len(teacher(batch, data_loader.normalise(batch.images, split.mean, split.std)).stages) > 1
    with pytest.raises(UserError, match="use live"):
        attach(teacher, split, teacher_file, mode="full")


def test_two_processes_fill_one_table(teacher_file, tmp_path, start_command, call, tiny):
    """They find the same numbers as each would alone, and leave both orders' rows whole."""
    command = ("train.py", *tiny, "--teacher", "plane2", "--teacher-checkpoint", teacher_file, "--augment", "crop-flip")
    command += ("--teacher-cache", "lazy")
    pair = [start_command(*command, "--seed", seed, "--run-dir", tmp_path / f"together{seed}") for seed in (1, 2)]
    ends = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    assert len(table_files(teacher_file)) == 1
    assert call(train, *command[1:], "--seed", 1, "--run-dir", tmp_path / "alone").status == 0
    summaries = [json.loads((tmp_path / kind / "summary.json").read_text()) for kind in ("together1", "alone")]
    assert summaries[0]["last"]["train_loss"] == summaries[1]["last"]["train_loss"]
    train_split = data_loader.load("digits")[0]
    teacher = make(teacher_file, train_split)
    attach(teacher, train_split, teacher_file)
    for seed in (1, 2):
        for batch in data_loader.train_batches(train_split, 128, "crop-flip", seed, 0):
            rows = torch.as_tensor(teacher.table.values[batch.index, batch.views]).float()
            assert close(rows, live(teacher, batch, train_split))
