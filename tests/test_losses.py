"""The losses against the paper's equations, written out again in numpy's float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from takd.distill import methods as losses

BATCH, CLASSES = 6, 10


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def kl_by_hand(student, teacher, temperature):
    """Eq. 2: tau^2 KL(teacher || student), summed over classes and averaged over the batch."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (p * (np.log(p) - np.log(q))).sum() / len(p)


@pytest.fixture
def logits():
    random = np.random.default_rng(5)
    return random.normal(0, 3, (BATCH, CLASSES)), random.normal(0, 3, (BATCH, CLASSES))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 20.0])
def test_kl_is_equation_2(logits, temperature):
    student, teacher = logits
    value = losses.distillation_kl(torch.tensor(student), torch.tensor(teacher), temperature)
    assert float(value) == pytest.approx(kl_by_hand(student, teacher, temperature), rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_mean_is_the_released_codes_division_by_the_classes_too(logits):
    """As torch's reduction="mean" is today, without its warning that this will change."""
    student, teacher = map(torch.tensor, logits)
    value = losses.distillation_kl(student, teacher, 4.0, reduction="mean")
    assert float(value) * CLASSES == pytest.approx(kl_by_hand(*logits, 4.0), rel=1e-5)


def test_kl_is_zero_for_equal_logits_and_for_shifted_ones(logits):
    student = torch.tensor(logits[0])
    assert float(losses.distillation_kl(student, student, 4.0)) == pytest.approx(0, abs=1e-6)
    assert float(losses.distillation_kl(student, student + 3, 4.0)) == pytest.approx(0, abs=1e-6)


def test_kl_is_not_symmetric(logits):
    """KL(student || teacher) would pass every other test that only asks for a small value."""
    student, teacher = map(torch.tensor, logits)
    assert float(losses.distillation_kl(student, teacher, 1.0)) != pytest.approx(
        float(losses.distillation_kl(teacher, student, 1.0)), rel=1e-2
    )


def test_temperature_squared_keeps_the_gradient_in_scale():
    """For small logits T^2 KL tends to the same gradient at any high T: (student - teacher) / classes, per image."""
    random = np.random.default_rng(1)
    student, teacher = random.normal(0, 0.1, (2, BATCH, CLASSES))
    student -= student.mean(axis=1, keepdims=True)
    teacher -= teacher.mean(axis=1, keepdims=True)
    for temperature in (10.0, 40.0):
        variable = torch.tensor(student, requires_grad=True)
        losses.distillation_kl(variable, torch.tensor(teacher), temperature).backward()
        np.testing.assert_allclose(variable.grad.numpy(), (student - teacher) / CLASSES / BATCH, rtol=0.05, atol=1e-4)


def test_kl_survives_extreme_logits():
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    assert losses.distillation_kl(student, teacher, 1.0).isfinite()


def test_kl_is_float32_for_half_precision_logits(logits):
    student, teacher = (torch.tensor(each, dtype=torch.bfloat16) for each in logits)
    value = losses.distillation_kl(student, teacher, 4.0)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(kl_by_hand(student.double().numpy(), teacher.double().numpy(), 4.0), rel=1e-5)


def outputs(logits):
    return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_kd_is_equation_3(logits, weight):
    student, teacher = logits
    labels = np.arange(BATCH) % CLASSES
    parts = losses.KD(temperature=4.0, lambda_=weight)(
        outputs(torch.tensor(student)), outputs(torch.tensor(teacher)), torch.tensor(labels)
    )
    cross_entropy = -np.log(softmax(student)[np.arange(BATCH), labels]).mean()
    kd = kl_by_hand(student, teacher, 4.0)
    assert float(parts["ce"]) == pytest.approx(cross_entropy, rel=1e-5)
    assert float(parts["kd"]) == pytest.approx(kd, rel=1e-5)
    assert float(parts["loss"]) == pytest.approx((1 - weight) * cross_entropy + weight * kd, rel=1e-5)


def test_gradient_reaches_the_student_and_never_the_teacher(logits):
    """The teacher's logits come without a graph; were they given with one, the student's loss must still not need it."""
    network, frozen = torch.nn.Linear(4, CLASSES), torch.nn.Linear(4, CLASSES).requires_grad_(False)
    images = torch.randn(BATCH, 4)
    parts = losses.KD()(outputs(network(images)), outputs(frozen(images)), torch.zeros(BATCH, dtype=torch.long))
    parts["loss"].backward()
    assert network.weight.grad.abs().sum() > 0
    assert frozen.weight.grad is None


def test_without_a_teacher_the_loss_is_cross_entropy(logits):
    student, labels = logits[0], np.arange(BATCH) % CLASSES
    parts = losses.CrossEntropy()(outputs(torch.tensor(student)), None, torch.tensor(labels))
    assert list(parts) == ["loss"]
    assert float(parts["loss"]) == pytest.approx(-np.log(softmax(student)[np.arange(BATCH), labels]).mean(), rel=1e-5)
