"""Distillation: pure kernels, and METHODS, name -> a method object that combines them.

A method is an nn.Module built once for a student and a teacher; `method(student, teacher, labels)` gets two model_factory.Features
(only `.logits` where `needs_features` is false, so that a table of logits can stand in for the teacher) and returns a dict with
`loss` and its named parts. Its options are the keyword-only arguments of its constructor, whose defaults give their types; a line
`option (bounds): meaning` in its docstring gives the rest. names.py reads both without importing this: they are the schema of
`--method-option`, of `--help-methods`, of error messages and of reports. A new method is a class here and a row in METHODS, or a
user's own file (docs/adding_a_method.md).

What a constructor may ask for besides, by name: `student` and `teacher`, Features of two images, to size its parameters by; and
`labels`, int64 (N,), the training split's. What a class may say: `needs_index = True`, to be called with `index=`, int64 (B,), rows
of the training split; `one_process = True`, where its loss is no mean over images, which processes cannot share; `epoch = 0`, to be
told the epoch, counted from 0. Buffers change in place: on a GPU a step is recorded once and played (graphs.py).

Stages of two networks are paired from their ends, the last with the last: a ResNet has a stem and three stages, a plain CNN two to
four. Legend: B batch, C classes, N images, D length of a vector. Losses are float32 whatever precision the networks run in.
"""

import contextlib
import copy
import inspect
import traceback
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from takd.config import names
from takd.config.names import UserError


# -------------------------------------------------------------------------------------------------- kernels
def distillation_kl(student_logits, teacher_logits, temperature, reduction="batchmean"):
    """T^2 KL(teacher || student) of softened distributions: eq. 2 of Mirzadeh et al. 2020, after Hinton et al. 2015.

    student_logits, teacher_logits: (B, C). `batchmean`, the equation's, sums over classes and averages over the batch. `mean`
    divides by the classes as well, as the released code's `nn.KLDivLoss()` does: C times too weak, kept to reproduce its runs.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    # Not left to PyTorch's reduction="mean": it warns, and is announced to become "batchmean".
    classes = student.shape[1] if reduction == "mean" else 1
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * (temperature**2 / classes)


def decoupled_kl(student_logits, teacher_logits, labels, temperature):
    """The two parts of distillation_kl in Zhao et al. 2022, eq. 7: (of the label's class against all others, among the others).

    Logits (B, C), labels (B,); each part is times T^2 and a mean over the batch. The second is not weighted by 1 - p_t here.
    """
    label = F.one_hot(labels, student_logits.shape[1])

    def split(logits):
        log = F.log_softmax(logits.float() / temperature, dim=1)
        others = log - 1000 * label  # e^-1000 is 0 in float32, and unlike -inf it can be subtracted
        return torch.stack([(log * label).sum(1), others.logsumexp(1)], dim=1), F.log_softmax(others, dim=1)

    pairs = zip(split(student_logits), split(teacher_logits), strict=True)
    return [F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2 for ours, theirs in pairs]


def standardised(logits):
    """Logits (B, C) less their mean, over their standard deviation, image by image: Sun et al. 2024, algorithm 1."""
    logits = logits.float()
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def one_size(*stages):
    """Stages (B, C, h, w) in float32, averaged down to the smallest height and width among them."""
    size = torch.Size(min(lengths) for lengths in zip(*(stage.shape[2:] for stage in stages), strict=True))
    return [F.adaptive_avg_pool2d(stage.float(), size) if stage.shape[2:] != size else stage.float() for stage in stages]


def attention_distance(student, teacher):
    """Mean squared difference of two stages' attention maps, mean over channels of A^2 scaled to length 1 (Zagoruyko and Komodakis
    2017, F_mean^2 and eq. 2). Stages (B, channels, h, w) of any two shapes."""
    return F.mse_loss(*(F.normalize(stage.square().mean(1).flatten(1)) for stage in one_size(student, teacher)))


def flow(first, second):
    """(B, C1, C2): the flow from one stage (B, C1, h, w) to another, F1 F2^T / (h w) (Yim et al. 2017, eq. 1)."""
    first, second = (stage.flatten(2) for stage in one_size(first, second))
    return first @ second.transpose(1, 2) / first.shape[2]


def similarity_distance(student, teacher):
    """Mean squared difference of the images' similarities F F^T (B, B), rows scaled to length 1: Tung and Mori 2019, eqs. 2 to 4."""
    rows = [stage.float().flatten(1) for stage in (student, teacher)]
    return F.mse_loss(*(F.normalize(each @ each.T) for each in rows))


def relations(vectors):
    """Of vectors (B, D), as in Park et al. 2019, eqs. 6 and 9: their distances (B, B) over the mean distance, and the cosines (B, B, B)
    of the angles that pairs of them make, seen from a third: [i, j, k] is the one at i."""
    vectors = vectors.float() - vectors.float().mean(0)  # about their middle, so that products keep their digits
    products = vectors @ vectors.T
    own = products.diagonal()
    seen = products - products[:, :, None] - products[:, None, :] + own[:, None, None]  # (v_j - v_i) . (v_k - v_i)
    squares = seen.diagonal(dim1=1, dim2=2)
    apart = squares > 1e-6 * (own[:, None] + own)  # else rounding, whose root has no gradient worth having
    distances = torch.where(apart, squares, 1.0).sqrt()
    angles = seen / (distances[:, :, None] * distances[:, None, :]) * (apart[:, :, None] & apart[:, None, :])
    distances = distances * apart
    mean = distances.sum() / apart.sum().clamp_min(1)
    return distances / mean.clamp_min(1e-12), angles


def probability_distance(student, teacher):
    """Mean over (B, B) of p_t log(p_t / p_s), p the images' cosine similarities (1 + cos) / 2 with rows that sum to 1: Passalis and
    Tefas 2018, eqs. 4 to 6. Vectors (B, D), D of each its own."""

    def probabilities(vectors):
        unit = F.normalize(vectors.float(), eps=1e-7)
        similarity = (unit @ unit.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    ours, theirs = probabilities(student), probabilities(teacher)
    return (theirs * ((theirs + 1e-7) / (ours + 1e-7)).log()).mean()


def contrast(scores, images):
    """-(log h of the right pair + sum of log(1 - h) of the K others), h = e / (e + K / N), a mean over the batch: Tian et al. 2020,
    eqs. 17 and 18. scores e: (B, 1 + K), the right pair first; `images` is N."""
    noise = (scores.shape[1] - 1) / images
    right, others = scores[:, 0], scores[:, 1:]
    return -((right / (right + noise + 1e-7)).log().sum() + (noise / (others + noise + 1e-7)).log().sum()) / len(scores)


def total(student, labels, ce_weight=1.0, **terms):
    """What a method returns: `loss`, ce_weight times cross-entropy plus every weight times its term, `ce`, and the terms by name.

    terms: name=(weight, value).
    """
    ce = F.cross_entropy(student.logits.float(), labels)
    loss = ce_weight * ce + sum(weight * value for weight, value in terms.values())
    return {"loss": loss, "ce": ce} | {name: value for name, (_, value) in terms.items()}


# -------------------------------------------------------------------------------------------------- methods
class CrossEntropy(nn.Module):
    """L = CE: ordinary training with the labels, the paper's NOKD; with a teacher too, which is then not asked."""

    needs_features = False

    def forward(self, student, teacher, labels):
        return {"loss": F.cross_entropy(student.logits.float(), labels)}


class KD(nn.Module):
    """L = (1 - lambda) CE + lambda T^2 KL(teacher || student): eq. 3 of Mirzadeh et al., AAAI 2020, after Hinton et al., 2015.

    temperature (above 0): T, which softens both distributions
    lambda (0 to 1): share of the teacher's term
    reduction (batchmean or mean): of KL; mean divides by the classes too, as the released code does
    """

    needs_features = False

    def __init__(self, *, temperature=4.0, lambda_=0.5, reduction="batchmean"):
        super().__init__()
        self.temperature, self.lambda_, self.reduction = temperature, lambda_, reduction

    def forward(self, student, teacher, labels):
        kd = distillation_kl(student.logits, teacher.logits, self.temperature, self.reduction)
        return total(student, labels, 1 - self.lambda_, kd=(self.lambda_, kd))


class Logit(nn.Module):
    """L = ce_weight CE + weight MSE(logits): Ba and Caruana, NIPS 2014; ce_weight 0 learns from the teacher alone.

    weight: of the squared difference of the logits, a mean over images and classes
    ce_weight: of cross-entropy with the labels
    """

    needs_features = False

    def __init__(self, *, weight=1.0, ce_weight=1.0):
        super().__init__()
        self.weight, self.ce_weight = weight, ce_weight

    def forward(self, student, teacher, labels):
        difference = F.mse_loss(student.logits.float(), teacher.logits.float())
        return total(student, labels, self.ce_weight, logit=(self.weight, difference))


class ST(nn.Module):
    """L = CE + alpha T^2 KL(teacher || student): soft targets, Hinton et al., 2015.

    temperature (above 0): T, which softens both distributions
    alpha: weight of the soft targets
    """

    needs_features = False

    def __init__(self, *, temperature=4.0, alpha=1.0):
        super().__init__()
        self.temperature, self.alpha = temperature, alpha

    def forward(self, student, teacher, labels):
        st = distillation_kl(student.logits, teacher.logits, self.temperature)
        return total(student, labels, st=(self.alpha, st))


class AT(nn.Module):
    """L = CE + beta sum over stages of MSE(attention maps): attention transfer, Zagoruyko and Komodakis, ICLR 2017.

    The last three stages, or as many as both have; of maps of two sizes the larger is averaged down.
    beta: weight of the attention maps
    """

    needs_features = True

    def __init__(self, *, beta=1000.0):
        super().__init__()
        self.beta = beta

    @staticmethod
    def distance(student, teacher):
        pairs = list(zip(reversed(student.stages), reversed(teacher.stages), strict=False))[:3]
        return sum(attention_distance(*pair) for pair in pairs)

    def forward(self, student, teacher, labels):
        return total(student, labels, at=(self.beta, self.distance(student, teacher)))


class ATST(nn.Module):
    """L = CE + beta sum over stages of MSE(attention maps) + alpha T^2 KL(teacher || student): `at` and `st` together.

    beta: weight of the attention maps
    alpha: weight of the soft targets
    temperature (above 0): T of the soft targets
    """

    needs_features = True

    def __init__(self, *, beta=1000.0, alpha=0.9, temperature=4.0):
        super().__init__()
        self.beta, self.alpha, self.temperature = beta, alpha, temperature

    def forward(self, student, teacher, labels):
        st = distillation_kl(student.logits, teacher.logits, self.temperature)
        return total(student, labels, at=(self.beta, AT.distance(student, teacher)), st=(self.alpha, st))


class FSP(nn.Module):
    """L = CE + beta mean over neighbouring stages of MSE(G), G = F1 F2^T / (h w): flow between stages, Yim et al., CVPR 2017.

    In one stage of training. G is channels x channels, so both networks need the same channels in the stages that meet.
    beta: weight of the flow matrices
    """

    needs_features = True

    def __init__(self, student, teacher, *, beta=1.0):
        super().__init__()
        self.beta, self.count = beta, min(len(student.stages), len(teacher.stages))
        ours, theirs = ([stage.shape[1] for stage in network.stages[-self.count :]] for network in (student, teacher))
        if ours != theirs or self.count < 2:
            raise ValueError(
                f"it compares matrices of channels x channels, and the stages have {ours} channels in the student, {theirs} in the "
                "teacher; every other method works for these two"
            )

    def forward(self, student, teacher, labels):
        ours, theirs = (network.stages[-self.count :] for network in (student, teacher))
        pairs = range(self.count - 1)
        distance = sum(F.mse_loss(flow(ours[i], ours[i + 1]), flow(theirs[i], theirs[i + 1])) for i in pairs) / len(pairs)
        return total(student, labels, fsp=(self.beta, distance))


class FitNet(nn.Module):
    """L = CE + beta MSE(r(F_s), F_t) of one stage: hints, Romero et al., ICLR 2015, in one stage as in Tian et al., ICLR 2020.

    r, a learned 1x1 convolution with batch norm and ReLU, gives the student's stage the teacher's channels; the larger map of the
    two is averaged down.
    beta: weight of the hint
    hint (at least 1): which stage, counted from the end; 1 is the last
    """

    needs_features = True

    def __init__(self, student, teacher, *, beta=100.0, hint=2):
        super().__init__()
        if hint > (stages := min(len(student.stages), len(teacher.stages))):
            raise ValueError(f"hint {hint} counts stages from the end, and these networks have {stages} in common")
        self.beta, self.hint = beta, hint
        ours, theirs = (network.stages[-hint].shape[1] for network in (student, teacher))
        self.regressor = nn.Sequential(nn.Conv2d(ours, theirs, 1), nn.BatchNorm2d(theirs), nn.ReLU())

    def forward(self, student, teacher, labels):
        hint = F.mse_loss(*one_size(self.regressor(student.stages[-self.hint].float()), teacher.stages[-self.hint]))
        return total(student, labels, fitnet=(self.beta, hint))


class SP(nn.Module):
    """L = CE + beta MSE(similarities of the batch's images) at the last stage: Tung and Mori, ICCV 2019.

    beta: weight of the similarities
    """

    needs_features, one_process = True, True

    def __init__(self, *, beta=3000.0):
        super().__init__()
        self.beta = beta

    def forward(self, student, teacher, labels):
        return total(student, labels, sp=(self.beta, similarity_distance(student.stages[-1], teacher.stages[-1])))


class RKD(nn.Module):
    """L = CE + beta (distance D + angle A), Huber losses of the relations in a batch: relational KD, Park et al., CVPR 2019.

    Of the pooled vectors. Angles take B^3 numbers: 8 MB in a batch of 128.
    beta: weight of both
    distance: weight of the distances between two images
    angle: weight of the angles between three
    """

    needs_features, one_process = True, True

    def __init__(self, *, beta=1.0, distance=25.0, angle=50.0):
        super().__init__()
        self.beta, self.distance, self.angle = beta, distance, angle

    def forward(self, student, teacher, labels):
        ours, theirs = relations(student.pooled), relations(teacher.pooled)
        distance, angle = (F.smooth_l1_loss(*pair) for pair in zip(ours, theirs, strict=True))
        return total(student, labels, distance=(self.beta * self.distance, distance), angle=(self.beta * self.angle, angle))


class PKT(nn.Module):
    """L = CE + beta KL(similarities of the batch's images as probabilities), of pooled vectors: Passalis and Tefas, ECCV 2018.

    beta: weight of the divergence, which is a mean over B x B and so a small number
    """

    needs_features, one_process = True, True

    def __init__(self, *, beta=30000.0):
        super().__init__()
        self.beta = beta

    def forward(self, student, teacher, labels):
        return total(student, labels, pkt=(self.beta, probability_distance(student.pooled, teacher.pooled)))


class CRD(nn.Module):
    """L = CE + beta (NCE of the student + NCE of the teacher): contrastive representation distillation, Tian et al., ICLR 2020.

    Learned embeddings of both pooled vectors; two banks hold every training image's. An image's own embedding in the other network's
    bank is the right one, those of images of other classes are not (drawn with replacement). exp(cos / tau) is divided by Z, set by the first batch.
    beta: weight of the contrast
    dimensions (at least 1): of the embeddings
    negatives (at least 1): K, images to tell the right one from
    tau (above 0): temperature of the similarities
    momentum (0 to 1): share of an embedding that its bank keeps at each visit
    """

    needs_features, needs_index = True, True

    def __init__(self, student, teacher, labels, *, beta=0.8, dimensions=128, negatives=16384, tau=0.07, momentum=0.5):
        super().__init__()
        self.beta, self.negatives, self.tau, self.momentum = beta, negatives, tau, momentum
        self.embed = nn.ModuleList(nn.Linear(network.pooled.shape[1], dimensions) for network in (student, teacher))
        bound = (3 / dimensions) ** 0.5  # rows of length 1 on average
        self.register_buffer("banks", torch.empty(2, len(labels), dimensions).uniform_(-bound, bound))  # the student's, the teacher's
        self.register_buffer("scales", torch.zeros(2))  # Z; 0 before the first batch
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)  # each class's images stand together
        self.register_buffer("sizes", labels.bincount(), persistent=False)

    def others(self, labels):
        """int64 (B, K): images of other classes than `labels` (B,)."""
        size, start = self.sizes[labels][:, None], (self.sizes.cumsum(0) - self.sizes)[labels][:, None]
        drawn = torch.randint(2**62, (len(labels), self.negatives), device=labels.device) % (len(self.by_class) - size)
        return self.by_class[drawn + size * (drawn >= start)]

    def forward(self, student, teacher, labels, index):
        ours = [F.normalize(embed(features.pooled.float())) for embed, features in zip(self.embed, (student, teacher), strict=True)]
        asked = torch.cat([index[:, None], self.others(labels)], dim=1)  # (B, 1 + K), the right one first
        banks = self.banks.flip(0)  # a copy: the backward pass still needs what they are now
        scores = [((vectors @ bank.T).gather(1, asked) / self.tau).exp() for vectors, bank in zip(ours, banks, strict=True)]
        images, vectors = len(self.by_class), torch.stack(ours).detach()
        first = torch.stack([each.detach().mean() * images for each in scores])
        self.scales.copy_(torch.where(self.scales > 0, self.scales, first))
        crd = sum(contrast(each / scale, images) for each, scale in zip(scores, self.scales.clone(), strict=True))
        self.banks.index_copy_(1, index, F.normalize(self.banks[:, index].lerp(vectors, 1 - self.momentum), dim=2))
        return total(student, labels, crd=(self.beta, crd))


class DKD(nn.Module):
    """L = CE + w (alpha target-class KL + beta other-classes KL), both times T^2: decoupled KD, Zhao et al., CVPR 2022, eq. 7.

    w grows linearly from 1 / warmup in the first epoch to 1.
    alpha: weight of the label's class against the others
    beta: weight of the other classes; 2 for ResNet56 > 20 and 110 > 32, 8 for teachers that are surer
    temperature (above 0): T, which softens both distributions
    warmup: epochs until the weight is whole; 0 for none
    """

    needs_features = False
    epoch = 0

    def __init__(self, *, alpha=1.0, beta=2.0, temperature=4.0, warmup=20):
        super().__init__()
        self.alpha, self.beta, self.temperature, self.warmup = alpha, beta, temperature, warmup

    def forward(self, student, teacher, labels):
        target, others = decoupled_kl(student.logits, teacher.logits, labels, self.temperature)
        grown = min(1.0, (self.epoch + 1) / max(1, self.warmup))
        return total(student, labels, target=(grown * self.alpha, target), others=(grown * self.beta, others))


class LSKD(nn.Module):
    """L = ce_weight CE + weight T^2 KL(Z(teacher) || Z(student)), Z standardised logits: Sun et al., CVPR 2024, on KD.

    temperature (above 0): T, which softens both distributions
    weight: of the divergence
    ce_weight: of cross-entropy with the labels
    """

    needs_features = False

    def __init__(self, *, temperature=2.0, weight=9.0, ce_weight=0.1):
        super().__init__()
        self.temperature, self.weight, self.ce_weight = temperature, weight, ce_weight

    def forward(self, student, teacher, labels):
        kd = distillation_kl(standardised(student.logits), standardised(teacher.logits), self.temperature)
        return total(student, labels, self.ce_weight, kd=(self.weight, kd))


METHODS = {
    "base": CrossEntropy,
    "kd": KD,
    "logit": Logit,
    "st": ST,
    "at": AT,
    "at_st": ATST,
    "fsp": FSP,
    "fitnet": FitNet,
    "sp": SP,
    "rkd": RKD,
    "pkt": PKT,
    "crd": CRD,
    "dkd": DKD,
    "lskd": LSKD,
}


# ---------------------------------------------------------------------------------------- out of their names
def find(name):
    """A method's class: a row of METHODS, or the class of a user's `file.py:Class`."""
    if name in METHODS:
        return METHODS[name]
    return names.imported(name)


def build(name, options, student, teacher, labels):
    """The method `name` for two networks, given as Features of two images (without gradients), and a training split's labels (N,).

    `options` are spelled as users do: `lambda`, a word of Python's, is `lambda_` in a constructor. What goes wrong, also in a user's
    own method while it trains, is a UserError; a first call of that is made here.
    """
    method_class = find(name)
    asked = inspect.signature(method_class).parameters
    given = {key: value for key, value in {"student": student, "teacher": teacher, "labels": labels}.items() if key in asked}
    with _told_in_one_line(name):
        method = method_class(**given, **{"lambda_" if key == "lambda" else key: value for key, value in options.items()})
        if name not in METHODS:
            _try(copy.deepcopy(method), student, teacher, labels)
            method.forward = _told_in_one_line(name)(method.forward)
    return method


def _try(method, student, teacher, labels):
    """One call of a user's method, where a fault of it is still told before anything is written."""
    index = torch.arange(len(student.logits), device=labels.device)
    extra = {"index": index} if getattr(method, "needs_index", False) else {}
    with torch.random.fork_rng(devices=[]):
        parts = method.to(labels.device)(student, teacher, labels[index], **extra)
    if not isinstance(parts, dict) or "loss" not in parts:
        raise TypeError("it returns no dict with 'loss'")
    if odd := [key for key, part in parts.items() if not isinstance(part, torch.Tensor) or part.dim()]:
        raise TypeError(f"what it returns as '{odd[0]}' is no single number (a tensor without dimensions)")


@contextlib.contextmanager
def _told_in_one_line(name):
    """An exception in a method's own code, as a UserError; of a user's file, with the line that raised it."""
    try:
        yield
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({type(error).__name__}, {Path(place.filename).name} line {place.lineno})" if name not in METHODS else ""
        raise UserError(f"--method {name}: {error}{where}") from None
