"""METHODS, name -> the class of a distillation method. A new one is a class and a row here, and a row of options in
takd/config/methods.py; or a file of the user's own (docs/adding_a_method.md).

A method is an nn.Module built once for a student and a teacher. `method(student, teacher, labels)` gets the Features of
a batch (of the teacher only `.logits` where `needs_features` is false, so that a table of logits can stand in for it)
and returns a dict with `loss` and its named parts. Its options are keyword-only arguments, without defaults: the table
has them.

A constructor may also take, by name: `student` and `teacher`, Features of two images, for the sizes of its parameters;
and `labels`, int64 (N,), the training split's. A class may set: `needs_stages = True`, to be refused where a network
has none; `needs_index = True`, to be called with `index=`, int64 (B,), rows of the training split; `one_process =
True`, if its loss is not a mean over images, so that processes cannot share a batch; `epoch = 0`, which is then set to
the current epoch, counted from 0. Buffers must change in place: on a GPU a step is captured once and replayed.

Several teachers come as one: their Logits, (K, B, C), to methods that take them (takd/config/methods.py); a class of
the user's takes them if it sets `several_teachers = True` itself.

Stages of two networks are paired from their ends, the last with the last: a ResNet has a stem and three stages, a plain
CNN two to four. Legend: B batch, C classes, K teachers, N training images. Losses are float32 whatever precision the
networks run in.
"""

import contextlib
import copy
import inspect
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from takd.distill import losses
from takd.errors import UserError
from takd.files import import_class


class Features(NamedTuple):
    """What a method may use of a network: stage outputs from the stem on, the pooled vector, the logits."""

    stages: tuple[Tensor, ...]  # of (B, channels, h, w)
    pooled: Tensor  # (B, features), the classifier's input
    logits: Tensor  # (B, C)


class Logits(NamedTuple):
    """A teacher's output where only logits are needed, or that of several."""

    logits: Tensor  # float32 (B, C); of several teachers (K, B, C)


Parts = dict[str, Tensor]


def total(
    student: Features,
    labels: Tensor,
    ce_weight: float = 1.0,
    label_smoothing: float = 0.0,
    **terms: tuple[float | Tensor, Tensor],
) -> Parts:
    """What a method returns: `loss`, ce_weight times cross-entropy plus every weight times its term, `ce`, and the
    terms by name.

    terms: name=(weight, value).
    """
    ce = F.cross_entropy(student.logits.float(), labels, label_smoothing=label_smoothing)
    loss = ce_weight * ce + sum(weight * value for weight, value in terms.values())
    return {"loss": loss, "ce": ce} | {name: value for name, (_, value) in terms.items()}


class Method(nn.Module):
    """What the classes below share: cross-entropy with smoothed labels."""

    label_smoothing = 0.0  # a run sets its own

    def total(self, student: Features, labels: Tensor, ce_weight: float = 1.0, **terms: Any) -> Parts:
        return total(student, labels, ce_weight, self.label_smoothing, **terms)


class CrossEntropy(Method):
    """L = CE: ordinary training with the labels, the paper's NOKD; a teacher, if there is one, is not used."""

    needs_features = False

    def forward(self, student: Features, teacher: Features | None, labels: Tensor) -> Parts:
        ce = F.cross_entropy(student.logits.float(), labels, label_smoothing=self.label_smoothing)
        return {"loss": ce}


class KD(Method):
    """L = (1 - lambda) CE + lambda T^2 KL(teacher || student): eq. 3 of Mirzadeh et al., AAAI 2020.

    Of several teachers, from the mean of their softened distributions.
    """

    needs_features = False

    def __init__(self, *, temperature: float, lambda_: float, reduction: str) -> None:
        super().__init__()
        self.temperature, self.lambda_, self.reduction = temperature, lambda_, reduction

    def divergence(self, student: Features, teacher: Features | Logits) -> Tensor:
        return losses.distillation_kl(student.logits, teacher.logits, self.temperature, self.reduction)

    def forward(self, student: Features, teacher: Features | Logits, labels: Tensor) -> Parts:
        return self.total(student, labels, 1 - self.lambda_, kd=(self.lambda_, self.divergence(student, teacher)))


class DGKD(KD):
    """L = (1 - lambda) CE + lambda mean over teachers of T^2 KL(teacher || student): Son et al., ICCV 2021.

    `drop`: each term is left out of a step with this probability, and the mean is that of the others. One always stays,
    so the probability is at most 1 - 1/K.
    """

    def __init__(
        self, teacher: Features | Logits, *, temperature: float, lambda_: float, reduction: str, drop: float
    ) -> None:
        super().__init__(temperature=temperature, lambda_=lambda_, reduction=reduction)
        several = teacher.logits.dim() == 3
        self.threshold = losses.drop_threshold(drop, len(teacher.logits)) if several else 0.0

    def divergence(self, student: Features, teacher: Features | Logits) -> Tensor:
        if teacher.logits.dim() == 2:
            return super().divergence(student, teacher)
        terms = losses.guidance_kl(student.logits, teacher.logits, self.temperature, self.reduction)
        if not self.threshold:
            return terms.mean()
        drawn = torch.rand(len(terms), device=terms.device)
        kept = drawn >= drawn.amax().clamp_max(self.threshold)  # the largest where all are below the threshold
        return (terms * kept).sum() / kept.sum()


class Logit(Method):
    """L = ce_weight CE + weight MSE(logits): Ba and Caruana, NIPS 2014."""

    needs_features = False

    def __init__(self, *, weight: float, ce_weight: float) -> None:
        super().__init__()
        self.weight, self.ce_weight = weight, ce_weight

    def forward(self, student: Features, teacher: Features | Logits, labels: Tensor) -> Parts:
        theirs = teacher.logits.float()
        difference = F.mse_loss(student.logits.float(), theirs if theirs.dim() == 2 else theirs.mean(0))
        return self.total(student, labels, self.ce_weight, logit=(self.weight, difference))


class ST(Method):
    """L = CE + alpha T^2 KL(teacher || student): soft targets, Hinton et al., 2015."""

    needs_features = False

    def __init__(self, *, temperature: float, alpha: float) -> None:
        super().__init__()
        self.temperature, self.alpha = temperature, alpha

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Parts:
        st = losses.distillation_kl(student.logits, teacher.logits, self.temperature)
        return self.total(student, labels, st=(self.alpha, st))


class AT(Method):
    """L = CE + beta sum over stages of MSE(attention maps): attention transfer, Zagoruyko and Komodakis, ICLR 2017.

    Over the last three stages, or as many as both have; the larger of two maps is average-pooled.
    """

    needs_features, needs_stages = True, True

    def __init__(self, *, beta: float) -> None:
        super().__init__()
        self.beta = beta

    @staticmethod
    def distance(student: Features, teacher: Features) -> Tensor:
        pairs = list(zip(reversed(student.stages), reversed(teacher.stages), strict=False))[:3]
        first, *others = (losses.attention_distance(*pair) for pair in pairs)
        return sum(others, first)

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Parts:
        return self.total(student, labels, at=(self.beta, self.distance(student, teacher)))


class ATST(Method):
    """L = CE + beta sum over stages of MSE(attention maps) + alpha T^2 KL(teacher || student): AT and ST together."""

    needs_features, needs_stages = True, True

    def __init__(self, *, beta: float, alpha: float, temperature: float) -> None:
        super().__init__()
        self.beta, self.alpha, self.temperature = beta, alpha, temperature

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Parts:
        st = losses.distillation_kl(student.logits, teacher.logits, self.temperature)
        return self.total(student, labels, at=(self.beta, AT.distance(student, teacher)), st=(self.alpha, st))


class FSP(Method):
    """L = CE + beta mean over neighbouring stages of MSE(G), G = F1 F2^T / (h w): flow between stages, Yim et al., CVPR
    2017.

    Trained in one stage, jointly with CE. G is channels x channels, so paired stages need equal numbers of channels.
    """

    needs_features, needs_stages = True, True

    def __init__(self, student: Features, teacher: Features, *, beta: float) -> None:
        super().__init__()
        self.beta, self.count = beta, min(len(student.stages), len(teacher.stages))
        ours, theirs = ([stage.shape[1] for stage in network.stages[-self.count :]] for network in (student, teacher))
        if ours != theirs or self.count < 2:
            why = f"the stages have {ours} channels in the student, {theirs} in the teacher"
            fix = "every other method works for these two"
            raise ValueError(f"it compares matrices of channels x channels, and {why}; {fix}")

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Parts:
        ours, theirs = (network.stages[-self.count :] for network in (student, teacher))
        pairs = range(self.count - 1)
        flows = [(losses.flow(ours[i], ours[i + 1]), losses.flow(theirs[i], theirs[i + 1])) for i in pairs]
        first, *others = (F.mse_loss(*pair) for pair in flows)
        return self.total(student, labels, fsp=(self.beta, sum(others, first) / len(pairs)))


class FitNet(Method):
    """L = CE + beta MSE(r(F_s), F_t) of one stage: hints, Romero et al., ICLR 2015, in one stage as in Tian et al.,
    ICLR 2020.

    r, a learned 1x1 convolution with batch norm and ReLU, gives the student's stage the teacher's channels; the larger
    map of the two is average-pooled.
    """

    needs_features, needs_stages = True, True

    def __init__(self, student: Features, teacher: Features, *, beta: float, hint: int) -> None:
        super().__init__()
        if hint > (stages := min(len(student.stages), len(teacher.stages))):
            raise ValueError(f"hint {hint} counts stages from the end, and these networks have {stages} in common")
        self.beta, self.hint = beta, hint
        ours, theirs = (network.stages[-hint].shape[1] for network in (student, teacher))
        self.regressor = nn.Sequential(nn.Conv2d(ours, theirs, 1), nn.BatchNorm2d(theirs), nn.ReLU())

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Parts:
        regressed = self.regressor(student.stages[-self.hint].float())
        ours, theirs = losses.same_size(regressed, teacher.stages[-self.hint])
        return self.total(student, labels, fitnet=(self.beta, F.mse_loss(ours, theirs)))


class SP(Method):
    """L = CE + beta MSE(similarities of the batch's images) at the last stage: Tung and Mori, ICCV 2019."""

    needs_features, needs_stages, one_process = True, True, True

    def __init__(self, *, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Parts:
        return self.total(
            student, labels, sp=(self.beta, losses.similarity_distance(student.stages[-1], teacher.stages[-1]))
        )


class RKD(Method):
    """L = CE + beta (distance D + angle A), Huber losses of the relations in a batch: relational KD, Park et al., CVPR
    2019.

    On the pooled vectors. The angles are B^3 numbers: 8 MB for a batch of 128.
    """

    needs_features, one_process = True, True

    def __init__(self, *, beta: float, distance: float, angle: float) -> None:
        super().__init__()
        self.beta, self.distance, self.angle = beta, distance, angle

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Parts:
        ours, theirs = losses.relations(student.pooled), losses.relations(teacher.pooled)
        distance, angle = (F.smooth_l1_loss(*pair) for pair in zip(ours, theirs, strict=True))
        return self.total(
            student, labels, distance=(self.beta * self.distance, distance), angle=(self.beta * self.angle, angle)
        )


class PKT(Method):
    """L = CE + beta KL(image similarities as probabilities), of pooled vectors: Passalis and Tefas, ECCV 2018."""

    needs_features, one_process = True, True

    def __init__(self, *, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Parts:
        return self.total(student, labels, pkt=(self.beta, losses.probability_distance(student.pooled, teacher.pooled)))


class CRD(Method):
    """L = CE + beta (NCE of the student + NCE of the teacher): contrastive representation distillation, Tian et al.,
    ICLR 2020.

    Learned embeddings of both pooled vectors; two memory banks hold those of every training image. An image's embedding
    in the other network's bank is the positive, those of images of other classes are the negatives (drawn with
    replacement). exp(cos / tau) is divided by Z, set by the first batch.
    """

    needs_features, needs_index = True, True
    banks: Tensor  # (2, N, dimensions), the student's and the teacher's
    scales: Tensor  # (2,), Z; 0 before the first batch
    by_class: Tensor  # (N,), rows grouped by class
    sizes: Tensor  # (C,)

    def __init__(
        self,
        student: Features,
        teacher: Features,
        labels: Tensor,
        *,
        beta: float,
        dimensions: int,
        negatives: int,
        tau: float,
        momentum: float,
    ) -> None:
        super().__init__()
        self.beta, self.negatives, self.tau, self.momentum = beta, negatives, tau, momentum
        pooled = (network.pooled.shape[1] for network in (student, teacher))
        self.embed: Any = nn.ModuleList(nn.Linear(size, dimensions) for size in pooled)
        bound = (3 / dimensions) ** 0.5  # rows of length 1 on average
        self.register_buffer("banks", torch.empty(2, len(labels), dimensions).uniform_(-bound, bound))
        self.register_buffer("scales", torch.zeros(2))
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("sizes", labels.bincount(), persistent=False)

    def others(self, labels: Tensor) -> Tensor:
        """int64 (B, K): images of other classes than `labels` (B,)."""
        size, start = self.sizes[labels][:, None], (self.sizes.cumsum(0) - self.sizes)[labels][:, None]
        drawn = torch.randint(2**62, (len(labels), self.negatives), device=labels.device) % (len(self.by_class) - size)
        return self.by_class[drawn + size * (drawn >= start)]

    def forward(self, student: Features, teacher: Features, labels: Tensor, index: Tensor) -> Parts:
        ours = [F.normalize(self.embed[i](each.pooled.float())) for i, each in enumerate((student, teacher))]
        chosen = torch.cat([index[:, None], self.others(labels)], dim=1)  # (B, 1 + K), the positive first
        banks = self.banks.flip(0)  # a copy: the backward pass still needs what they are now
        scores = [((ours[i] @ banks[i].T).gather(1, chosen) / self.tau).exp() for i in (0, 1)]
        images, vectors = len(self.by_class), torch.stack(ours).detach()
        first = torch.stack([each.detach().mean() * images for each in scores])
        self.scales.copy_(torch.where(self.scales > 0, self.scales, first))
        of_student, of_teacher = (score / scale for score, scale in zip(scores, self.scales.clone(), strict=True))
        crd = losses.contrastive_nce(of_student, images) + losses.contrastive_nce(of_teacher, images)
        self.banks.index_copy_(1, index, F.normalize(self.banks[:, index].lerp(vectors, 1 - self.momentum), dim=2))
        return self.total(student, labels, crd=(self.beta, crd))


class DKD(Method):
    """L = CE + w (alpha target-class KL + beta other-classes KL), both times T^2: decoupled KD, Zhao et al., CVPR 2022,
    eq. 7.

    w grows linearly from 1 / warmup in the first epoch to 1.
    """

    needs_features = False
    weights: Tensor  # (2,), of both terms in this epoch; a CUDA graph would keep numbers as they were captured

    def __init__(self, *, alpha: float, beta: float, temperature: float, warmup: int) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature, self.warmup = alpha, beta, temperature, warmup
        self.register_buffer("weights", torch.zeros(2), persistent=False)
        self.epoch = 0

    def _start_epoch(self, epoch: int) -> None:
        w = min(1.0, (epoch + 1) / max(1, self.warmup))
        self.weights.copy_(torch.tensor([w * self.alpha, w * self.beta]))

    epoch = property(fset=_start_epoch)

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Parts:
        target, others = losses.decoupled_kl(student.logits, teacher.logits, labels, self.temperature)
        return self.total(student, labels, target=(self.weights[0], target), others=(self.weights[1], others))


class LSKD(Method):
    """L = ce_weight CE + weight T^2 KL(Z(teacher) || Z(student)), Z standardised: Sun et al., CVPR 2024, on KD."""

    needs_features = False

    def __init__(self, *, temperature: float, weight: float, ce_weight: float) -> None:
        super().__init__()
        self.temperature, self.weight, self.ce_weight = temperature, weight, ce_weight

    def forward(self, student: Features, teacher: Features, labels: Tensor) -> Parts:
        pair = losses.standardised(student.logits), losses.standardised(teacher.logits)
        return self.total(
            student, labels, self.ce_weight, kd=(self.weight, losses.distillation_kl(*pair, self.temperature))
        )


METHODS: dict[str, type[nn.Module]] = {
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
    "dgkd": DGKD,
}


# ----------------------------------------------------------------------------------------------- by name
def find(name: str) -> Any:
    """A method's class: a row of METHODS, or the class of a user's FILE.py:CLASS."""
    return METHODS[name] if name in METHODS else import_class(name)


def build(
    name: str, options: Mapping[str, Any], student: Features, teacher: Features | Logits, labels: Tensor
) -> nn.Module:
    """The method `name` for two networks, given as Features of two images (without gradients), and a training split's
    labels (N,).

    `options` are all of the method's, spelled as on the command line: `lambda`, a Python keyword, is `lambda_` in a
    constructor. Errors are UserErrors, also later in a user's own method while it trains; that is called once here.
    """
    method_class = find(name)
    parameters = inspect.signature(method_class).parameters
    given = {
        key: value
        for key, value in {"student": student, "teacher": teacher, "labels": labels}.items()
        if key in parameters
    }
    with _as_user_error(name):
        for whose, features in (("student", student), ("teacher", teacher)):
            if getattr(method_class, "needs_stages", False) and not getattr(features, "stages", ()):
                others = "kd dkd lskd compare logits, rkd pkt crd pooled vectors"
                raise ValueError(
                    f"it compares square feature maps, and the {whose} (a transformer?) has none; {others}"
                )
        method = method_class(
            **given, **{"lambda_" if key == "lambda" else key: value for key, value in options.items()}
        )
        if name not in METHODS:
            _try(copy.deepcopy(method), student, teacher, labels)
            method.forward = _as_user_error(name)(method.forward)
    return method


def _try(method: nn.Module, student: Features, teacher: Features | Logits, labels: Tensor) -> None:
    """One call of a user's method, before anything is written, so that its errors appear."""
    index = torch.arange(len(student.logits), device=labels.device)
    extra = {"index": index} if getattr(method, "needs_index", False) else {}
    with torch.random.fork_rng(devices=[]):
        parts = method.to(labels.device)(student, teacher, labels[index], **extra)
    if not isinstance(parts, dict) or "loss" not in parts:
        raise TypeError("it must return a dict with 'loss'")
    if odd := [key for key, part in parts.items() if not isinstance(part, Tensor) or part.dim()]:
        raise TypeError(f"what it returns as '{odd[0]}' must be a scalar tensor")


@contextlib.contextmanager
def _as_user_error(name: str) -> Iterator[None]:
    """An exception in a method's own code as a UserError; of a user's file, with the line that raised it."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:  # not the method's alone
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = (
            f" ({type(error).__name__}, {Path(place.filename).name} line {place.lineno})" if name not in METHODS else ""
        )
        raise UserError(f"--method {name}: {error}{where}") from None
