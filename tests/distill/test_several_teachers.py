"""Several teachers: the arithmetic in numpy's float64, one teacher given twice, the terms that are left out."""

from itertools import product

import numpy as np
import pytest
import torch
from conftest import softmax

import data_loader
import model_factory
from takd.config import methods as tables
from takd.distill import losses, methods
from takd.distill.methods import Features, Logits
from takd.distill.teacher import Teacher, Teachers
from takd.images.split import Batch, Transform

B, C, K = 6, 10, 3
LABELS = torch.arange(B) % 4
TAKING = [name for name, row in tables.METHODS.items() if row.several_teachers and name != "base"]


def logits(seed, *shape, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, shape)


STUDENT, TEACHERS = logits(1, B, C), logits(2, K, B, C)


def called(name, teachers, student=STUDENT, **options):
    """({part: value}, the loss's gradient) of a method; `teachers` is float64 (B, C) or (K, B, C)."""
    defaults = {key: option.default for key, option in tables.METHODS[name].options.items()}
    ours = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    theirs = Logits(torch.tensor(teachers, dtype=torch.float32))
    features = Features((), ours, ours)
    method = methods.build(name, defaults | options, features, Logits(theirs.logits[..., :2, :]), LABELS)
    parts = method(features, theirs, LABELS)
    parts["loss"].backward()
    return {key: float(value.detach()) for key, value in parts.items()}, ours.grad


def soft_kl(student, p, temperature):
    """T^2 KL(p || student's softened distribution), a mean over the images."""
    return temperature**2 * np.mean(np.sum(p * np.log(p / softmax(student / temperature)), axis=1))


def ce():
    return -np.mean(np.log(softmax(STUDENT))[np.arange(B), LABELS])


# ------------------------------------------------------------------------------------------------ arithmetic
@pytest.mark.parametrize("temperature, weight", [(4.0, 0.5), (1.5, 0.9)])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_kd_and_dgkd_equal_their_formulas(temperature, weight, reduction):
    options = {"temperature": temperature, "lambda": weight, "reduction": reduction}
    soft = [softmax(teacher / temperature) for teacher in TEACHERS]
    divisor = C if reduction == "mean" else 1
    expected = {
        "kd": soft_kl(STUDENT, np.mean(soft, axis=0), temperature) / divisor,
        "dgkd": np.mean([soft_kl(STUDENT, p, temperature) for p in soft]) / divisor,
    }
    for name, kl in expected.items():
        parts, _ = called(name, TEACHERS, **options)
        assert parts["kd"] == pytest.approx(kl, rel=1e-5), name
        assert parts["loss"] == pytest.approx((1 - weight) * ce() + weight * kl, rel=1e-5), name
    assert expected["kd"] < expected["dgkd"], "the teachers differ"


def test_the_other_methods_learn_from_the_mean():
    """Of distributions (as st, dkd) or of standardised ones (lskd); logit from the mean of the logits."""
    z = (TEACHERS - TEACHERS.mean(2, keepdims=True)) / TEACHERS.std(2, ddof=1, keepdims=True)
    same = {
        "st": np.log(np.mean([softmax(teacher / 4) for teacher in TEACHERS], axis=0)) * 4,
        "dkd": np.log(np.mean([softmax(teacher / 4) for teacher in TEACHERS], axis=0)) * 4,
        "logit": TEACHERS.mean(0),
    }
    for name, alone in same.items():
        for part, value in called(name, TEACHERS)[0].items():
            assert value == pytest.approx(called(name, alone)[0][part], rel=1e-4), (name, part)
    own = (STUDENT - STUDENT.mean(1, keepdims=True)) / STUDENT.std(1, ddof=1, keepdims=True)
    expected = soft_kl(own, np.mean([softmax(each / 2) for each in z], axis=0), 2)
    assert called("lskd", TEACHERS)[0]["kd"] == pytest.approx(expected, rel=1e-4)
    assert {*same, "lskd", "kd", "dgkd"} == set(TAKING)


def test_kd_and_dgkd_have_one_gradient():
    """The mean of the divergences is that from the mean, plus what no student changes."""
    torch.testing.assert_close(called("kd", TEACHERS)[1], called("dgkd", TEACHERS)[1])


@pytest.mark.parametrize("name", TAKING)
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_one_teacher_given_several_times_equals_it_once(name, copies):
    once, gradient = called(name, TEACHERS[0])
    parts, same_gradient = called(name, np.stack([TEACHERS[0]] * copies))
    if name in ("kd", "dgkd") and copies < 3:  # to the bit: a mean of two equals is exact, a third rounds
        assert parts == once and torch.equal(gradient, same_gradient)
    assert parts == pytest.approx(once, rel=1e-5)
    torch.testing.assert_close(gradient, same_gradient)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_dgkd_from_one_teacher_is_kd(drop):
    before = torch.get_rng_state()
    parts, gradient = called("dgkd", TEACHERS[0], drop=drop)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn"
    expected, its_gradient = called("kd", TEACHERS[0])
    assert parts == expected and torch.equal(gradient, its_gradient)


@pytest.mark.parametrize("name, changed", [*product(TAKING, range(K))])
def test_every_teacher_is_used(name, changed):
    others = TEACHERS.copy()
    others[changed] = logits(7, B, C)
    assert not torch.allclose(called(name, TEACHERS)[1], called(name, others)[1])


def test_a_distribution_that_is_nearly_one_class_stays_finite():
    parts, gradient = called("kd", TEACHERS * 1000, temperature=1.0)
    assert np.isfinite(parts["loss"]) and gradient.isfinite().all()


def test_each_teacher_sees_the_images_in_its_own_size_and_normalisation():
    split = data_loader.random_split("digits", count=4)
    transforms = Transform((0.5,) * 3, (0.25,) * 3, 40), split.transform
    torch.manual_seed(0)
    networks = [model_factory.create("resnet8", 10) for _ in transforms]
    teachers = [Teacher(*pair, split, "fp32") for pair in zip(networks, transforms, strict=True)]
    batch = Batch(split, "none", torch.arange(4), torch.zeros(4, dtype=torch.int64))
    found = Teachers(teachers)(batch, split.transform(batch.images)).logits
    with torch.no_grad():
        pairs = zip(networks, transforms, strict=True)
        expected = torch.stack([network.eval()(transform(batch.images)) for network, transform in pairs])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ left-out terms
def kept_terms(values, terms):
    """Which terms each value is the mean of."""
    subsets = [chosen for chosen in product((0, 1), repeat=K) if any(chosen)]
    means = torch.tensor([[float(np.dot(chosen, terms)) / sum(chosen)] for chosen in subsets])
    distance, nearest = (means - torch.tensor(values)).abs().min(0)
    assert distance.max() < 1e-4, "a mean over some of the terms, and at least one"
    return torch.tensor(subsets, dtype=torch.float)[nearest]


def drawn(drop, count, teachers=TEACHERS):
    """The divergence in each of `count` steps."""
    defaults = {key: option.default for key, option in tables.METHODS["dgkd"].options.items()}
    theirs, ours = (Logits(torch.tensor(each, dtype=torch.float32)) for each in (teachers, STUDENT))
    method = methods.build("dgkd", defaults | {"drop": drop}, ours, theirs, LABELS)
    return [float(method.divergence(ours, theirs)) for _ in range(count)]


@pytest.mark.parametrize("drop, expected", [(0.25, 0.25), (0.5, 0.5), (0.9, 2 / 3)])
def test_a_term_is_left_out_with_the_probability_and_never_all(drop, expected):
    """0.9 of three is impossible where one always stays: 2/3 is."""
    torch.manual_seed(3)
    terms = [soft_kl(STUDENT, softmax(teacher / 4), 4.0) for teacher in TEACHERS]
    kept = kept_terms(drawn(drop, 2000), terms)
    torch.testing.assert_close(1 - kept.mean(0), torch.full((K,), expected), rtol=0, atol=0.04)  # 3.7 deviations


@pytest.mark.parametrize("teachers", [2, 3, 5])
@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 1.0])
def test_the_threshold_gives_the_probability(drop, teachers):
    q = losses.drop_threshold(drop, teachers)
    assert q - q**teachers / teachers == pytest.approx(min(drop, 1 - 1 / teachers), abs=1e-9)


def test_what_is_left_out_follows_from_the_generator():
    torch.manual_seed(5)
    drawn(0.5, 7)
    state = torch.get_rng_state()
    first = drawn(0.5, 20)
    torch.set_rng_state(state)
    assert drawn(0.5, 20) == first and len(set(first)) > 1
