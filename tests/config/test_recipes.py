"""Recipes: their schedules as lists, precedence of flags, and the released code's computation repeated beside ours."""

import pytest
import torch
from conftest import same_weights
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import data_loader
import model_factory
import train
from takd.config import recipes, run_config
from takd.images.split import Batch, epoch_plan
from takd.run.distributed import World


def parse(*argv):
    return run_config.parse([*map(str, argv), "--cuda", "0"])


def rates(config):
    return [config.learning_rate_at(epoch) for epoch in range(config.epochs)]


def optimiser(config):
    return config.momentum, config.nesterov, config.weight_decay


# ---------------------------------------------------------------------------------------- schedules
def test_paper_resnet():
    config = parse("--student", "resnet8", "--epochs", 160)
    assert rates(config) == pytest.approx([0.1] * 80 + [0.01] * 40 + [0.001] * 40)
    assert (*optimiser(config), config.augment) == (0.9, True, 1e-4, "crop-flip")


def test_paper_plane():
    config = parse("--student", "plane10", "--epochs", 150)
    assert rates(config) == pytest.approx([0.01] * 75 + [0.001] * 38 + [0.0001] * 37)
    assert (config.nesterov, config.augment) == (True, "none")


@pytest.mark.parametrize("epochs, decays", [(1, []), (2, [1]), (3, [2]), (5, [3, 4])])
def test_a_short_run_does_not_begin_with_a_decay(epochs, decays):
    found = rates(parse("--student", "resnet8", "--epochs", epochs))
    assert found[0] == 0.1 and [epoch for epoch in range(1, epochs) if found[epoch] < found[epoch - 1]] == decays


@pytest.mark.parametrize("epochs", [4, 7, 160])
def test_released_code_resnet(epochs):
    """0.01, then 0.001 from int(0.75 E) on; the published 0.1 is never used there."""
    config = parse("--student", "resnet20", "--recipe", "released-code", "--epochs", epochs)
    assert rates(config) == pytest.approx([0.001 if epoch >= int(epochs * 0.75) else 0.01 for epoch in range(epochs)])
    assert (*optimiser(config), config.augment) == (0.9, False, 1e-4, "none")


def test_released_code_plane():
    assert rates(parse("--student", "plane2", "--recipe", "released-code", "--epochs", 20)) == [0.01] * 20


def test_kl_is_divided_by_classes_in_the_released_codes_recipe_only():
    arguments = ("--student", "plane2", "--teacher", "plane10")
    assert parse(*arguments).method_options["reduction"] == "batchmean"
    assert parse(*arguments, "--recipe", "released-code").method_options["reduction"] == "mean"


def test_repdistiller():
    """240 epochs of batches of 64, .05 decaying at 150, 180 and 210, .1 CE + .9 KD at temperature 4."""
    arguments = ("--student", "resnet20", "--teacher", "resnet110", "--recipe", "repdistiller")
    config = parse(*arguments)
    assert (config.epochs, config.batch_size, config.augment) == (240, 64, "crop-flip")
    assert rates(config) == pytest.approx([0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30)
    assert optimiser(config) == (0.9, False, 5e-4)
    assert config.method_options == {"temperature": 4.0, "lambda": 0.9, "reduction": "batchmean"}
    assert {config.origins[key] for key in ("lambda", "epochs", "batch_size")} == {"recipe repdistiller"}
    assert "initialisation" not in config.record()
    changed = parse(*arguments, "--lambda", 0.5, "--epochs", 24)
    assert (changed.lambda_, changed.milestones) == (0.5, [15, 18, 21])


def test_cifar200():
    """200 epochs of batches of 128, 0.1 decaying at 100 and 150, reflected borders, an initialisation of its own."""
    config = parse("--student", "resnet20", "--recipe", "cifar200")
    assert (config.epochs, config.batch_size, config.augment) == (200, 128, "crop-flip-reflect")
    assert rates(config) == pytest.approx([0.1] * 100 + [0.01] * 50 + [0.001] * 50)
    assert (*optimiser(config), config.initialisation) == (0.9, False, 1e-4, "kaiming-xavier")
    fsp = parse("--student", "resnet20", "--teacher", "resnet20", "--method", "fsp", "--recipe", "cifar200")
    assert fsp.method_options == {"beta": pytest.approx(1 / 3)}


def test_cifar200s_initialisation():
    """kaiming_normal_ (fan out) for convolutions, xavier_uniform_ for linear layers: deviations, and a bound."""
    torch.manual_seed(0)
    network = model_factory.create("plane8", 100)
    model_factory.kaiming_xavier(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            deviation = (2 / (9 * module.out_channels)) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(deviation, rel=0.05)
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.98 * bound < float(module.weight.detach().abs().max()) <= bound


def test_cifar200_trains_from_that_initialisation():
    config = parse("--student", "plane2", "--dataset", "digits", "--recipe", "cifar200")
    torch.manual_seed(config.seed)
    expected = model_factory.create("plane2", 10)
    model_factory.kaiming_xavier(expected)
    student = train.assemble(config, data_loader.random_split("digits"), None, "fp32", None).student
    assert same_weights(student.state_dict(), expected.state_dict())


# ------------------------------------------------------------------------- schedules that no recipe has
def pytorchs(config):
    """The rates of PyTorch's own schedulers, stepped once an epoch."""
    optimizer, warmup = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate), config.warmup_epochs
    if config.schedule == "cosine":
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, config.epochs - (warmup or 0))
        if warmup:
            parts = [lr_scheduler.LinearLR(optimizer, total_iters=warmup), scheduler]
            scheduler = lr_scheduler.SequentialLR(optimizer, parts, [warmup])
    else:
        scheduler = lr_scheduler.MultiStepLR(optimizer, config.milestones)
        if warmup:
            parts = [scheduler, lr_scheduler.LinearLR(optimizer, total_iters=warmup)]
            scheduler = lr_scheduler.ChainedScheduler(parts)
    found = []
    for _ in range(config.epochs):
        found += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("epochs", [1, 4, 7, 160])
@pytest.mark.parametrize("schedule", ["steps", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 20])
def test_schedules_are_those_of_pytorch(epochs, schedule, warmup):
    command = "--student", "resnet8", "--epochs", epochs, "--schedule", schedule, "--warmup-epochs", warmup
    if warmup < epochs:
        assert rates(parse(*command)) == pytest.approx(pytorchs(parse(*command)), rel=1e-6)


def test_settings_that_are_off_are_not_recorded():
    """Given or not it is the same run, in the same folder: also one that was begun before these flags existed."""
    off = parse("--schedule", "steps", "--warmup-epochs", 0, "--label-smoothing", 0)
    assert off.run_path == parse().run_path and not recipes.OFF.keys() & off.record().keys()
    on = parse("--schedule", "cosine", "--warmup-epochs", 5, "--label-smoothing", 0.1).record()
    assert {key: on[key] for key in recipes.OFF} == {"schedule": "cosine", "warmup_epochs": 5, "label_smoothing": 0.1}
    assert on["milestones"] == []


# ----------------------------------------------------------------------------------------- precedence
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_flags_take_precedence_over_the_recipe(recipe):
    command = f"--recipe {recipe} --epochs 3 --learning-rate 0.3 --momentum 0.5 --weight-decay 0 --milestones 1 2"
    config = parse(*command.split(), "--learning-rate-decay", 0.5, "--no-nesterov", "--augment", "none")
    assert rates(config) == pytest.approx([0.3, 0.15, 0.075])
    assert (*optimiser(config), config.augment, config.milestones) == (0.5, False, 0.0, "none", [1, 2])
    given = "learning_rate momentum weight_decay milestones learning_rate_decay nesterov augment epochs recipe".split()
    assert {config.origins[key] for key in given} == {"command line"}


def test_settings_not_given_are_recorded_as_the_recipes():
    config = parse("--student", "resnet8")
    derived = "learning_rate momentum weight_decay milestones learning_rate_decay nesterov augment epochs batch_size"
    assert {config.origins[key] for key in derived.split()} == {"recipe paper"}
    assert config.record().keys() >= set(derived.split()) and (config.epochs, config.batch_size) == (160, 128)


def test_digits_are_never_mirrored_by_a_recipe():
    config = parse("--student", "resnet8", "--dataset", "digits")
    assert (config.augment, config.origins["augment"]) == ("none", "data set digits")


# ---------------------------------------------------------------------- the released code, done again
def released_losses(student, teacher, epochs_of_batches, rates, mean, std, temperature=5, weight=0.6):
    """The released train.py's steps: a loop of its own that shares no code with ours but the networks' layers."""
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


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # the bug that is reproduced here
@pytest.mark.parametrize("teacher_cache", [None, "live", "full"])
def test_losses_are_the_released_codes(teacher_cache, teacher_file):
    """From the same initial weights and on the same batches, to 1e-5, a decay of the rate included.

    Four steps: from then on float32's rounding grows beyond 1e-5 between any two programs.
    """
    command = "--student resnet8 --dataset digits --recipe released-code --epochs 2 --precision fp32".split()
    if teacher_cache:
        command += ["--teacher", "plane2", "--teacher-checkpoint", teacher_file, "--temperature", 5, "--lambda", 0.6]
        command += ["--teacher-cache", teacher_cache]
    config = parse(*command)
    splits, cpu = data_loader.load(config, lambda line: None), train.cpu_annex(config)
    short = splits.train.subset(torch.arange(128 + 40), "digits/part")
    splits = splits._replace(train=short)
    teacher = train.load_teacher(config, splits, "fp32", cpu, lambda line: None) if teacher_cache else None
    step = train.assemble(config, short, teacher, "fp32", cpu)
    theirs = model_factory.create("resnet8", 10)
    theirs.load_state_dict(step.student.state_dict())
    if teacher:
        train.attach_tables(config, teacher, short, lambda line: None)
        assert (teacher.table is None) == (teacher_cache == "live")
    ours, epochs_of_batches, expected_rates = [], [], [0.01, 0.001]
    assert rates(config) == pytest.approx(expected_rates)
    for epoch, rate in enumerate(rates(config)):
        for group in step.optimizer.param_groups:
            group["lr"] = rate
        step.student.train()
        plan, pairs = epoch_plan(short, config.augment, 1, epoch), []
        for part in World().parts(len(short), config.batch_size):
            batch = Batch(short, config.augment, plan.order[part.rows], plan.views[part.rows])
            pairs.append((batch.images, batch.labels))
            ours.append(float(step(batch, part)[1][0]))
        epochs_of_batches.append(pairs)
    network = model_factory.load(teacher_file, "plane2")[0].eval() if teacher else None
    mean, std, _ = short.transform
    expected = released_losses(theirs, network, epochs_of_batches, expected_rates, mean, std)
    assert len(ours) == len(expected) == 4
    assert ours == pytest.approx(expected, abs=1e-5)
