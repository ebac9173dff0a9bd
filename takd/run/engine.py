"""One epoch of steps, one evaluation. No files, no arguments, no prints: it calls the objects that it is given.

Legend: B batch, C classes, N images of a split.
"""

import time

import torch
from torch.nn import functional as F

import data_loader


class Diverged(RuntimeError):
    """The loss of a step is no longer a finite number."""


def autocast(device, precision):
    """bf16 arithmetic where asked for; weights, optimizer and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class EpochSums:
    """What an epoch's record is made of. Each step's values stay on the device until the epoch is over."""

    def __init__(self, parts=(), rows=(), images=(), seconds=0.0):
        self.parts = list(parts)  # names of the method's parts, "loss" first
        self.rows = list(rows)  # per step: (parts + 1,) float32, the parts and the number of right answers
        self.images = list(images)  # per step
        self.seconds = seconds  # of the training part alone, by the wall clock
        self._united = len(self.rows)  # rows that are the whole step's and no longer this process's part of it

    def add(self, parts, row, images):
        """One step's: the names of the parts and what `row_of` makes of them."""
        self.parts = list(parts)
        self.rows.append(row)
        self.images.append(images)

    def unite(self, total):
        """Make whole steps of the processes' parts; `total(tensor)` gives the sum of their tensors."""
        if len(self.rows) > self._united:
            self.rows[self._united :] = total(torch.stack(self.rows[self._united :])).unbind()
            self._united = len(self.rows)

    def state(self):
        """The constructor's arguments, for a checkpoint taken inside the epoch."""
        return {"parts": self.parts, "rows": self.rows, "images": self.images, "seconds": self.seconds}

    def summary(self):
        """Means over the epoch's images. Raises Diverged, naming the step, where a part is not finite."""
        rows = torch.stack(self.rows).double().cpu()  # (steps, parts + 1)
        if not rows.isfinite().all():
            step = int((~rows.isfinite().all(dim=1)).nonzero()[0])
            raise Diverged(f"step {step}: " + ", ".join(f"{n} {v:g}" for n, v in zip(self.parts, rows[step], strict=False)))
        images = torch.tensor(self.images, dtype=torch.float64)
        means = (rows[:, :-1] * images[:, None]).sum(0) / images.sum()
        return {
            **{f"train_{name}": value for name, value in zip(self.parts, means.tolist(), strict=True)},
            "train_accuracy_percent": 100 * float(rows[:, -1].sum() / images.sum()),
            "train_images_per_second": float(images.sum()) / self.seconds,
            "train_seconds": self.seconds,
        }


def row_of(parts, logits, labels, part=None):
    """A step's row for EpochSums; with a data_loader.Part, this process's contribution to it, until `unite`."""
    correct = (logits.detach().argmax(1) == labels).sum()
    values = [value.detach().float() for value in (*parts.values(), correct)]
    if part:
        values = [*(value * part.share for value in values[:-1]), values[-1] * (part.share * part.images / len(labels))]
    return torch.stack(values)


def input_dtype(precision):
    """What images are normalised to: what the first convolution takes, so that autocast has nothing to convert."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def train_epoch(student, method, teacher, optimizer, split, batches, sums, precision, after_step=lambda: False, graph=None):
    """Train `student` on `batches`, adding to `sums`; ends early where `after_step()` is true.

    `teacher(batch, images)` gives the teacher's outputs; None for ordinary training. A method that says `needs_index` is told which
    rows of the split a batch holds. With `graph`, a graphs.StepGraph, batches are data_loader.Draws, and gathering and augmenting
    their images is part of the step that it records. Nothing here waits for the device until the last step is done.
    """
    student.train()
    device = split.device
    indexed = getattr(method, "needs_index", False)

    def step(batch):
        images = data_loader.normalise(batch.images, split.mean, split.std, split.image_size, input_dtype(precision))
        taught = teacher and teacher(batch, images)
        with autocast(device, precision):
            outputs = student.forward_features(images)
        parts = method(outputs, taught, batch.labels, **({"index": batch.index} if indexed else {}))
        loss = parts["loss"] * batch.part.weight if batch.part else parts["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return list(parts), row_of(parts, outputs.logits, batch.labels, batch.part)

    def recorded(draw):
        # What a record holds as constants: the rates, and the epoch for a method that looks at it.
        rates = [group["lr"] for group in optimizer.param_groups]
        key = rates, method.epoch if hasattr(type(method), "epoch") else None
        return graph(lambda index, views: step(draw.made(index, views)), draw.index, draw.views, key)

    started = time.perf_counter()
    for batch in batches:
        parts, row = recorded(batch) if graph else step(batch)
        sums.add(parts, row, batch.part.images if batch.part else len(batch.index))
        if after_step():
            break
    if device.type == "cuda":
        torch.cuda.synchronize()
    sums.seconds += time.perf_counter() - started


@torch.inference_mode()
def predict(network, split, mean=None, std=None, precision="fp32", batch_size=500, image_size=None):
    """float32 (N, C): the logits of a whole split in its order, the network in evaluation mode.

    `mean`, `std` and `image_size` are the network's own where they differ from the split's.
    """
    network.eval()
    logits, size = [], image_size or split.image_size
    # Larger images in smaller batches: a batch's activations grow with its pixels.
    for images, _ in data_loader.evaluation_batches(split, max(1, batch_size * 64**2 // max(64, size) ** 2)):
        with autocast(images.device, precision):
            logits.append(network(data_loader.normalise(images, mean or split.mean, std or split.std, size)).float())
    return torch.cat(logits)


def score(logits, labels):
    """Accuracy and cross-entropy of logits (N, C) against labels (N,), of all N."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {
        "images": len(labels),
        "loss": float(F.cross_entropy(logits, labels)),
        "accuracy_percent": 100 * float(top[:, 0].double().mean()),
        "top5_percent": 100 * float(top.any(dim=1).double().mean()),
    }


def agreement(logits, teacher_logits):
    """How near a network is to its teacher on the same images, both float32 (N, C): how often their answers are the same class, and
    KL(teacher || network) of their softmax distributions at temperature 1, in nats, the mean over the images.
    """
    same = logits.argmax(1) == teacher_logits.argmax(1)
    network, teacher = (F.log_softmax(each.double(), dim=1) for each in (logits, teacher_logits))
    divergence = F.kl_div(network, teacher, reduction="batchmean", log_target=True)
    return {"agreement_percent": 100 * float(same.double().mean()), "kl_nats": float(divergence)}


def chance_percent(labels):
    """What guessing the commonest class reaches on these labels, and four standard errors more: below it nothing was learned."""
    share = float(torch.bincount(labels).max()) / len(labels)
    return 100 * (share + 4 * (share * (1 - share) / len(labels)) ** 0.5)
