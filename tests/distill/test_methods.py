"""Methods: their arithmetic computed again in numpy's float64, gradients, trainings, options, and the user's own."""

import inspect
import os
import re
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, last_weights, read_json, read_lines, same_weights, softmax
from torch.nn import functional as F

import data_loader
import model_factory
import train
from takd.config import methods as tables
from takd.config import run_config
from takd.distill import losses, methods
from takd.distill.methods import Features
from takd.distill.teacher import Teacher
from takd.errors import UserError
from takd.files import digest
from takd.images.split import Batch, epoch_plan
from takd.run import checkpoint, engine

B, C, N = 6, 10, 40
NAMES = list(tables.METHODS)
FEW = {"crd": {"negatives": 64}}  # options that keep a test quick


def options_of(name, **others):
    """The method's options: its table's defaults, what keeps a test quick, and others."""
    return {key: option.default for key, option in tables.METHODS[name].options.items()} | FEW.get(name, {}) | others


# --------------------------------------------------------------------------- the formulas again, by hand
def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def soft_kl(s, t, temperature):
    rows = zip(softmax(t / temperature), softmax(s / temperature), strict=True)
    return temperature**2 * np.mean([kl(p, q) for p, q in rows])


def pooled_to(stage, size):
    """(B, channels, h, w) averaged over blocks down to size x size."""
    images, channels, height, width = stage.shape
    return stage.reshape(images, channels, size, height // size, size, width // size).mean(axis=(3, 5))


def same_size(s, t):
    size = min(s.shape[-1], t.shape[-1])
    return pooled_to(s, size), pooled_to(t, size)


def unit(vector):
    return vector / np.linalg.norm(vector)


def attention(s, t):
    result = 0
    for pair in list(zip(s.stages[::-1], t.stages[::-1], strict=False))[:3]:
        maps = [[unit((image**2).mean(axis=0).ravel()) for image in stage] for stage in same_size(*pair)]
        result += np.mean((np.array(maps[0]) - np.array(maps[1])) ** 2)
    return result


def flow(first, second):
    """(channels, channels) for each image: the mean over places of their products."""
    pairs = zip(*same_size(first, second), strict=True)
    return np.array([[[(a * b).mean() for b in others] for a in maps] for maps, others in pairs])


def fsp(s, t):
    pairs = [[flow(x.stages[i], x.stages[i + 1]) for i in range(3)] for x in (s, t)]
    return sum(np.mean((ours - theirs) ** 2) for ours, theirs in zip(*pairs, strict=True)) / 3


def similarity(s, t):
    grams = []
    for stage in (s.stages[-1], t.stages[-1]):
        gram = np.array([[(a * b).sum() for b in stage] for a in stage])
        grams.append(np.array([unit(row) for row in gram]))
    return ((grams[0] - grams[1]) ** 2).sum() / B**2


def huber(a, b):
    gap = np.abs(a - b)
    return np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()


def distances(vectors):
    table = np.array([[np.linalg.norm(a - b) for b in vectors] for a in vectors])
    return table / table[table > 0].mean()


def angles(vectors):
    table = np.zeros((B, B, B))
    for i, j, k in np.ndindex(B, B, B):
        if i not in (j, k):
            table[i, j, k] = unit(vectors[j] - vectors[i]) @ unit(vectors[k] - vectors[i])
    return table


def probabilities(vectors):
    table = np.array([[(1 + unit(a) @ unit(b)) / 2 for b in vectors] for a in vectors])
    return table / table.sum(axis=1, keepdims=True)


def pkt(s, t):
    p, q = probabilities(t.pooled), probabilities(s.pooled)
    return np.mean(p * np.log((p + 1e-7) / (q + 1e-7)))


def decoupled(s, t, labels, temperature):
    """(the label's class against the others, the others among themselves)."""
    p, q = softmax(t / temperature), softmax(s / temperature)
    target, others = [], []
    for i, label in enumerate(labels):
        target.append(kl((p[i, label], 1 - p[i, label]), (q[i, label], 1 - q[i, label])))
        rest = [c for c in range(C) if c != label]
        others.append(kl(p[i, rest] / (1 - p[i, label]), q[i, rest] / (1 - q[i, label])))
    return temperature**2 * np.mean(target), temperature**2 * np.mean(others)


def z_scores(logits):
    return np.array([(row - row.mean()) / np.sqrt(((row - row.mean()) ** 2).sum() / (len(row) - 1)) for row in logits])


def hint(s, t, method):
    """MSE of the teacher's stage and FitNet's regressor: 1x1 convolution, batch norm at weight 1 and bias 0, ReLU."""
    conv = method.regressor[0]
    weight, bias = (value.detach().double().numpy() for value in (conv.weight[:, :, 0, 0], conv.bias))
    out = np.einsum("oc,bchw->bohw", weight, s.stages[-2]) + bias[:, None, None]
    mean, variance = out.mean(axis=(0, 2, 3), keepdims=True), out.var(axis=(0, 2, 3), keepdims=True)
    regressed = np.maximum((out - mean) / np.sqrt(variance + 1e-5), 0)
    return np.mean(np.subtract(*same_size(regressed, t.stages[-2])) ** 2)


# fmt: off
BY_HAND = {  # name: (options, weight of the labels, {part: (weight, value)}); dkd in the third epoch of a warm-up of 4
    "base": ({}, 1, lambda s, t, y, m: {}),
    "kd": ({"temperature": 3.0, "lambda": 0.3}, 0.7, lambda s, t, y, m: {"kd": (0.3, soft_kl(s.logits, t.logits, 3))}),
    "logit": ({"weight": 2.0, "ce_weight": 0.5}, 0.5, lambda s, t, y, m: {
        "logit": (2, np.mean((s.logits - t.logits) ** 2)),
    }),
    "st": ({"alpha": 0.7}, 1, lambda s, t, y, m: {"st": (0.7, soft_kl(s.logits, t.logits, 4))}),
    "at": ({}, 1, lambda s, t, y, m: {"at": (1000, attention(s, t))}),
    "at_st": ({}, 1, lambda s, t, y, m: {"at": (1000, attention(s, t)), "st": (0.9, soft_kl(s.logits, t.logits, 4))}),
    "fsp": ({"beta": 5.0}, 1, lambda s, t, y, m: {"fsp": (5, fsp(s, t))}),
    "fitnet": ({}, 1, lambda s, t, y, m: {"fitnet": (100, hint(s, t, m))}),
    "sp": ({}, 1, lambda s, t, y, m: {"sp": (3000, similarity(s, t))}),
    "rkd": ({"beta": 2.0}, 1, lambda s, t, y, m: {
        "distance": (50, huber(distances(s.pooled), distances(t.pooled))),
        "angle": (100, huber(angles(s.pooled), angles(t.pooled))),
    }),
    "pkt": ({}, 1, lambda s, t, y, m: {"pkt": (3e4, pkt(s, t))}),
    "dkd": ({"warmup": 4, "alpha": 3.0}, 1, lambda s, t, y, m: {
        "target": (0.75 * 3, decoupled(s.logits, t.logits, y, 4)[0]),
        "others": (0.75 * 2, decoupled(s.logits, t.logits, y, 4)[1]),
    }),
    "lskd": ({}, 0.1, lambda s, t, y, m: {"kd": (9, soft_kl(z_scores(s.logits), z_scores(t.logits), 2))}),
    "dgkd": ({"lambda": 0.3}, 0.7, lambda s, t, y, m: {"kd": (0.3, soft_kl(s.logits, t.logits, 4))}),
}
# fmt: on
SHAPES = ((4, 8), (4, 8), (6, 4), (8, 2))  # channels, height and width, as a small ResNet's


def arrays(seed, shapes=SHAPES, pooled=8):
    """A network's possible output, as float64 arrays; stages are not negative, as after a ReLU."""
    random = np.random.default_rng(seed)
    stages = [np.maximum(random.normal(0.3, 1, (B, channels, size, size)), 0) for channels, size in shapes]
    return Features(tuple(stages), random.normal(0, 1, (B, pooled)), random.normal(0, 3, (B, C)))


def tensors(arrays, dtype=torch.float32):
    pooled, logits = (torch.tensor(each, dtype=dtype) for each in arrays[1:])
    return Features(tuple(torch.tensor(stage, dtype=dtype) for stage in arrays.stages), pooled, logits)


def rows(features, chosen):
    return Features(tuple(stage[chosen] for stage in features.stages), features.pooled[chosen], features.logits[chosen])


LABELS = np.arange(B) % 4
TRAINING_LABELS = torch.arange(N) % 4


def built(name, student=None, teacher=None, **options):
    """The method for two networks with these Features."""
    student, teacher = student or tensors(arrays(1)), teacher or tensors(arrays(2))
    torch.manual_seed(0)
    two = slice(2)
    return methods.build(name, options_of(name, **options), rows(student, two), rows(teacher, two), TRAINING_LABELS)


def called(method, student, teacher, chosen=slice(None)):
    extra = {"index": torch.arange(B)[chosen]} if getattr(method, "needs_index", False) else {}
    return method(student, teacher, torch.tensor(LABELS)[chosen], **extra)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("shapes", ["the same shapes", "other shapes"])
def test_a_method_equals_its_formula(name, shapes):
    options, ce_weight, by_hand = BY_HAND[name]
    s, t = arrays(1), arrays(2)
    if shapes == "other shapes" and name != "fsp":
        t = arrays(2, ((5, 16), (7, 8), (9, 4)), pooled=12)
    method = built(name, tensors(s), tensors(t), **options)
    method.epoch = 2
    parts = called(method, tensors(s), tensors(t))
    ce = -np.log(softmax(s.logits)[np.arange(B), LABELS]).mean()
    expected = by_hand(s, t, LABELS, method)
    for part, (_, value) in expected.items():
        assert float(parts[part].detach()) == pytest.approx(value, rel=2e-5), part
    loss = ce_weight * ce + sum(weight * value for weight, value in expected.values())
    assert float(parts["loss"].detach()) == pytest.approx(loss, rel=2e-5)
    assert set(parts) == {"loss", *expected} | ({"ce"} if name != "base" else set())


def test_every_method_is_tested():
    assert list(methods.METHODS) == NAMES and set(NAMES) == {*BY_HAND, "crd"}


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_smoothed_in_cross_entropy_as_pytorch_does(name):
    s, t, parts = tensors(arrays(1)), tensors(arrays(2)), []
    options, ce_weight, _ = BY_HAND.get(name, ({}, 1.0, None))
    for smoothing in (0.0, 0.3):
        method = built(name, **options)
        method.label_smoothing = smoothing
        torch.manual_seed(0)
        parts.append(called(method, s, t))
    ces = [torch.nn.CrossEntropyLoss(label_smoothing=e)(s.logits, torch.tensor(LABELS)) for e in (0.0, 0.3)]
    before, after = ({key: float(value.detach()) for key, value in each.items()} for each in parts)
    assert after["loss"] - before["loss"] == pytest.approx(ce_weight * float(ces[1] - ces[0]), rel=1e-3)
    others = before.keys() - {"loss", "ce"}
    assert {key: after[key] for key in others} == {key: before[key] for key in others}


def test_crd_equals_its_formula(monkeypatch):
    """Two steps: Z is set by the first, and the banks move towards the embeddings of the batch."""
    s, t = arrays(1), arrays(2, pooled=12)
    method = built("crd", tensors(s), tensors(t), dimensions=5, negatives=7, tau=0.2, momentum=0.3)
    others = torch.randint(N, (B, 7), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(method, "others", lambda labels: others)
    scales = [None, None]
    for _ in range(2):
        banks = method.banks.double().numpy()
        parts = called(method, tensors(s), tensors(t))
        expected, vectors = 0, []
        for i, (embed, pooled) in enumerate(zip(method.embed, (s.pooled, t.pooled), strict=True)):
            weight, bias = embed.weight.detach().double().numpy(), embed.bias.detach().double().numpy()
            vectors.append(np.array([unit(weight @ row + bias) for row in pooled]))
            bank = banks[1 - i]
            chosen = [(b, *others[b].tolist()) for b in range(B)]
            e = np.array([[np.exp(vectors[i][b] @ bank[j] / 0.2) for j in chosen[b]] for b in range(B)])
            scales[i] = scales[i] or e.mean() * N
            h = e / scales[i] / (e / scales[i] + 7 / N)
            expected += -(np.log(h[:, 0]).sum() + np.log(1 - h[:, 1:]).sum()) / B
        assert float(parts["crd"].detach()) == pytest.approx(expected, rel=1e-5)
        for i in range(2):
            moved = [unit(0.3 * banks[i][b] + 0.7 * vectors[i][b]) for b in range(B)]
            np.testing.assert_allclose(method.banks[i, :B].numpy(), moved, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(method.banks[i, B:].numpy(), banks[i, B:].astype(np.float32))


def test_rkd_of_coinciding_vectors_has_a_finite_gradient():
    """A student whose outputs are all the same, and one with every image twice."""
    teacher = torch.randn(B, 8, generator=torch.Generator().manual_seed(0))
    for vectors in (torch.ones(B, 8), torch.cat([teacher[:3], teacher[:3]])):
        pairs = zip(losses.relations(vectors.requires_grad_()), losses.relations(teacher), strict=True)
        sum(F.mse_loss(*pair) for pair in pairs).backward()
        assert vectors.grad.isfinite().all() and float(vectors.grad.abs().max()) < 100


def test_crd_draws_all_images_of_other_classes_and_no_others():
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    for label, row in zip(labels, built("crd", negatives=500).others(labels), strict=True):
        assert set(row.tolist()) == {i for i in range(N) if TRAINING_LABELS[i] != label}


def test_lskd_is_invariant_to_shift_and_scale():
    student, teacher = tensors(arrays(1)), tensors(arrays(2))
    parts = called(built("lskd"), student._replace(logits=7 * student.logits + 3), teacher)
    assert float(parts["kd"]) == pytest.approx(float(called(built("lskd"), student, teacher)["kd"]), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_equal_networks_have_a_distillation_loss_of_zero(name):
    """Except CRD with its random banks and FitNet with its random regressor."""
    both = tensors(arrays(1))
    for part, value in called(built(name, both, both), both, both).items():
        assert part in ("loss", "ce", "crd", "fitnet") or float(value) == pytest.approx(0, abs=1e-6), part


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chosen", [slice(None), slice(1)], ids=["a batch", "one image"])
def test_losses_of_bf16_features_are_float32_and_finite(name, chosen):
    """Also for an epoch's last batch of one image."""
    both = tensors(arrays(1), torch.bfloat16), tensors(arrays(2), torch.bfloat16)
    method = built(name, *both)
    student, teacher = (rows(each, chosen) for each in both)
    for each in (*student.stages, student.pooled, student.logits):
        each.requires_grad_()
    parts = called(method, student, teacher, chosen)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in parts.values())
    parts["loss"].backward()
    learned = (*student.stages, student.pooled, student.logits, *method.parameters())
    assert all(value.grad is None or value.grad.isfinite().all() for value in learned)


# --------------------------------------------------------------------------------- students and teachers
@pytest.fixture(scope="module")
def digits():
    return data_loader.read("digits").train


class Pair:
    """Two fresh networks, the teacher's output for a batch, and methods built for the two."""

    def __init__(self, student_name, teacher_name, digits):
        torch.manual_seed(1)
        self.labels = digits.labels
        self.student, self.network = (model_factory.create(each, 10) for each in (student_name, teacher_name))
        self.teacher = Teacher(self.network, digits.transform, digits, "fp32", needs_features=True)
        plan = epoch_plan(digits, "none", seed=1, epoch=0)
        self.batch = Batch(digits, "none", plan.order[:24], plan.views[:24])
        self.images = digits.transform(self.batch.images)
        self.output = self.teacher(self.batch, self.images.clone().requires_grad_())

    def parts(self, name):
        """(method, its parts for a forward pass of the student)."""
        two = slice(2)
        student = self.student.train().forward_features(self.images)
        method = methods.build(name, options_of(name), rows(student, two), rows(self.output, two), self.labels)
        extra = {"index": self.batch.index} if getattr(method, "needs_index", False) else {}
        return method, method(student, self.output, self.batch.labels, **extra)


@pytest.fixture(scope="module")
def pair(digits):
    return Pair("plane2", "plane2", digits)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_reaches_the_student_and_never_the_teacher(name, pair):
    """Of the distillation terms alone; the teacher is made of a network, and run on images, that require gradients."""
    before = digest(pair.teacher.network.state_dict())
    assert all(parameter.requires_grad for parameter in pair.network.parameters())
    assert not any(value.requires_grad for value in (*pair.output.stages, pair.output.pooled, pair.output.logits))
    method, parts = pair.parts(name)
    terms = [value for part, value in parts.items() if part not in ("loss", "ce")] or [parts["loss"]]
    pair.student.zero_grad()
    sum(terms).backward()
    assert float(pair.student.conv_layers[0].weight.grad.abs().sum()) > 0
    assert all(parameter.grad is not None for parameter in method.parameters())
    for parameter in (*pair.teacher.network.parameters(), *pair.teacher.exact.parameters()):
        assert not parameter.requires_grad and parameter.grad is None
    assert all(parameter.grad is None for parameter in pair.network.parameters())
    assert digest(pair.teacher.network.state_dict()) == before


PAIRS = [("plane2", "plane10"), ("resnet8", "plane4"), ("plane8", "resnet8"), ("resnet8", "resnet14")]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_networks_of_other_shapes_adapt_or_are_refused(student, teacher, digits):
    pair = Pair(student, teacher, digits)
    for name in NAMES:
        if name == "fsp" and (student, teacher) != ("resnet8", "resnet14"):
            with pytest.raises(UserError, match="every other method works for these two"):
                pair.parts(name)
        else:
            assert pair.parts(name)[1]["loss"].isfinite(), name


@pytest.mark.parametrize("name", NAMES)
def test_a_network_without_square_maps(name, pair):
    """As a transformer is: methods that compare stages refuse it in one line, the others take it."""
    with torch.no_grad():
        maps = rows(pair.student.eval().forward_features(pair.images), slice(2))
    tokens = maps._replace(stages=())
    for student, teacher, whose in ((tokens, maps, "student"), (maps, tokens, "teacher")):
        if name in ("at", "at_st", "fsp", "fitnet", "sp"):
            with pytest.raises(UserError, match=f"--method {name}: it compares square feature maps, and the {whose} "):
                methods.build(name, options_of(name), student, teacher, pair.labels)
        else:
            methods.build(name, options_of(name), student, teacher, pair.labels)


def test_a_pair_is_refused_before_its_teacher_is_trained(tmp_path, call, tiny):
    command = (*tiny, "--teacher", "plane4", "--student", "resnet8", "--method", "fsp", "--run-dir", tmp_path / "run")
    refused = call(train, *command)
    assert refused.status == 2 and "--method fsp: it compares" in refused.err and refused.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- trainings
@pytest.fixture
def distil(call, tiny, teacher_file):
    def run(folder, name, *flags):
        command = (*tiny, "--teacher", "plane2", "--teacher-checkpoint", teacher_file, "--method", name)
        return call(train, *command, *flags, "--run-dir", folder)

    return run


def option_flags(name):
    return ("--method-option", *(f"{key}={value}" for key, value in FEW[name].items())) if name in FEW else ()


@pytest.mark.parametrize("name", NAMES)
def test_a_student_learns(name, tmp_path, distil):
    """Digits at one epoch: guessing reaches 10 %, the commonest class and four deviations 17 %."""
    outcome = distil(tmp_path / "run", name, "--batch-size", "64", *option_flags(name))
    assert outcome.status == 0, outcome.err
    config, summary = read_json(tmp_path / "run/config.json"), read_json(tmp_path / "run/summary.json")
    assert summary["best"]["test_accuracy_percent"] > 60
    assert summary["method"] == config["method"] == name
    assert summary["method_options"] == config["method_options"] == options_of(name)
    best = checkpoint.read(tmp_path / "run/plane2_seed1_best.pth.tar")["model_state_dict"]
    assert best.keys() == model_factory.create("plane2", 10).state_dict().keys()
    kept = checkpoint.read(tmp_path / "run/last.pth.tar")["method_state_dict"]
    assert bool(kept) == (name in ("fitnet", "crd"))


@pytest.mark.parametrize("name", ["crd", pytest.param("fitnet", marks=pytest.mark.slow)])
def test_a_methods_parameters_and_buffers_continue_bit_for_bit(name, tmp_path, distil, monkeypatch):
    """Stopped inside the second epoch: weights, method and optimizer state end as in an uninterrupted run."""
    flags = ("--epochs", "2", "--batch-size", "64", *option_flags(name))
    assert distil(tmp_path / "whole", name, *flags).status == 0
    step, calls = engine.TrainStep.__call__, []

    def stopping(*given):
        calls.append(given)
        if len(calls) == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(engine.TrainStep, "__call__", stopping)
        assert distil(tmp_path / "run", name, *flags).status == 128 + signal.SIGTERM
    stopped = checkpoint.read(tmp_path / "run/last.pth.tar")
    assert stopped["epoch"] == 1 and 0 < stopped["step"] < 23
    outcome = distil(tmp_path / "run", name, *flags)
    assert outcome.status == 0 and "continuing at epoch 2" in outcome.out
    continued, whole = (checkpoint.read(tmp_path / each / "last.pth.tar") for each in ("run", "whole"))
    for key in ("model_state_dict", "method_state_dict"):
        assert same_weights(continued[key], whole[key])
    momenta, expected = (each["optimizer_state_dict"]["state"] for each in (continued, whole))
    assert momenta.keys() == expected.keys()
    assert all(same_weights(momenta[i], expected[i]) for i in expected)


def test_base_is_training_without_a_teacher(tmp_path, call, tiny, distil):
    """With a teacher it is the same network, bit for bit, as without."""
    assert call(train, *tiny, "--method", "base", "--run-dir", tmp_path / "alone").status == 0
    assert "method" not in read_json(tmp_path / "alone/config.json")
    outcome = distil(tmp_path / "run", "base")
    assert "the teacher is unused" in outcome.out and "logits  " not in outcome.out
    assert same_weights(last_weights(tmp_path / "run"), last_weights(tmp_path / "alone"))


def test_logit_without_labels(tmp_path, distil):
    """With ce_weight 0 the student learns the teacher's mistakes too."""
    assert distil(tmp_path / "run", "logit", "--method-option", "ce_weight=0", "weight=1").status == 0
    record = read_lines(tmp_path / "run/metrics.jsonl")[0]
    assert record["train_loss"] == pytest.approx(record["train_logit"], rel=1e-6)


def test_warmup_grows_with_the_epochs(tmp_path, distil):
    assert distil(tmp_path / "run", "dkd", "--epochs", "2", "--method-option", "warmup=2").status == 0
    for record, w in zip(read_lines(tmp_path / "run/metrics.jsonl"), (0.5, 1), strict=True):
        terms = record["train_target"] + 2 * record["train_others"]
        assert record["train_loss"] == pytest.approx(record["train_ce"] + w * terms, rel=1e-5)


# ---------------------------------------------------------------------------------------------- options
def test_help_lists_every_method_and_option(run_command):
    """Those of the classes' constructors, with the defaults of runs, each with a meaning."""
    out = run_command("train.py", "--help-methods").out
    for name, method_class in methods.METHODS.items():
        block = re.search(rf"^{name} +(.+)\n((?: .+\n)*)", out, re.MULTILINE)
        assert block[1] == f"{tables.METHODS[name].formula}: {tables.METHODS[name].source}"
        listed = {line.split()[0]: line.split() for line in block[2].splitlines()}
        parameters = inspect.signature(method_class).parameters.values()
        keywords = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        assert [key.rstrip("_") for key in keywords] == list(listed)
        defaults = {key: option.default for key, option in tables.METHODS[name].options.items()}
        assert {key: line[1] for key, line in listed.items()} == {key: str(value) for key, value in defaults.items()}
        assert all(len(line) > 2 for line in listed.values())


def test_equations_papers_and_years_are_named():
    for name, method_class in methods.METHODS.items():
        assert method_class.__doc__.startswith("L = "), name
        for text in (" ".join(method_class.__doc__.split()), tables.METHODS[name].source):
            assert re.search(r"[A-Z]\w+.* (19|20)\d\d", text) or name in ("base", "at_st"), name


def parsed(*argv):
    return run_config.parse([*map(str, argv), "--student", "plane2", "--dataset", "digits", "--cuda", "0"])


def test_options_are_given_by_their_own_flag_or_by_method_option():
    short = parsed("--teacher", "plane4", "--method", "st", "--temperature", 3)
    long = parsed("--teacher", "plane4", "--method", "st", "--method-option", "temperature=3")
    assert short.identity() == long.identity()
    assert short.record()["temperature"] == 3.0 and "lambda" not in short.record()
    assert short.method_options == {"temperature": 3.0, "alpha": 1.0}


def test_method_option_takes_several_and_is_repeated():
    words = ("--method-option", "tau=.1", "negatives=5", "--method-option", "momentum=0")
    record = parsed("--teacher", "plane4", "--method", "CRD", *words).record()
    assert record["method_options"] == {"beta": 0.8, "dimensions": 128, "negatives": 5, "tau": 0.1, "momentum": 0.0}
    assert "method_option" not in record and "temperature" not in record


def test_later_settings_leave_the_identity_of_earlier_runs():
    """A run of a version without these settings continues."""
    identity = parsed("--teacher", "plane4").identity()
    assert identity["method_options"] == {"temperature": 4.0, "lambda": 0.5, "reduction": "batchmean"}
    assert not identity.keys() & {"method_option", "repeat", "initialisation", "method_file"}


@pytest.mark.parametrize("name", ["sp", "rkd", "pkt", "crd"])
def test_a_loss_that_is_not_a_mean_over_images_is_refused_for_several_processes(name, monkeypatch, capsys):
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    for key, value in {**place, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(SystemExit):
        parsed("--teacher", "plane4", "--method", name)
    assert "which 2 processes do not share" in capsys.readouterr().err
    assert parsed("--teacher", "plane4", "--method", "fitnet")


# ------------------------------------------------------------------------------------------- the user's own
@pytest.fixture(scope="module")
def example():
    """The class in docs/adding_a_method.md."""
    text = (ROOT / "docs/adding_a_method.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.+?)```", text, re.DOTALL)[1]


def test_the_documented_example_trains(tmp_path, distil, example):
    """An edited file is another method: the run made with it does not continue."""
    file = tmp_path / "my_losses.py"
    file.write_text(example)
    outcome = distil(tmp_path / "run", f"{file}:Cosine", "--method-option", "beta=5")
    assert outcome.status == 0, outcome.err
    config, summary = read_json(tmp_path / "run/config.json"), read_json(tmp_path / "run/summary.json")
    assert config["method"] == f"{file}:Cosine" and config["method_options"] == {"beta": 5.0}
    record = read_lines(tmp_path / "run/metrics.jsonl")[0]
    assert record["train_loss"] == pytest.approx(record["train_ce"] + 5 * record["train_cosine"], rel=1e-5)
    assert summary["best"]["test_accuracy_percent"] > 60
    file.write_text(example.replace("beta=2.0", "beta=3.0"))
    again = distil(tmp_path / "run", f"{file}:Cosine", "--method-option", "beta=5")
    assert again.status == 2 and "method_file" in again.err


OWN = """
from torch import nn
from takd.config.methods import Option
class Own(nn.Module):
    '''Mine.'''

    options = {"size": Option(4, "of something", minimum=2)}

    def __init__(self, student, *, size, sharp=False, kind="soft"):
        super().__init__()
        self.layer = nn.Linear(student.pooled.shape[1], size)
    def forward(self, student, teacher, labels):
        return {"loss": self.layer(student.pooled.float()).square().mean()}
"""
OWN_ERRORS = {
    "no such class": (OWN, "Onw", [], "did you mean Own?"),
    "not Python": ("class Own(:", "Own", [], "is not Python"),
    "an unknown option": (OWN, "Own", ["siez=3"], "did you mean size?"),
    "out of bounds": (OWN, "Own", ["size=1"], "at least 2"),
    "not a whole number": (OWN, "Own", ["size=2.5"], "whole number"),
    "neither yes nor no": (OWN, "Own", ["sharp=maybe"], "yes or no"),
    "no default": (OWN.replace("sharp=False", "sharp"), "Own", [], "needs a default"),
    "another argument": (OWN.replace("student, *", "network, *"), "Own", [], "requires network"),
    "an import that fails": ("import absent\n" + OWN, "Own", [], "No module named 'absent'"),
    "a constructor that fails": (OWN.replace(".shape[1]", ".shape[5]"), "Own", [], "line 11"),
    "a call that fails": (OWN.replace("self.layer(", "self.layre("), "Own", [], "layre"),
    "no dict": (OWN.replace('{"loss": self', "(self").replace("mean()}", "mean())"), "Own", [], "a dict with 'loss'"),
    "no scalar": (OWN.replace(".mean()}", "}"), "Own", [], "'loss' must be a scalar tensor"),
}


@pytest.mark.parametrize("case", OWN_ERRORS)
def test_an_error_in_the_users_method_is_one_line_and_nothing_is_written(case, tmp_path, distil):
    source, class_name, options, message = OWN_ERRORS[case]
    (tmp_path / "own.py").write_text(source)
    flags = ("--method-option", *options) if options else ()
    outcome = distil(tmp_path / "run", f"{tmp_path / 'own.py'}:{class_name}", *flags)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and message in outcome.err, outcome.err
    assert not (tmp_path / "run").exists()


def test_an_error_in_the_users_method_while_it_trains_is_one_line(tmp_path, distil):
    """In the epoch's last batch, the only one of another size."""
    failing = "        assert len(labels) in (2, 512), 'odd batch'\n        return"
    (tmp_path / "own.py").write_text(OWN.replace("        return", failing))
    outcome = distil(tmp_path / "run", f"{tmp_path / 'own.py'}:Own", "--batch-size", "512")
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert "odd batch (AssertionError, own.py line 13)" in outcome.err


def test_the_users_method_may_have_parameters_and_options_of_every_type(tmp_path, distil):
    (tmp_path / "own.py").write_text(OWN)
    options = ("--method-option", "size=3", "sharp=yes", "kind=hard")
    outcome = distil(tmp_path / "run", f"{tmp_path / 'own.py'}:Own", *options)
    assert outcome.status == 0, outcome.err
    config, last = read_json(tmp_path / "run/config.json"), checkpoint.read(tmp_path / "run/last.pth.tar")
    assert config["method_options"] == {"size": 3, "sharp": True, "kind": "hard"}
    assert last["method_state_dict"]["layer.weight"].shape[0] == 3
