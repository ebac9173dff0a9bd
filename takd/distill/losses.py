"""Losses as pure functions of tensors, each with its paper and equation; the methods that weight them are in
methods.py.

Stages of two networks may differ in channels and size. Values are float32 whatever precision the networks run in.
Legend: B batch, C classes, D length of a vector, K teachers: where teacher logits are (K, B, C), they are of several.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def log_softened(logits: Tensor, temperature: float) -> Tensor:
    """(B, C): log softmax(logits / T); of (K, B, C), the log of the mean of the K distributions."""
    log = F.log_softmax(logits.float() / temperature, dim=-1)
    if log.dim() == 2:
        return log
    largest = log.amax(0)
    return largest + (log - largest).exp().mean(0).log()  # of equal distributions, the same to the bit


def distillation_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, reduction: str = "batchmean"
) -> Tensor:
    """T^2 KL(teacher || student) of softened distributions: eq. 2 of Mirzadeh et al. 2020, after Hinton et al. 2015.

    student_logits (B, C), teacher_logits (B, C) or (K, B, C), whose softened distributions are averaged. `batchmean`,
    the equation's, sums over classes and averages over the batch. `mean` divides by the classes as well, as the
    released code's `nn.KLDivLoss()` does: C times too small, kept to reproduce its runs.
    """
    student, teacher = log_softened(student_logits, temperature), log_softened(teacher_logits, temperature)
    return _scaled_kl(student, teacher, temperature, reduction)


def _scaled_kl(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    # Not left to PyTorch's reduction="mean": it warns, and is announced to become "batchmean".
    classes = student.shape[1] if reduction == "mean" else 1
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * (temperature**2 / classes)


def guidance_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, reduction: str = "batchmean"
) -> Tensor:
    """(K,): distillation_kl from each of K teachers, teacher_logits (K, B, C): the terms of Son et al. 2021."""
    student = log_softened(student_logits, temperature)
    teachers = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return torch.stack([_scaled_kl(student, teacher, temperature, reduction) for teacher in teachers])


def drop_threshold(probability: float, terms: int) -> float:
    """q, for which each of K terms is left out with this probability, in whole: a term is left out where its uniform
    number is below q, and where all are, the largest stays: q - q^K / K, which grows up to 1 - 1/K at q = 1."""
    low, high = 0.0, 1.0
    for _ in range(60):
        q = (low + high) / 2
        low, high = (q, high) if q - q**terms / terms < probability else (low, q)
    return low if probability else 0.0


def decoupled_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> list[Tensor]:
    """The two parts of distillation_kl in Zhao et al. 2022, eq. 7: [the label's class against all others, among the
    others].

    Logits (B, C), the teacher's also (K, B, C), labels (B,); each part is times T^2 and a mean over the batch. The
    second is not weighted by 1 - p_t here.
    """
    label = F.one_hot(labels, student_logits.shape[1])

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        log = log_softened(logits, temperature)
        others = log - 1000 * label  # e^-1000 is 0 in float32, and unlike -inf it can be subtracted
        return torch.stack([(log * label).sum(1), others.logsumexp(1)], dim=1), F.log_softmax(others, dim=1)

    pairs = zip(parts(student_logits), parts(teacher_logits), strict=True)
    return [F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2 for ours, theirs in pairs]


def standardised(logits: Tensor) -> Tensor:
    """Logits (..., C) minus their mean, over their standard deviation, per image: Sun et al. 2024, algorithm 1."""
    logits = logits.float()
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


def same_size(*stages: Tensor) -> list[Tensor]:
    """Stages (B, channels, h, w) in float32, average-pooled to the smallest height and width among them."""
    size = tuple(min(lengths) for lengths in zip(*(stage.shape[2:] for stage in stages), strict=True))
    return [
        F.adaptive_avg_pool2d(stage.float(), size) if stage.shape[2:] != size else stage.float() for stage in stages
    ]


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE of two stages' attention maps: the mean over channels of A^2, scaled to length 1 (Zagoruyko and Komodakis
    2017, F_mean^2 and eq. 2). Stages (B, channels, h, w) of any two shapes."""
    ours, theirs = (F.normalize(stage.square().mean(1).flatten(1)) for stage in same_size(student, teacher))
    return F.mse_loss(ours, theirs)


def flow(first: Tensor, second: Tensor) -> Tensor:
    """(B, C1, C2): the flow from one stage (B, C1, h, w) to another, F1 F2^T / (h w) (Yim et al. 2017, eq. 1)."""
    first, second = (stage.flatten(2) for stage in same_size(first, second))
    return first @ second.transpose(1, 2) / first.shape[2]


def similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """MSE of the images' similarities F F^T (B, B), rows scaled to length 1: Tung and Mori 2019, eqs. 2 to 4."""
    ours, theirs = (stage.float().flatten(1) for stage in (student, teacher))
    return F.mse_loss(F.normalize(ours @ ours.T), F.normalize(theirs @ theirs.T))


def relations(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(distances (B, B) over their mean, cosines (B, B, B) of angles) of vectors (B, D): Park et al. 2019, eqs. 6, 9.

    [i, j, k] is the angle at i between j and k.
    """
    vectors = vectors.float() - vectors.float().mean(0)  # centred, so that products keep their digits
    products = vectors @ vectors.T
    own = products.diagonal()
    inner = products - products[:, :, None] - products[:, None, :] + own[:, None, None]  # (v_j - v_i) . (v_k - v_i)
    squares = inner.diagonal(dim1=1, dim2=2)
    apart = squares > 1e-6 * (own[:, None] + own)  # below that it is rounding, whose root has no useful gradient
    distances = torch.where(apart, squares, 1.0).sqrt()
    angles = inner / (distances[:, :, None] * distances[:, None, :]) * (apart[:, :, None] & apart[:, None, :])
    distances = distances * apart
    mean = distances.sum() / apart.sum().clamp_min(1)
    return distances / mean.clamp_min(1e-12), angles


def probability_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over (B, B) of p_t log(p_t / p_s), p the images' cosine similarities (1 + cos) / 2, rows summing to 1:
    Passalis and Tefas 2018, eqs. 4 to 6. Vectors (B, D); D may differ."""

    def probabilities(vectors: Tensor) -> Tensor:
        unit = F.normalize(vectors.float(), eps=1e-7)
        similarity = (unit @ unit.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    ours, theirs = probabilities(student), probabilities(teacher)
    return (theirs * ((theirs + 1e-7) / (ours + 1e-7)).log()).mean()


def contrastive_nce(scores: Tensor, images: int) -> Tensor:
    """-(log h of the positive pair + sum of log(1 - h) of the K negatives), h = e / (e + K / N), a mean over the batch:
    Tian et al. 2020, eqs. 17 and 18. scores e: (B, 1 + K), the positive first; `images` is N."""
    noise = (scores.shape[1] - 1) / images
    positive, negatives = scores[:, 0], scores[:, 1:]
    return -(
        (positive / (positive + noise + 1e-7)).log().sum() + (noise / (negatives + noise + 1e-7)).log().sum()
    ) / len(scores)
