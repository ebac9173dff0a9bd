"""Every method: its arithmetic again in numpy's float64, its gradient, its networks, its training, its options, and a user's own."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data_loader
import model_factory
import train
from model_factory import Features
from takd.config import names
from takd.config import run_config as settings
from takd.config.names import UserError
from takd.distill import methods as losses
from takd.distill.teacher import Teacher
from takd.run import checkpoint
from takd.study import collect as results

ROOT = Path(train.__file__).resolve().parent
B, C, N = 6, 10, 40
FEW = {"crd": {"negatives": 64}}  # options that keep a test quick


# ------------------------------------------------------------------------------- the same again, by hand
def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def soft_kl(s, t, temperature):
    rows = zip(softmax(t / temperature), softmax(s / temperature), strict=True)
    return temperature**2 * np.mean([kl(p, q) for p, q in rows])


def shrunk(stage, size):
    """(B, channels, h, w) averaged over blocks down to size x size."""
    images, channels, height, width = stage.shape
    return stage.reshape(images, channels, size, height // size, size, width // size).mean(axis=(3, 5))


def smaller(s, t):
    size = min(s.shape[-1], t.shape[-1])
    return shrunk(s, size), shrunk(t, size)


def unit(vector):
    return vector / np.linalg.norm(vector)


def attention(s, t):
    result = 0
    for ours, theirs in list(zip(s["stages"][::-1], t["stages"][::-1], strict=False))[:3]:
        ours, theirs = smaller(ours, theirs)
        maps = [[unit((image**2).mean(axis=0).ravel()) for image in stage] for stage in (ours, theirs)]
        result += np.mean((np.array(maps[0]) - np.array(maps[1])) ** 2)
    return result


def flow(first, second):
    """(channels, channels) for each image: the mean over places of their products."""
    first, second = smaller(first, second)
    return np.array([
        [[(a[i] * b[j]).mean() for j in range(len(b))] for i in range(len(a))] for a, b in zip(first, second, strict=True)
    ])  # fmt: skip


def fsp(s, t):
    pairs = [[flow(x["stages"][i], x["stages"][i + 1]) for i in range(3)] for x in (s, t)]
    return sum(np.mean((ours - theirs) ** 2) for ours, theirs in zip(*pairs, strict=True)) / 3


def similarity(s, t):
    grams = []
    for stage in (s["stages"][-1], t["stages"][-1]):
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
    p, q = probabilities(t["pooled"]), probabilities(s["pooled"])
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


def regressed(stage, regressor):
    """FitNet's 1x1 convolution, batch norm of the batch at weight 1 and bias 0, and ReLU."""
    weight, bias = (value.detach().double().numpy() for value in (regressor[0].weight[:, :, 0, 0], regressor[0].bias))
    out = np.einsum("oc,bchw->bohw", weight, stage) + bias[:, None, None]
    mean, variance = out.mean(axis=(0, 2, 3), keepdims=True), out.var(axis=(0, 2, 3), keepdims=True)
    return np.maximum((out - mean) / np.sqrt(variance + 1e-5), 0)


# name: (options, {part: (weight, value by hand)}, weight of the labels)
BY_HAND = {
    "base": ({}, lambda s, t, y, m: {}, 1),
    "kd": ({"temperature": 3.0, "lambda": 0.3}, lambda s, t, y, m: {"kd": (0.3, soft_kl(s["logits"], t["logits"], 3))}, 0.7),
    "logit": (
        {"weight": 2.0, "ce_weight": 0.5},
        lambda s, t, y, m: {"logit": (2, np.mean((s["logits"] - t["logits"]) ** 2))},
        0.5,
    ),
    "st": ({"alpha": 0.7}, lambda s, t, y, m: {"st": (0.7, soft_kl(s["logits"], t["logits"], 4))}, 1),
    "at": ({}, lambda s, t, y, m: {"at": (1000, attention(s, t))}, 1),
    "at_st": ({}, lambda s, t, y, m: {"at": (1000, attention(s, t)), "st": (0.9, soft_kl(s["logits"], t["logits"], 4))}, 1),
    "fsp": ({"beta": 5.0}, lambda s, t, y, m: {"fsp": (5, fsp(s, t))}, 1),
    "fitnet": (
        {},
        lambda s, t, y, m: {
            "fitnet": (100, np.mean(np.subtract(*smaller(regressed(s["stages"][-2], m.regressor), t["stages"][-2])) ** 2))
        },
        1,
    ),
    "sp": ({}, lambda s, t, y, m: {"sp": (3000, similarity(s, t))}, 1),
    "rkd": (
        {"beta": 2.0},
        lambda s, t, y, m: {
            "distance": (50, huber(distances(s["pooled"]), distances(t["pooled"]))),
            "angle": (100, huber(angles(s["pooled"]), angles(t["pooled"]))),
        },
        1,
    ),
    "pkt": ({}, lambda s, t, y, m: {"pkt": (3e4, pkt(s, t))}, 1),
    "dkd": (
        {"warmup": 4, "alpha": 3.0},
        lambda s, t, y, m: {
            part: (0.75 * weight, value)  # in the third epoch
            for part, weight, value in zip(
                ("target", "others"), (3, 2), decoupled(s["logits"], t["logits"], y, 4), strict=True
            )
        },
        1,
    ),
    "lskd": ({}, lambda s, t, y, m: {"kd": (9, soft_kl(z_scores(s["logits"]), z_scores(t["logits"]), 2))}, 0.1),
}  # fmt: skip
SHAPES = ((4, 8), (4, 8), (6, 4), (8, 2))  # channels, height and width, as a small ResNet's


def drawn(seed, shapes=SHAPES, pooled=8):
    """What a network might answer, as float64 arrays; stages are not negative, as after a ReLU."""
    random = np.random.default_rng(seed)
    stages = [np.maximum(random.normal(0.3, 1, (B, channels, size, size)), 0) for channels, size in shapes]
    return {"stages": stages, "pooled": random.normal(0, 1, (B, pooled)), "logits": random.normal(0, 3, (B, C))}


def as_features(arrays, dtype=torch.float32):
    stages, pooled, logits = arrays["stages"], arrays["pooled"], arrays["logits"]
    return Features(
        tuple(torch.tensor(each, dtype=dtype) for each in stages), *(torch.tensor(each, dtype=dtype) for each in (pooled, logits))
    )


def first_two(features):
    return Features(tuple(stage[:2] for stage in features.stages), features.pooled[:2], features.logits[:2])


LABELS = np.arange(B) % 4
TRAINING_LABELS = torch.arange(N) % 4


def asked_of(name, features=None, options=None):
    """The method, built for two networks' Features."""
    student, teacher = features or (as_features(drawn(1)), as_features(drawn(2)))
    options = {key: option.default for key, option in names.methods()[name].options.items()} | (options or {})
    torch.manual_seed(0)
    return losses.build(name, options, first_two(student), first_two(teacher), TRAINING_LABELS)


def answer(method, student, teacher):
    extra = {"index": torch.arange(B)} if getattr(method, "needs_index", False) else {}
    return {part: value.detach() for part, value in method(student, teacher, torch.tensor(LABELS), **extra).items()}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("wider", [False, True], ids=["alike", "another shape"])
def test_a_method_is_its_formula(name, wider):
    options, by_hand, ce_weight = BY_HAND[name]
    s, t = drawn(1), drawn(2)
    if wider and name != "fsp":
        t = drawn(2, ((5, 16), (7, 8), (9, 4)), pooled=12)
    method = asked_of(name, (as_features(s), as_features(t)), options)
    method.epoch = 2
    parts = answer(method, as_features(s), as_features(t))
    ce = -np.log(softmax(s["logits"])[np.arange(B), LABELS]).mean()
    expected = by_hand(s, t, LABELS, method)
    for part, (_, value) in expected.items():
        assert float(parts[part]) == pytest.approx(value, rel=2e-5), part
    assert float(parts["loss"]) == pytest.approx(
        ce_weight * ce + sum(weight * value for weight, value in expected.values()), rel=2e-5
    )
    assert set(parts) == {"loss", *expected} | ({"ce"} if name != "base" else set())


def test_crd_is_its_formula(monkeypatch):
    """Two steps of it: Z is the first's, and the banks move towards what was seen."""
    s, t = drawn(1), drawn(2, pooled=12)
    method = asked_of("crd", (as_features(s), as_features(t)), {"dimensions": 5, "negatives": 7, "tau": 0.2, "momentum": 0.3})
    others = torch.randint(N, (B, 7), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(method, "others", lambda labels: others)
    scales = [None, None]
    for _ in range(2):
        banks = method.banks.double().numpy()
        parts = answer(method, as_features(s), as_features(t))
        expected, vectors = 0, []
        for i, (embed, pooled) in enumerate(zip(method.embed, (s["pooled"], t["pooled"]), strict=True)):
            weight, bias = embed.weight.detach().double().numpy(), embed.bias.detach().double().numpy()
            vectors.append(np.array([unit(weight @ row + bias) for row in pooled]))
            bank = banks[1 - i]
            e = np.array([
                [np.exp(vectors[i][b] @ bank[j] / 0.2) for j in (b, *others[b].tolist())] for b in range(B)
            ])  # fmt: skip
            scales[i] = scales[i] or e.mean() * N
            h = e / scales[i] / (e / scales[i] + 7 / N)
            expected += -(np.log(h[:, 0]).sum() + np.log(1 - h[:, 1:]).sum()) / B
        assert float(parts["crd"]) == pytest.approx(expected, rel=1e-5)
        for i in range(2):
            moved = [unit(0.3 * banks[i][b] + 0.7 * vectors[i][b]) for b in range(B)]
            np.testing.assert_allclose(method.banks[i, :B].numpy(), moved, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(method.banks[i, B:].numpy(), banks[i, B:].astype(np.float32))


def test_rkd_of_vectors_that_coincide_has_a_gradient():
    """A student whose answers are all the same, and one image twice: no infinity."""
    teacher = torch.randn(B, 8, generator=torch.Generator().manual_seed(0))
    for vectors in (torch.ones(B, 8), torch.cat([teacher[:3], teacher[:3]])):
        vectors.requires_grad_()
        sum(F.mse_loss(*pair) for pair in zip(losses.relations(vectors), losses.relations(teacher), strict=True)).backward()
        assert vectors.grad.isfinite().all() and float(vectors.grad.abs().max()) < 100


def test_crd_draws_images_of_other_classes_only_and_all_of_them():
    method = asked_of("crd", options={"negatives": 500})
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    drawn = method.others(labels)
    for label, row in zip(labels, drawn, strict=True):
        assert set(row.tolist()) == {i for i in range(N) if TRAINING_LABELS[i] != label}


def test_lskd_does_not_see_shift_and_scale():
    student, teacher = as_features(drawn(1)), as_features(drawn(2))
    parts = answer(asked_of("lskd"), student._replace(logits=7 * student.logits + 3), teacher)
    assert float(parts["kd"]) == pytest.approx(float(answer(asked_of("lskd"), student, teacher)["kd"]), rel=1e-4)


@pytest.mark.parametrize("name", losses.METHODS)
def test_equal_networks_leave_nothing_to_learn(name):
    """But for CRD, whose banks do not know yet, and FitNet, whose regressor does not."""
    features = as_features(drawn(1))
    parts = answer(asked_of(name, (features, features), FEW.get(name)), features, features)
    for part, value in parts.items():
        assert part in ("loss", "ce", "crd", "fitnet") or float(value) == pytest.approx(0, abs=1e-6), part


@pytest.mark.parametrize("name", losses.METHODS)
def test_losses_are_float32_and_finite_for_half_precision_and_for_one_image(name):
    """bf16 features, and a last batch of a single image."""
    student, teacher = as_features(drawn(1), torch.bfloat16), as_features(drawn(2), torch.bfloat16)
    method = asked_of(name, (student, teacher), FEW.get(name))
    for rows in (slice(None), slice(1)):
        ours, theirs = (Features(tuple(x[rows] for x in f.stages), f.pooled[rows], f.logits[rows]) for f in (student, teacher))
        for each in (*ours.stages, ours.pooled, ours.logits):
            each.requires_grad_(each.is_leaf)
        extra = {"index": torch.arange(B)[rows]} if name == "crd" else {}
        parts = method(ours, theirs, torch.tensor(LABELS)[rows], **extra)
        assert all(value.dtype == torch.float32 and value.isfinite() for value in parts.values())
        parts["loss"].backward(retain_graph=True)
        assert all(value.grad is None or value.grad.isfinite().all() for value in method.parameters())


# --------------------------------------------------------------------------------- students and teachers
@pytest.fixture(scope="module")
def digits():
    return data_loader.load("digits")[0]


class Lesson:
    """Two fresh networks, what the teacher answers to a batch, and methods built for the two."""

    def __init__(self, student_name, teacher_name, digits):
        torch.manual_seed(1)
        self.labels = digits.labels
        self.student, network = (model_factory.create_network(each, 10) for each in (student_name, teacher_name))
        self.teacher = Teacher(network, digits.mean, digits.std, digits, "cpu", "fp32", needs_features=True)
        self.batch = next(data_loader.train_batches(digits, 24, "none", seed=1, epoch=0))
        self.images = data_loader.normalise(self.batch.images, digits.mean, digits.std)
        self.answer = self.teacher(self.batch, self.images)

    def parts(self, name):
        """(method, what it makes of a forward pass of the student)."""
        shown = first_two(self.student.train().forward_features(self.images)), first_two(self.answer)
        options = {key: option.default for key, option in names.methods()[name].options.items()} | FEW.get(name, {})
        method = losses.build(name, options, *shown, self.labels)
        extra = {"index": self.batch.index} if getattr(method, "needs_index", False) else {}
        return method, method(self.student.forward_features(self.images), self.answer, self.batch.labels, **extra)


@pytest.fixture(scope="module")
def lesson(digits):
    return Lesson("plane2", "plane2", digits)


@pytest.mark.parametrize("name", losses.METHODS)
def test_the_gradient_reaches_the_student_and_never_the_teacher(name, lesson):
    """That of what is learned from the teacher: the labels' part is left out."""
    before = checkpoint.digest(lesson.teacher.network.state_dict())
    method, parts = lesson.parts(name)
    learned = [value for part, value in parts.items() if part not in ("loss", "ce")] or [parts["loss"]]
    lesson.student.zero_grad()
    sum(learned).backward()
    assert float(lesson.student.conv_layers[0].weight.grad.abs().sum()) > 0
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert not any(value.requires_grad for value in (*lesson.answer.stages, lesson.answer.pooled, lesson.answer.logits))
    assert all(not value.requires_grad and value.grad is None for value in lesson.teacher.network.parameters())
    assert checkpoint.digest(lesson.teacher.network.state_dict()) == before


PAIRS = [("plane2", "plane10"), ("resnet8", "plane4"), ("plane8", "resnet8"), ("resnet8", "resnet14")]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_networks_of_other_shapes_adapt_or_are_refused(student, teacher, digits):
    lesson = Lesson(student, teacher, digits)
    for name in losses.METHODS:
        if name == "fsp" and (student, teacher) != ("resnet8", "resnet14"):
            with pytest.raises(UserError, match="every other method works for these two"):
                lesson.parts(name)
        else:
            assert lesson.parts(name)[1]["loss"].isfinite(), name


def test_a_pair_is_refused_before_a_teacher_is_trained_for_it(tmp_path, call, tiny):
    refused = call(train, *tiny, "--teacher", "plane4", "--student", "resnet8", "--method", "fsp", "--run-dir", tmp_path / "run")
    assert refused.status == 2 and "--method fsp: it compares" in refused.err and refused.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- trainings
def read(file):
    return json.loads(Path(file).read_text(encoding="utf-8"))


@pytest.fixture
def distil(call, tiny, teacher_file):
    def run(folder, name, *flags):
        command = (*tiny, "--teacher", "plane2", "--teacher-checkpoint", teacher_file, "--method", name)
        return call(train, *command, *flags, "--run-dir", folder)

    return run


def options_of(name):
    return ("--method-option", *(f"{key}={value}" for key, value in FEW[name].items())) if name in FEW else ()


@pytest.mark.parametrize("name", losses.METHODS)
def test_a_student_learns(name, tmp_path, distil):
    """Digits at one epoch: guessing reaches 10 %, the commonest class and four deviations 17 %."""
    outcome = distil(tmp_path / "run", name, "--batch-size", "64", *options_of(name))
    assert outcome.status == 0, outcome.err
    config, summary = read(tmp_path / "run/config.json"), read(tmp_path / "run/summary.json")
    assert summary["best"]["test_accuracy_percent"] > 60
    assert summary["method"] == config["method"] == name
    expected = {key: option.default for key, option in names.methods()[name].options.items()} | FEW.get(name, {})
    assert summary["method_options"] == config["method_options"] == expected
    weights = checkpoint.read(tmp_path / "run/plane2_seed1_best.pth.tar")["model_state_dict"]
    assert weights.keys() == model_factory.create_network("plane2", 10).state_dict().keys()
    kept = checkpoint.read(tmp_path / "run/last.pth.tar")["method_state_dict"]
    assert bool(kept) == (name in ("fitnet", "crd"))


@pytest.mark.parametrize("name", ["crd", pytest.param("fitnet", marks=pytest.mark.slow)])
def test_parameters_and_banks_continue_bit_for_bit(name, tmp_path, distil, monkeypatch):
    """Stopped inside the second epoch; weights, the method's state, its optimizer's and the records end the same."""
    flags = ("--epochs", "2", "--batch-size", "64", *options_of(name))
    assert distil(tmp_path / "whole", name, *flags).status == 0
    normalise, calls = data_loader.normalise, []

    def stopping(*given):
        calls.append(given)
        if len(calls) == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        return normalise(*given)

    with monkeypatch.context() as patch:
        patch.setattr(data_loader, "normalise", stopping)
        assert distil(tmp_path / "run", name, *flags).status == 128 + signal.SIGTERM
    stopped = checkpoint.read(tmp_path / "run/last.pth.tar")
    assert stopped["epoch"] == 1 and 0 < stopped["step"] < 23
    outcome = distil(tmp_path / "run", name, *flags)
    assert outcome.status == 0 and "continuing at epoch 1" in outcome.out
    ends = [checkpoint.read(tmp_path / each / "last.pth.tar") for each in ("run", "whole")]
    for key in ("model_state_dict", "method_state_dict"):
        assert checkpoint.digest(ends[0][key]) == checkpoint.digest(ends[1][key])
    momenta = [end["optimizer_state_dict"]["state"] for end in ends]
    assert momenta[0].keys() == momenta[1].keys()
    assert all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0])


def test_base_needs_no_teacher_and_hears_none(tmp_path, call, tiny, distil):
    """With a teacher it is the same network, bit for bit, as without."""
    assert call(train, *tiny, "--method", "base", "--run-dir", tmp_path / "alone").status == 0
    assert "method" not in read(tmp_path / "alone/config.json")
    outcome = distil(tmp_path / "run", "base")
    assert "the teacher is not heard" in outcome.out and "logits  " not in outcome.out
    weights = [checkpoint.read(tmp_path / run / "last.pth.tar")["model_state_dict"] for run in ("alone", "run")]
    assert checkpoint.digest(weights[0]) == checkpoint.digest(weights[1])


def test_logits_alone_leave_the_labels_out(tmp_path, distil):
    """The labels have no part in it: the teacher's mistakes are learned too."""
    assert distil(tmp_path / "run", "logit", "--method-option", "ce_weight=0", "weight=1").status == 0
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert record["train_loss"] == pytest.approx(record["train_logit"], rel=1e-6)


def test_warmup_grows_with_the_epochs(tmp_path, distil):
    assert distil(tmp_path / "run", "dkd", "--epochs", "2", "--method-option", "warmup=2").status == 0
    for record, grown in zip(map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()), (0.5, 1), strict=True):
        teacher = record["train_target"] + 2 * record["train_others"]
        assert record["train_loss"] == pytest.approx(record["train_ce"] + grown * teacher, rel=1e-5)


# ---------------------------------------------------------------------------------------------- options
def test_help_methods_tells_every_option_there_is(run_command):
    out = run_command("train.py", "--help-methods").out
    for name, method_class in losses.METHODS.items():
        block = re.search(rf"^{name} +(.+)\n((?: .+\n)*)", out, re.MULTILINE)
        assert block[1] == method_class.__doc__.splitlines()[0]
        listed = {line.split()[0]: line.split() for line in block[2].splitlines()}
        constructor = method_class.__init__.__kwdefaults__ or {}
        assert {key.rstrip("_"): str(value) for key, value in constructor.items()} == {key: line[1] for key, line in listed.items()}
        assert all(len(line) > 3 for line in listed.values()), "each has a meaning"


def test_papers_and_years_are_named():
    for name, about in names.methods().items():
        text = " ".join(losses.METHODS[name].__doc__.split())
        assert about.summary.startswith("L = ") and (re.search(r"[A-Z]\w+.* (19|20)\d\d", text) or name in ("base", "at_st")), name


def resolved(*argv):
    given, origins, _ = settings.given_settings([*map(str, argv), "--student", "plane2", "--dataset", "digits", "--cuda", "0"])
    return settings.resolve(given, origins)


def test_options_reach_the_method_by_either_way():
    short = resolved("--teacher", "plane4", "--method", "st", "--temperature", 3)[0]
    long = resolved("--teacher", "plane4", "--method", "st", "--method-option", "temperature=3")[0]
    assert settings.identity_of(short) == settings.identity_of(long)
    assert short["temperature"] == 3.0 and "lambda" not in short and short["method_options"] == {"temperature": 3.0, "alpha": 1.0}
    several = resolved(
        "--teacher", "plane4", "--method", "CRD", "--method-option", "tau=.1", "negatives=5", "--method-option", "momentum=0"
    )
    assert several[0]["method_options"] == {"beta": 0.8, "dimensions": 128, "negatives": 5, "tau": 0.1, "momentum": 0.0}
    assert "method_option" not in several[0] and "temperature" not in several[0]


def test_a_runs_identity_is_what_it_was_before_there_were_options():
    identity = settings.identity_of(resolved("--teacher", "plane4")[0])
    assert identity["method_options"] == {"temperature": 4.0, "lambda": 0.5, "reduction": "batchmean"}
    assert not identity.keys() & {"method_option", "repeat", "initialisation", "method_file"}


@pytest.mark.parametrize("name", ["sp", "rkd", "pkt", "crd"])
def test_what_several_processes_cannot_share_is_refused(name, monkeypatch, capsys):
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for key, value in place.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(SystemExit):
        resolved("--teacher", "plane4", "--method", name)
    assert "which 2 processes do not share" in capsys.readouterr().err
    assert resolved("--teacher", "plane4", "--method", "fitnet")


# ------------------------------------------------------------------------------------------- a user's own
@pytest.fixture(scope="module")
def example():
    """The class in docs/adding_a_method.md."""
    return re.search(r"```python\n(.+?)```", (ROOT / "docs/adding_a_method.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def test_the_documents_example_trains(tmp_path, distil, example):
    file = tmp_path / "my_losses.py"
    file.write_text(example)
    outcome = distil(tmp_path / "run", f"{file}:Cosine", "--method-option", "beta=5")
    assert outcome.status == 0, outcome.err
    config, summary = read(tmp_path / "run/config.json"), read(tmp_path / "run/summary.json")
    assert config["method"] == f"{file}:Cosine" and config["method_options"] == {"beta": 5.0}
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert record["train_loss"] == pytest.approx(record["train_ce"] + 5 * record["train_cosine"], rel=1e-5)
    assert summary["best"]["test_accuracy_percent"] > 60
    file.write_text(example.replace("beta=2.0", "beta=3.0"))
    again = distil(tmp_path / "run", f"{file}:Cosine", "--method-option", "beta=5")
    assert again.status == 2 and "method_file" in again.err


OWN = """
import torch
from torch import nn
class Own(nn.Module):
    '''Mine.

    size (at least 2): of something
    '''
    def __init__(self, student, *, size=4, sharp=False, kind="soft"):
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
    "no default": (OWN.replace("size=4", "size"), "Own", [], "needs a default"),
    "another argument": (OWN.replace("student, *", "network, *"), "Own", [], "asks for network"),
    "an import that fails": ("import absent\n" + OWN, "Own", [], "No module named 'absent'"),
    "a constructor that fails": (OWN.replace(".shape[1]", ".shape[5]"), "Own", [], "line 11"),
    "a call that fails": (OWN.replace("self.layer(", "self.layre("), "Own", [], "layre"),
    "no dict": (OWN.replace('{"loss": self', "(self").replace("mean()}", "mean())"), "Own", [], "no dict with 'loss'"),
    "no single number": (OWN.replace(".mean()}", "}"), "Own", [], "'loss' is no single number"),
}


@pytest.mark.parametrize("case", OWN_ERRORS)
def test_what_is_wrong_with_a_users_own_is_one_line_and_nothing_is_written(case, tmp_path, distil):
    source, spelled, options, message = OWN_ERRORS[case]
    (tmp_path / "own.py").write_text(source)
    flags = ("--method-option", *options) if options else ()
    outcome = distil(tmp_path / "run", f"{tmp_path / 'own.py'}:{spelled}", *flags)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and message in outcome.err, outcome.err
    assert not (tmp_path / "run").exists()


def test_what_goes_wrong_later_is_one_line_as_well(tmp_path, distil):
    """At the epoch's last batch, the only one of another size."""
    (tmp_path / "own.py").write_text(
        OWN.replace("        return", "        assert len(labels) in (2, 512), 'odd batch'\n        return")
    )
    outcome = distil(tmp_path / "run", f"{tmp_path / 'own.py'}:Own", "--batch-size", "512")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and "odd batch (AssertionError, own.py line 13)" in outcome.err, (
        outcome.err
    )


def test_a_users_own_may_have_parameters_and_options_of_every_kind(tmp_path, distil):
    (tmp_path / "own.py").write_text(OWN)
    outcome = distil(tmp_path / "run", f"{tmp_path / 'own.py'}:Own", "--method-option", "size=3", "sharp=yes", "kind=hard")
    assert outcome.status == 0, outcome.err
    assert read(tmp_path / "run/config.json")["method_options"] == {"size": 3, "sharp": True, "kind": "hard"}
    assert checkpoint.read(tmp_path / "run/last.pth.tar")["method_state_dict"]["layer.weight"].shape[0] == 3


# ---------------------------------------------------------------------------------------------- repeated
def test_repeat_makes_a_run_a_seed_and_the_report_takes_them_together(tmp_path, call, tiny):
    command = (*tiny, "--teacher", "plane2", "--seed", "4", "--repeat", "2", "--run-dir", tmp_path)
    outcome = call(train, *command, "--json")
    assert outcome.status == 0, outcome.err
    summaries = [json.loads(line) for line in outcome.out.splitlines()]
    assert [summary["seed"] for summary in summaries] == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed4", "seed5", "teacher"], "one teacher for both"
    best = [summary["best"]["test_accuracy_percent"] for summary in summaries]
    assert f"{np.mean(best):.2f} ± {np.std(best, ddof=1):.2f} % at the best epoch" in outcome.err.splitlines()[-1]
    again = call(train, *command)
    assert again.status == 0 and again.out.count("finished ") == 4, "the teacher and a student, twice"
    more = call(train, *tiny, "--teacher", "plane2", "--seed", "4", "--repeat", "3", "--run-dir", tmp_path)
    assert more.status == 0 and "seeds 4 5 6" in more.out.splitlines()[-1]
    groups = {group.path: group for group in results.group(results.collect([tmp_path])[0])}
    assert list(groups["plane2", "plane2"].values("best")) == [4, 5, 6]
    assert groups["plane2", "plane2"].mean("best") == pytest.approx(
        np.mean(list(groups["plane2", "plane2"].values("best").values()))
    )


def test_a_repeated_run_is_the_run_of_its_seed(tmp_path, call, tiny):
    assert call(train, *tiny, "--seed", "2", "--repeat", "1", "--run-dir", tmp_path / "repeated").status == 0
    assert call(train, *tiny, "--seed", "2", "--run-dir", tmp_path / "alone").status == 0
    weights = [checkpoint.read(tmp_path / run / "last.pth.tar")["model_state_dict"] for run in ("repeated/seed2", "alone")]
    assert checkpoint.digest(weights[0]) == checkpoint.digest(weights[1])
