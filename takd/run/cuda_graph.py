"""A training step as one CUDA graph: a small network's thousand kernels then cost one launch instead of a thousand.

    step = StepGraph(step, say)              step(batch, part) -> what the step returns

PyTorch's own recipe (its notes on CUDA, "CUDA Graphs"): some steps run eagerly, which is ordinary training, then one is
captured and replayed from then on. A captured step must not synchronise with the host and must change its tensors in
place; one that does otherwise, or whose replay differs from the eager step, goes on eagerly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from takd.images.split import Batch
from takd.run.distributed import Part
from takd.run.engine import TrainStep

WARM_UP = 3  # steps before capture: cuDNN chooses its algorithms, the optimizer makes its buffers
TOLERANCE = 0.1  # between a replayed step and the same step run, as a share of what it changes: rounding is far below


class Cuda:
    """What StepGraph needs of PyTorch's CUDA."""

    @staticmethod
    def on_side_stream(function: Callable[[], Any]) -> Any:
        """`function()` on a stream of its own, as it will be captured."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = function()
        current.wait_stream(side)
        return result

    @staticmethod
    def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, result): `replay()` does what `function()` does and fills `result`. Nothing is done yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        return graph.replay, result

    synchronise = staticmethod(torch.cuda.synchronize)
    random_state, set_random_state = staticmethod(torch.cuda.get_rng_state), staticmethod(torch.cuda.set_rng_state)


class StepGraph:
    """The steps of one run on one GPU. `say` gets one line if they cannot be captured."""

    def __init__(self, step: TrainStep, say: Callable[[str], None], device: Any = Cuda) -> None:
        self.step, self.say, self.device = step, say, device
        self.modules = [part for module in (step.student, step.method) for part in module.modules()]
        self.possible, self.checked = True, False
        self._forget(None)

    def _forget(self, key: Any) -> None:
        self.key, self.size, self.steps = key, 0, 0
        self.replay: Callable[[], None] | None = None
        self.result: Any = None

    def _constants(self) -> Any:
        """What a capture holds as constants: the rates, and the epoch for a method that looks at it."""
        method, rates = self.step.method, [group["lr"] for group in self.step.optimizer.param_groups]
        return rates, method.epoch if hasattr(type(method), "epoch") else None

    def __call__(self, batch: Batch, part: Part) -> tuple[list[str], torch.Tensor]:
        """Batches of another size than the first one's, such as an epoch's last, are never captured."""
        if not self.possible:
            return self.step(batch, part)
        if (key := self._constants()) != self.key:
            self._forget(key)
        self.size, self.steps = self.size or len(batch), self.steps + 1
        if self.steps <= WARM_UP or len(batch) != self.size:
            return self.device.on_side_stream(lambda: self.step(batch, part))
        if self.replay is None:
            return self._capture(batch, part)
        for own, given in zip(self.inputs, (batch.index, batch.views), strict=True):
            own.copy_(given)
        return self._replayed()

    def _replayed(self) -> tuple[list[str], torch.Tensor]:
        assert self.replay
        self.replay()
        names, row = self.result
        return names, row.clone()

    def _capture(self, batch: Batch, part: Part) -> tuple[list[str], torch.Tensor]:
        """Capture the step, without taking it; then take it, the first time both ways."""
        self.inputs = batch.index.clone(), batch.views.clone()
        buffers = [(module, dict(module._buffers)) for module in self.modules]
        try:
            self.replay, self.result = self.device.capture(
                lambda: self.step(Batch(batch.split, batch.augment, *self.inputs), part)
            )
            if exchanged := [name for module, own in buffers for name in own if module._buffers[name] is not own[name]]:
                raise RuntimeError(f"the step puts another tensor in the place of {exchanged[0]}")
        except RuntimeError as error:
            for module, own in buffers:
                module._buffers.update(own)
            self.step.optimizer.zero_grad(set_to_none=True)
            self.device.synchronise()
            self._give_up(str(error).splitlines()[0][:150])
            return self.step(batch, part)
        return self._replayed() if self.checked else self._check(batch, part)

    def _check(self, batch: Batch, part: Part) -> tuple[list[str], torch.Tensor]:
        """This batch's step run eagerly, then replayed from the same state: the capture stays if both agree."""
        tensors = self._state()
        before, random = [tensor.clone() for tensor in tensors], self.device.random_state()
        result = self.step(batch, part)
        eager = [tensor.clone() for tensor in tensors]
        _put(tensors, before)
        self.device.set_random_state(random)
        replayed = self._replayed()
        self.checked = True
        apart, moved = _distance(tensors, eager), _distance(eager, before)
        if apart <= TOLERANCE * moved:
            return replayed
        _put(tensors, eager)
        self._give_up(
            f"a replayed step is {apart / max(moved, 1e-30):.0%} of its length away from the same step run eagerly"
        )
        return result

    def _state(self) -> list[torch.Tensor]:
        """Everything that a step changes."""
        own = [
            tensor for module in self.modules for tensor in (*module._parameters.values(), *module._buffers.values())
        ]
        momentum = [value for state in self.step.optimizer.state.values() for value in state.values()]
        return [tensor for tensor in (*own, *momentum) if isinstance(tensor, torch.Tensor)]

    def _give_up(self, why: str) -> None:
        self._forget(None)
        self.possible = False
        self.say(f"note: no CUDA graph, kernels are launched one by one: {why}")


@torch.no_grad()
def _put(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _distance(these: Sequence[torch.Tensor], those: Sequence[torch.Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(these, those, strict=True) if a.is_floating_point()]
    return float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5
