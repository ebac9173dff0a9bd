"""A training step as one CUDA graph: a small network's thousand kernels then cost one launch instead of a thousand.

    step = StepGraph(step, say, batch_size)              step(batch, part) -> what the step returns

PyTorch's own recipe (its notes on CUDA, "CUDA Graphs"): some steps run eagerly, which is ordinary training, then one is
captured and replayed from then on. A captured step must not synchronise with the host, must change its tensors in place
and keep no state elsewhere; one that does otherwise, or whose replay differs from the eager step, goes on eagerly.
"""

import contextlib
import copy
import gc
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from takd.errors import first_line
from takd.images.split import Batch
from takd.run.distributed import Part
from takd.run.engine import TrainStep

WARM_UP = 3  # steps before capture: cuDNN chooses its algorithms, the optimizer makes its buffers
TOLERANCE = 0.1  # between a replayed step and the same step run, as a share of what it changes: rounding is far below


class CaptureError(RuntimeError):
    """A step could not be captured; the device is as it was before."""


class Cuda:
    """What StepGraph needs of PyTorch's CUDA. All steps run on one stream: each has its own pool of memory."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def on_stream(self, function: Callable[[], Any]) -> Any:
        """`function()` on a stream other than the default one, which cannot be captured."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def watched(self, function: Callable[[], Any]) -> tuple[Any, str | None]:
        """(result, 'FILE:LINE' of the first call in it that waits for the GPU, or None)."""
        mode, thread, show = torch.cuda.get_sync_debug_mode(), threading.get_ident(), warnings.showwarning
        waits = []

        def note(message, category, filename, lineno, file=None, line=None):
            if "synchronizing CUDA" not in str(message):
                show(message, category, filename, lineno, file, line)
            elif threading.get_ident() == thread:  # and not that of a table's writer
                waits.append(f"{filename}:{lineno}")

        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = note
                return function(), next(iter(waits), None)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, result): `replay()` does what `function()` does and fills `result`. Nothing is done yet.

        Raises CaptureError. torch.cuda.graph would then leave the allocator and the generator capturing.
        """
        self.release()
        graph, pool, device = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_device()
        generator = torch.cuda.default_generators[device]
        state = generator.clone_state()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # a thread may be writing a table to disk
        failure, result = None, None
        try:
            result = function()
        except Exception as error:  # only its text is kept: its traceback holds the step's tensors
            failure = first_line(error)[:150]
        try:
            graph.capture_end()
        except RuntimeError as error:
            failure = failure or first_line(error)[:150]
        if failure is None:
            return graph.replay, result
        generator.graphsafe_set_state(state)
        for undo in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with contextlib.suppress(AttributeError, RuntimeError):  # capture_end had come that far by itself
                getattr(torch._C, undo)(device, pool)
        raise CaptureError(failure)

    def release(self) -> None:
        """Give unused memory back: a graph's pool cannot use what the steps before it left."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    random_state, set_random_state = staticmethod(torch.cuda.get_rng_state), staticmethod(torch.cuda.set_rng_state)


class StepGraph:
    """The steps of one run on one GPU. Only batches of `batch_size` are captured, not an epoch's shorter last one.

    `say` gets one line if they cannot be captured.
    """

    def __init__(self, step: TrainStep, say: Callable[[str], None], batch_size: int, device: Any = None) -> None:
        self.step, self.say, self.batch_size, self.device = step, say, batch_size, device or Cuda()
        self.modules = [part for module in (step.student, step.method) for part in module.modules()]
        self.possible, self.checked = True, False
        self._forget(None)

    def _forget(self, key: Any) -> None:
        self.key, self.steps = key, 0
        self.replay: Callable[[], None] | None = None
        self.result: Any = None

    def _constants(self) -> Any:
        """What a capture holds as constants: the optimizer's settings, and the numbers that the method keeps."""
        groups: list[dict[str, Any]] = self.step.optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        attributes = [vars(module).items() for module in self.step.method.modules()]
        return settings, [{k: v for k, v in items if isinstance(v, int | float)} for items in attributes]

    def __call__(self, batch: Batch, part: Part) -> tuple[list[str], torch.Tensor]:
        if self.possible:
            return self.device.on_stream(lambda: self._take(batch, part))
        return self.step(batch, part)

    def _take(self, batch: Batch, part: Part) -> tuple[list[str], torch.Tensor]:
        key = self._constants()
        if key != self.key:
            if self.steps == 1:
                return self._eager_from_now_on("the method's numbers change in each step", batch, part)
            self._forget(key)
        if len(batch) != self.batch_size:
            return self.step(batch, part)
        self.steps += 1
        if self.steps < WARM_UP:
            return self.step(batch, part)
        if self.steps == WARM_UP:
            self.inputs = batch.index, batch.views
            result, waits = self.device.watched(lambda: self.step(batch, part))
            if waits:
                self._give_up(f"the step waits for the GPU at {waits}")
            return result
        if self.replay is None:
            if why := self._capture(batch, part):
                return self._eager_from_now_on(why, batch, part)
            if not self.checked:
                return self._check(batch, part)
        return self._replay(batch)

    def _replay(self, batch: Batch) -> tuple[list[str], torch.Tensor]:
        assert self.replay
        for own, given in zip(self.inputs, (batch.index, batch.views), strict=True):
            own.copy_(given)
        self.replay()
        names, row = self.result
        return names, row.clone()

    def _capture(self, batch: Batch, part: Part) -> str | None:
        """Capture the step, without taking it. Returns why that is impossible.

        Its inputs are those of the step before: whether they are copied before a replay is then part of the check.
        """
        index, views = self.inputs
        self.inputs, why = (index.clone(), views.clone()), None
        before = [_attributes(module) for module in self.modules]
        try:
            self.replay, self.result = self.device.capture(
                lambda: self.step(Batch(batch.split, batch.augment, *self.inputs), part)
            )
        except CaptureError as error:
            why = str(error)
        for module, own in zip(self.modules, before, strict=True):
            if name := _first_difference(own, _attributes(module)):
                why = why or f"the step changes or replaces {type(module).__name__}.{name}"
                vars(module).clear()
                vars(module).update(own)
        if why:
            self.step.optimizer.zero_grad(set_to_none=True)  # gradients in the memory of a graph that is not kept
        return why

    def _check(self, batch: Batch, part: Part) -> tuple[list[str], torch.Tensor]:
        """This batch's step run eagerly, then replayed from the same state: the capture stays if both agree."""
        state = self._state()
        before, random = _copies(state), self.device.random_state()
        result = self.step(batch, part)
        eager = _copies(state)
        _put(state, before)
        self.device.set_random_state(random)
        replayed = self._replay(batch)
        self.checked = True
        for kind, tensors in state.items():
            apart, moved = _distance(tensors, eager[kind]), _distance(eager[kind], before[kind])
            if not apart <= TOLERANCE * moved:
                _put(state, eager)
                share = f"{apart / moved:.0%} of what the step changes" if moved else "which the step does not change"
                self._give_up(f"a replayed step's {kind} differ from the same step run eagerly: {share}")
                return result
        return replayed

    def _state(self) -> dict[str, list[torch.Tensor]]:
        """Everything that a step changes. Of each kind by itself: the largest numbers would hide the others."""
        kinds: dict[str, list[Any]] = {
            "parameters": [tensor for module in self.modules for tensor in module._parameters.values()],
            "buffers": [tensor for module in self.modules for tensor in module._buffers.values()],
            "momentum": [value for state in self.step.optimizer.state.values() for value in state.values()],
        }
        return {kind: [each for each in all_ if isinstance(each, torch.Tensor)] for kind, all_ in kinds.items()}

    def _eager_from_now_on(self, why: str, batch: Batch, part: Part) -> tuple[list[str], torch.Tensor]:
        self._give_up(why)
        return self.step(batch, part)

    def _give_up(self, why: str) -> None:
        self._forget(None)
        self.possible = False
        self.device.release()
        self.say(f"note: no CUDA graph, kernels are launched one by one: {why}")


# ------------------------------------------------------------------------------------------- state, compared
Tensors = dict[str, list[torch.Tensor]]
CONTAINERS = list | tuple | dict | set


def _copies(state: Tensors) -> Tensors:
    return {kind: [tensor.clone() for tensor in tensors] for kind, tensors in state.items()}


@torch.no_grad()
def _put(state: Tensors, values: Tensors) -> None:
    for kind, tensors in state.items():
        for tensor, value in zip(tensors, values[kind], strict=True):
            tensor.copy_(value)


@torch.no_grad()
def _distance(these: Sequence[torch.Tensor], those: Sequence[torch.Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(these, those, strict=True)]
    return float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    """A module's attributes, and copies of those that are containers, such as its buffers by name."""
    return {key: copy.copy(value) if isinstance(value, CONTAINERS) else value for key, value in vars(module).items()}


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The name of an attribute, or of a container's item, that is another object or another number now."""
    for name in before | now:
        old: Any = before.get(name)
        new: Any = now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := _first_difference(old, new):
                return str(inner)
        elif isinstance(old, CONTAINERS) and type(old) is type(new):
            if len(old) != len(new) or any(map(_differ, old, new)):
                return str(name)
        elif _differ(old, new):
            return str(name)
    return None


def _differ(old: Any, new: Any) -> bool:
    plain = isinstance(old, int | float | str) and type(old) is type(new)
    return old != new if plain else old is not new
