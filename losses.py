"""Distillation: pure kernels, and METHODS, name -> a method object that combines them.

A method is an nn.Module built once for a student; `method(student, teacher, labels)` gets two model_factory.Features (only
`.logits` where `needs_features` is false, so that a table of logits can stand in for the teacher) and returns a dict with `loss`
and its named parts. Its options are the keyword arguments of its constructor: they are the schema of `--method-option`, of error
messages and of reports. A new method is a class here and a row in METHODS.

Legend: B batch, C classes. Losses are float32 whatever precision the networks run in.
"""

from torch import nn
from torch.nn import functional as F


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


class CrossEntropy(nn.Module):
    """Ordinary training: cross-entropy with the labels (eq. 1), what the paper's tables call NOKD."""

    needs_features = False

    def forward(self, student, teacher, labels):
        return {"loss": F.cross_entropy(student.logits.float(), labels)}


class KD(nn.Module):
    """L = (1 - lambda) H(softmax(a_s), y) + lambda T^2 KL(y_t || y_s): eq. 3 of Mirzadeh et al., AAAI 2020."""

    needs_features = False

    def __init__(self, *, temperature=4.0, lambda_=0.5, reduction="batchmean"):
        super().__init__()
        self.temperature, self.lambda_, self.reduction = temperature, lambda_, reduction

    def forward(self, student, teacher, labels):
        ce = F.cross_entropy(student.logits.float(), labels)
        kd = distillation_kl(student.logits, teacher.logits, self.temperature, self.reduction)
        return {"loss": (1 - self.lambda_) * ce + self.lambda_ * kd, "ce": ce, "kd": kd}


METHODS = {
    "kd": KD,
}
