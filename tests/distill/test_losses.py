"""The distillation loss against the paper's equations, computed again in numpy's float64."""

import numpy as np
import pytest
import torch
from conftest import softmax

from takd.distill.losses import distillation_kl
from takd.distill.methods import KD, CrossEntropy
from takd.distill.teacher import Logits

BATCH, CLASSES = 6, 10
LABELS = np.arange(BATCH) % CLASSES


def kl_by_hand(student, teacher, temperature):
    """Eq. 2: tau^2 KL(teacher || student), summed over classes and averaged over the batch."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum() / len(p)


def cross_entropy_by_hand(logits):
    return -np.log(softmax(logits)[np.arange(BATCH), LABELS]).mean()


@pytest.fixture
def logits():
    random = np.random.default_rng(5)
    return random.normal(0, 3, (BATCH, CLASSES)), random.normal(0, 3, (BATCH, CLASSES))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 20.0])
def test_kl_equals_equation_2(logits, temperature):
    value = distillation_kl(*map(torch.tensor, logits), temperature)
    assert float(value) == pytest.approx(kl_by_hand(*logits, temperature), rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_reduction_mean_also_divides_by_the_classes(logits):
    """As torch's reduction="mean" does today, without its warning that this will change."""
    value = distillation_kl(*map(torch.tensor, logits), 4.0, reduction="mean")
    assert float(value) * CLASSES == pytest.approx(kl_by_hand(*logits, 4.0), rel=1e-5)


@pytest.mark.parametrize("shift", [0, 3])
def test_kl_is_zero_for_equal_and_for_shifted_logits(logits, shift):
    student = torch.tensor(logits[0])
    assert float(distillation_kl(student, student + shift, 4.0)) == pytest.approx(0, abs=1e-6)


def test_kl_is_not_symmetric(logits):
    """KL(student || teacher) would pass every other test that only requires a small value."""
    student, teacher = map(torch.tensor, logits)
    reverse = float(distillation_kl(teacher, student, 1.0))
    assert float(distillation_kl(student, teacher, 1.0)) != pytest.approx(reverse, rel=1e-2)


@pytest.mark.parametrize("temperature", [10.0, 40.0])
def test_temperature_squared_keeps_the_scale_of_the_gradient(temperature):
    """For small logits T^2 KL tends to the same gradient at any high T: (student - teacher) / classes, per image."""
    student, teacher = np.random.default_rng(1).normal(0, 0.1, (2, BATCH, CLASSES))
    student -= student.mean(axis=1, keepdims=True)
    teacher -= teacher.mean(axis=1, keepdims=True)
    variable = torch.tensor(student, requires_grad=True)
    distillation_kl(variable, torch.tensor(teacher), temperature).backward()
    np.testing.assert_allclose(variable.grad.numpy(), (student - teacher) / CLASSES / BATCH, rtol=0.05, atol=1e-4)


def test_kl_is_finite_for_extreme_logits():
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    assert distillation_kl(student, teacher, 1.0).isfinite()


def test_kl_is_float32_for_half_precision_logits(logits):
    student, teacher = (torch.tensor(each, dtype=torch.bfloat16) for each in logits)
    value = distillation_kl(student, teacher, 4.0)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(kl_by_hand(student.double().numpy(), teacher.double().numpy(), 4.0), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_kd_equals_equation_3(logits, weight):
    method = KD(temperature=4.0, lambda_=weight, reduction="batchmean")
    parts = method(*(Logits(torch.tensor(each)) for each in logits), torch.tensor(LABELS))
    ce, kd = cross_entropy_by_hand(logits[0]), kl_by_hand(*logits, 4.0)
    assert float(parts["ce"]) == pytest.approx(ce, rel=1e-5)
    assert float(parts["kd"]) == pytest.approx(kd, rel=1e-5)
    assert float(parts["loss"]) == pytest.approx((1 - weight) * ce + weight * kd, rel=1e-5)


def test_without_a_teacher_the_loss_is_cross_entropy(logits):
    parts = CrossEntropy()(Logits(torch.tensor(logits[0])), None, torch.tensor(LABELS))
    assert list(parts) == ["loss"]
    assert float(parts["loss"]) == pytest.approx(cross_entropy_by_hand(logits[0]), rel=1e-5)
