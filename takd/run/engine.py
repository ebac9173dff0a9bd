"""One optimisation step, and the sums of an epoch. Legend: B batch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from takd.distill.evaluation import autocast, input_dtype, tf32
from takd.distill.methods import CrossEntropy
from takd.distill.teacher import Teacher, Teachers
from takd.images.split import Batch, Split
from takd.run.distributed import Part, World


class Diverged(RuntimeError):
    """The loss of a step is no longer a finite number."""


class TrainStep:
    """step(batch, part) -> (names, row): one update of the student on a batch, or on this process's part of it.

    row: float32 (parts + 1,), the method's parts in the order of `names`, "loss" first, and the number of correct
    predictions. It stays on the device: nothing here waits for a GPU.
    """

    def __init__(
        self,
        student: Any,
        method: Any,
        teacher: Teacher | Teachers | None,
        optimizer: Any,
        split: Split,
        precision: str,
    ):
        self.student, self.method, self.teacher, self.optimizer = student, method, teacher, optimizer
        self.active_teacher = None if isinstance(method, CrossEntropy) else teacher
        self.split, self.precision = split, precision
        self.ddp_student, self.ddp_method = student, method

    def distribute(self, world: World) -> None:
        """Average gradients over the processes, and batch norm over all their images, from now on."""
        self.ddp_student, self.ddp_method = world.wrap(self.student, self.method)

    def __call__(self, batch: Batch, part: Part) -> tuple[list[str], torch.Tensor]:
        with tf32(self.precision == "tf32"):  # the gradients too
            return self._update(batch, part)

    def _update(self, batch, part):
        images = self.split.transform(batch.images, input_dtype(self.precision))
        teacher_output = self.active_teacher and self.active_teacher(batch, images)
        with autocast(self.split.device, self.precision):
            outputs = self.ddp_student.forward_features(images)
        extra = {"index": batch.index} if getattr(self.method, "needs_index", False) else {}
        parts = self.ddp_method(outputs, teacher_output, batch.labels, **extra)
        loss = parts["loss"] * part.weight if part.weight != 1 else parts["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return list(parts), step_row(parts, outputs.logits, batch.labels, part)


def step_row(parts: Mapping[str, torch.Tensor], logits: torch.Tensor, labels: torch.Tensor, part: Part) -> torch.Tensor:
    """A step's row for EpochSums; with several processes, this one's contribution to it until `all_reduce`."""
    correct = (logits.detach().argmax(1) == labels).sum()
    values = [value.detach().float() for value in (*parts.values(), correct)]
    if part.share != 1:
        values = [*(value * part.share for value in values[:-1]), values[-1] * (part.share * part.images / len(labels))]
    return torch.stack(values)


class EpochSums:
    """The values that an epoch's record is computed from. Each step's stay on the device until the epoch is over."""

    def __init__(self, parts: Any = (), rows: Any = (), images: Any = (), seconds: float = 0.0):
        self.parts = list(parts)  # names of the method's parts, "loss" first
        self.rows = list(rows)  # one of each step
        self.images = list(images)  # of each step
        self.seconds = seconds  # of the training part alone, by the wall clock
        self._reduced = len(self.rows)  # rows of the whole step, not only of this process's part of it

    def add(self, parts: list[str], row: torch.Tensor, images: int) -> None:
        self.parts = parts
        self.rows.append(row)
        self.images.append(images)

    def all_reduce(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Combine the processes' parts into whole steps; `total(tensor)` returns the sum of their tensors."""
        if len(self.rows) > self._reduced:
            self.rows[self._reduced :] = total(torch.stack(self.rows[self._reduced :])).unbind()
            self._reduced = len(self.rows)

    def state(self) -> dict[str, Any]:
        """The constructor's arguments, for a checkpoint taken inside the epoch."""
        return {"parts": self.parts, "rows": self.rows, "images": self.images, "seconds": self.seconds}

    def summary(self) -> dict[str, float]:
        """Means over the epoch's images. Raises Diverged, naming the step, where a part is not finite."""
        rows = torch.stack(self.rows).double().cpu()  # (steps, parts + 1)
        if not rows.isfinite().all():
            step = int((~rows.isfinite().all(dim=1)).nonzero()[0])
            values = ", ".join(f"{name} {value:g}" for name, value in zip(self.parts, rows[step], strict=False))
            raise Diverged(f"step {step}: {values}")
        images = torch.tensor(self.images, dtype=torch.float64)
        means = (rows[:, :-1] * images[:, None]).sum(0) / images.sum()
        return {
            **{f"train_{name}": value for name, value in zip(self.parts, means.tolist(), strict=True)},
            "train_accuracy_percent": 100 * float(rows[:, -1].sum() / images.sum()),
            "train_images_per_second": float(images.sum()) / self.seconds,
            "train_seconds": self.seconds,
        }
