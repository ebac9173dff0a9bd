"""Recipes: schedules as lists, who beats whom, and the released code's arithmetic done again beside ours."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data_loader
import model_factory
import train
from takd.config import recipes
from takd.run import engine
from takd.run import run_directory as runlog
from takd.run import trainer as training


def resolved(*argv):
    """(settings, origins) of a command line, as train.py would use them."""
    given, origins, _ = train.given_settings([*map(str, argv), "--cuda", "0"])
    return train.resolve(given, origins)


def rates(settings):
    return [
        recipes.learning_rate_at(epoch, settings["learning_rate"], settings["milestones"], settings["learning_rate_decay"])
        for epoch in range(settings["epochs"])
    ]


# ---------------------------------------------------------------------------------------- schedules
def test_paper_resnet():
    settings, _ = resolved("--student", "resnet8", "--epochs", 160)
    assert rates(settings) == pytest.approx([0.1] * 80 + [0.01] * 40 + [0.001] * 40)
    assert (settings["momentum"], settings["nesterov"], settings["weight_decay"]) == (0.9, True, 1e-4)
    assert settings["augment"] == "crop-flip"


def test_paper_plane():
    settings, _ = resolved("--student", "plane10", "--epochs", 150)
    assert rates(settings) == pytest.approx([0.01] * 75 + [0.001] * 38 + [0.0001] * 37)
    assert settings["nesterov"] and settings["augment"] == "none"


@pytest.mark.parametrize("epochs, falls", [(1, []), (2, [1]), (3, [2]), (5, [3, 4])])
def test_a_short_run_does_not_begin_with_a_fall(epochs, falls):
    settings, _ = resolved("--student", "resnet8", "--epochs", epochs)
    assert rates(settings)[0] == 0.1
    assert [epoch for epoch in range(1, epochs) if rates(settings)[epoch] < rates(settings)[epoch - 1]] == falls


@pytest.mark.parametrize("epochs", [4, 7, 160])
def test_released_code_resnet(epochs):
    """0.01, then 0.001 from int(0.75 E) on; the published 0.1 is never used there."""
    settings, _ = resolved("--student", "resnet20", "--recipe", "released-code", "--epochs", epochs)
    assert rates(settings) == pytest.approx([0.001 if epoch >= int(epochs * 0.75) else 0.01 for epoch in range(epochs)])
    assert (settings["momentum"], settings["nesterov"], settings["weight_decay"]) == (0.9, False, 1e-4)
    assert settings["augment"] == "none"


def test_released_code_plane():
    settings, _ = resolved("--student", "plane2", "--recipe", "released-code", "--epochs", 20)
    assert rates(settings) == [0.01] * 20


def test_kl_is_divided_by_classes_in_the_released_codes_recipe_only():
    arguments = ("--student", "plane2", "--teacher", "plane10")
    assert resolved(*arguments)[0]["method_options"]["reduction"] == "batchmean"
    assert resolved(*arguments, "--recipe", "released-code")[0]["method_options"]["reduction"] == "mean"


def test_repdistiller():
    """240 epochs of batches of 64, .05 falling at 150, 180 and 210, .1 CE + .9 KD at temperature 4."""
    chosen, origins = resolved("--student", "resnet20", "--teacher", "resnet110", "--recipe", "repdistiller")
    assert (chosen["epochs"], chosen["batch_size"], chosen["augment"]) == (240, 64, "crop-flip")
    assert rates(chosen) == pytest.approx([0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30)
    assert (chosen["momentum"], chosen["nesterov"], chosen["weight_decay"]) == (0.9, False, 5e-4)
    assert chosen["method_options"] == {"temperature": 4.0, "lambda": 0.9, "reduction": "batchmean"}
    assert origins["lambda"] == origins["epochs"] == origins["batch_size"] == "recipe repdistiller"
    assert "initialisation" not in chosen
    mine = resolved("--student", "resnet20", "--teacher", "resnet110", "--recipe", "repdistiller", "--lambda", 0.5, "--epochs", 24)[
        0
    ]
    assert (mine["lambda"], mine["milestones"]) == (0.5, [15, 18, 21])


def test_cifar200():
    """200 epochs of batches of 128, 0.1 falling at 100 and 150, reflected borders, weights of its own."""
    chosen, _ = resolved("--student", "resnet20", "--recipe", "cifar200")
    assert (chosen["epochs"], chosen["batch_size"], chosen["augment"]) == (200, 128, "crop-flip-reflect")
    assert rates(chosen) == pytest.approx([0.1] * 100 + [0.01] * 50 + [0.001] * 50)
    assert (chosen["momentum"], chosen["nesterov"], chosen["weight_decay"]) == (0.9, False, 1e-4)
    assert chosen["initialisation"] == "kaiming-xavier"


def test_cifar200s_first_weights():
    """kaiming_normal_ (fan out) for convolutions, xavier_uniform_ for linear layers: their deviations, and the bound of the second."""
    torch.manual_seed(0)
    network = model_factory.create_network("plane8", 100)
    model_factory.kaiming_xavier(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            assert float(module.weight.detach().std()) == pytest.approx((2 / (9 * module.out_channels)) ** 0.5, rel=0.05)
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.98 * bound < float(module.weight.detach().abs().max()) <= bound


def test_cifar200_trains_from_those_weights():
    settings, _ = resolved("--student", "plane2", "--dataset", "digits", "--recipe", "cifar200")
    torch.manual_seed(settings["seed"])
    expected = model_factory.create_network("plane2", 10)
    model_factory.kaiming_xavier(expected)
    student = session_of(settings).student
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), expected.parameters(), strict=True))


# ------------------------------------------------------------------------------------ who beats whom
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_flags_beat_the_recipe(recipe):
    given = {"learning_rate": 0.3, "momentum": 0.5, "weight_decay": 0.0, "milestones": [1, 2], "learning_rate_decay": 0.5}
    flags = [
        text
        for key, value in given.items()
        for text in (f"--{key.replace('_', '-')}", *([value] if not isinstance(value, list) else value))
    ]
    settings, origins = resolved("--recipe", recipe, "--epochs", 3, *flags, "--no-nesterov", "--augment", "none")
    for key, value in given.items():
        assert settings[key] == value and origins[key] == "command line"
    assert settings["nesterov"] is False and settings["augment"] == "none"
    assert rates(settings) == pytest.approx([0.3, 0.15, 0.075])


def test_what_is_not_given_says_that_it_comes_from_the_recipe():
    settings, origins = resolved("--student", "resnet8")
    for key in (
        "learning_rate",
        "momentum",
        "weight_decay",
        "milestones",
        "learning_rate_decay",
        "nesterov",
        "augment",
        "epochs",
        "batch_size",
    ):
        assert origins[key] == "recipe paper" and key in settings
    assert (settings["epochs"], settings["batch_size"]) == (160, 128)


def test_digits_are_never_mirrored_by_a_recipe():
    settings, origins = resolved("--student", "resnet8", "--dataset", "digits")
    assert (settings["augment"], origins["augment"]) == ("none", "data set digits")


# ---------------------------------------------------------------------- the released code, done again
def session_of(settings):
    return training.Session(settings, None, "cpu", runlog.Console(io.StringIO()))


def released_losses(student, teacher, epochs_of_batches, rates, temperature, weight, mean, std):
    """The released train.py's steps: a fresh loop that shares no code with ours but the networks' layers."""
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (mean, std))
    optimizer = torch.optim.SGD(student.parameters(), lr=rates[0], momentum=0.9, weight_decay=1e-4)
    losses = []
    for rate, batches in zip(rates, epochs_of_batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        student.train()
        for images, labels in batches:
            images = (images.float() / 255 - mean) / std
            optimizer.zero_grad()
            output = student(images)
            loss = F.cross_entropy(output, labels)
            if teacher is not None:
                divergence = nn.KLDivLoss()(
                    F.log_softmax(output / temperature, dim=1), F.softmax(teacher(images).detach() / temperature, dim=1)
                )
                loss = (1 - weight) * loss + weight * temperature * temperature * divergence
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # the fault that is reproduced here
@pytest.mark.parametrize("teacher", [None, "live", "full"])
def test_losses_are_the_released_codes(teacher, teacher_file):
    """From the same initial weights and on the same batches, to 1e-5, a fall of the rate included.

    Four steps: from then on float32's rounding grows beyond 1e-5 between any two programs.
    """
    arguments = ["--student", "resnet8", "--dataset", "digits", "--recipe", "released-code", "--epochs", 2, "--precision", "fp32"]
    if teacher:
        arguments += ["--teacher", "plane2", "--teacher-checkpoint", teacher_file, "--temperature", 5, "--lambda", 0.6]
    settings, _ = resolved(*arguments)
    session = session_of(settings)
    short = session.train = session.train.subset(torch.arange(128 + 40), "digits/part")
    theirs = copy.deepcopy(session.student).to(memory_format=torch.contiguous_format)
    if teacher == "full":
        training.attach_table(session.teacher, short, "none", "full", teacher_file, 2, lambda line: None)
    ours, epochs_of_batches = [], []
    for session.epoch in range(settings["epochs"]):
        for group in session.optimizer.param_groups:
            group["lr"] = training.learning_rate(session)
        batches = list(data_loader.train_batches(short, settings["batch_size"], settings["augment"], 1, session.epoch))
        epochs_of_batches.append([(batch.images, batch.labels) for batch in batches])
        sums = engine.EpochSums()
        engine.train_epoch(session.student, session.method, session.teacher, session.optimizer, short, batches, sums, "fp32")
        ours += [float(row[0]) for row in sums.rows]
    network = model_factory.load_network(teacher_file, "plane2")[0].eval() if teacher else None
    expected = released_losses(theirs, network, epochs_of_batches, [0.01, 0.001], 5, 0.6, short.mean, short.std)
    assert len(ours) == len(expected) == 4
    assert ours == pytest.approx(expected, abs=1e-5)
