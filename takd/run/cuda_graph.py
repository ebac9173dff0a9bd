"""A training step as one CUDA graph: a small network's thousand kernels then cost one launch instead of a thousand.

    graph = StepGraph((student, method), optimizer, say)
    result = graph(step, index, views, key)          what step(index, views) returns

PyTorch's own recipe (its notes on CUDA, "CUDA Graphs"): some steps run as they are, which is ordinary training, then one is recorded
and played from then on. A recorded step must not talk to the host and must change its tensors in place; one that does otherwise, or
that plays otherwise than it runs, goes on as it was.
"""

import torch

WARM_UP = 3  # steps before recording: cuDNN chooses its algorithms, the optimizer makes its buffers
TOLERANCE = 0.1  # between a step played and the same step run, as a share of what it changes: rounding is far below


class Cuda:
    """What StepGraph asks of PyTorch's CUDA."""

    @staticmethod
    def aside(function):
        """`function()` on a stream of its own, as it will be recorded."""
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            result = function()
        here.wait_stream(aside)
        return result

    @staticmethod
    def recorded(function):
        """(play, result): `play()` does what `function()` does, and its results are then in `result`. Nothing is done yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        return graph.replay, result

    synchronise = staticmethod(torch.cuda.synchronize)
    random_state, set_random_state = staticmethod(torch.cuda.get_rng_state), staticmethod(torch.cuda.set_rng_state)


class StepGraph:
    """The steps of one run on one GPU. `say` hears it once if they cannot be recorded."""

    def __init__(self, modules, optimizer, say, device=Cuda):
        self.modules = [part for module in modules for part in module.modules()]
        self.optimizer, self.say, self.device = optimizer, say, device
        self.possible, self.checked = True, False
        self._forget(None)

    def _forget(self, key):
        self.key, self.size, self.steps, self.play, self.inputs, self.result = key, None, 0, None, None, None

    def __call__(self, step, index, views, key):
        """`step(index, views)`: (names, float tensor). `key` is what a record holds as a constant, such as the learning rate.

        Batches of another size than the first one's, such as an epoch's last, are never recorded.
        """
        if not self.possible:
            return step(index, views)
        if key != self.key:
            self._forget(key)
        self.size, self.steps = self.size or len(index), self.steps + 1
        if self.steps <= WARM_UP or len(index) != self.size:
            return self.device.aside(lambda: step(index, views))
        if self.play is None:
            return self._record(step, index, views)
        for own, given in zip(self.inputs, (index, views), strict=True):
            own.copy_(given)
        return self._played()

    def _played(self):
        self.play()
        names, row = self.result
        return names, row.clone()

    def _record(self, step, index, views):
        """Record the step, without taking it; then take it, the first time both ways."""
        self.inputs = index.clone(), views.clone()
        buffers = [(module, dict(module._buffers)) for module in self.modules]
        try:
            self.play, self.result = self.device.recorded(lambda: step(*self.inputs))
            if exchanged := [name for module, own in buffers for name in own if module._buffers[name] is not own[name]]:
                raise RuntimeError(f"the step puts another tensor in the place of {exchanged[0]}")
        except RuntimeError as error:
            for module, own in buffers:
                module._buffers.update(own)
            self.optimizer.zero_grad(set_to_none=True)
            self.device.synchronise()
            self._give_up(str(error).splitlines()[0][:150])
            return step(index, views)
        return self._played() if self.checked else self._check(step, index, views)

    def _check(self, step, index, views):
        """This batch's step run, then played from the same state: the record stays if both agree."""
        tensors = self._state()
        before, random = [tensor.clone() for tensor in tensors], self.device.random_state()
        result = step(index, views)
        run = [tensor.clone() for tensor in tensors]
        _put(tensors, before)
        self.device.set_random_state(random)
        played = self._played()
        self.checked = True
        apart, moved = _distance(tensors, run), _distance(run, before)
        if apart <= TOLERANCE * moved:
            return played
        _put(tensors, run)
        self._give_up(f"played, a step is {apart / max(moved, 1e-30):.0%} of its length away from the same step run")
        return result

    def _state(self):
        """Everything that a step changes."""
        own = [tensor for module in self.modules for tensor in (*module._parameters.values(), *module._buffers.values())]
        momentum = [value for state in self.optimizer.state.values() for value in state.values()]
        return [tensor for tensor in (*own, *momentum) if isinstance(tensor, torch.Tensor)]

    def _give_up(self, why):
        self._forget(None)
        self.possible = False
        self.say(f"note: no CUDA graph, kernels are launched one by one: {why}")


@torch.no_grad()
def _put(tensors, values):
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _distance(these, those):
    pairs = [(a.double(), b.double()) for a, b in zip(these, those, strict=True) if a.is_floating_point()]
    return float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5
