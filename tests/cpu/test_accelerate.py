"""The accelerated CPU path beside the plain one: the same function, gradients, statistics and keys; runs without it."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_json, read_lines, same_weights
from torch import nn

import model_factory
import train
from model_factory import BasicBlock, PlaneCNN, ResNet
from takd.distill.evaluation import autocast, input_dtype
from takd.distill.teacher import freeze

cpu, fused, kernels = map(pytest.importorskip, ("takd.cpu", "takd.cpu.fused", "takd.cpu.kernels"))
needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C compiler that makes kernels.c")

# (module, input channels, its method)
BLOCKS = {
    "BasicBlock": (lambda: BasicBlock(16, 16, 1, padded=False), 16, "forward"),
    "BasicBlock, downsample": (lambda: BasicBlock(16, 32, 2, padded=False), 16, "forward"),
    "BasicBlock, option A": (lambda: BasicBlock(16, 32, 2, padded=True), 16, "forward"),
    "ResNet stem": (lambda: ResNet(8, 10), 3, "stem"),
    "PlaneCNN, pools": (lambda: PlaneCNN("C16 MP C32 C32 MP", 10), 3, "forward_features"),
    "PlaneCNN, no last pool": (lambda: PlaneCNN("C16 C16 MP C32", 10), 3, "forward_features"),
}
NETWORKS = ("plane2", "plane4", "plane6", "plane8", "plane10", "cnn5", "resnet8", "resnet14a")


def plain_module(case):
    torch.manual_seed(0)
    make, channels, method = BLOCKS.get(case) or (lambda: model_factory.create(case, 100), 3, "forward_features")
    module = make().to(memory_format=torch.channels_last).train()
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.uniform_(bn.weight, -1.5, 1.5)  # negative ones too, as a max-pool does not commute with them
            nn.init.uniform_(bn.bias, -1, 1)
    return module, torch.randn(8, channels, 32, 32).contiguous(memory_format=torch.channels_last), method


def flat(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else [each for part in outputs for each in flat(part)]


def training_step(module, method, x, precision):
    """({name: output, buffer or updated statistic}, {name: gradient})."""
    x = x.clone().requires_grad_()
    with autocast(x.device, precision):
        outputs = flat(getattr(module, method)(x))
    random = torch.Generator().manual_seed(1)
    sum((y.double() * torch.randn(y.shape, generator=random)).sum() for y in outputs).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return dict(enumerate(each.detach() for each in outputs)) | dict(module.named_buffers()), gradients | {"x": x.grad}


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [*BLOCKS, *NETWORKS])
def test_a_training_step_agrees(case, precision):
    """Outputs, all gradients and running statistics are as near to float64 as those of PyTorch's own operations."""
    plain, x, method = plain_module(case)
    fast, exact, x = copy.deepcopy(plain), copy.deepcopy(plain).double(), x.to(input_dtype(precision))
    assert cpu.accelerate(fast) and type(fast) is not type(plain)
    assert list(fast.state_dict()) == list(plain.state_dict())
    ours, theirs = (training_step(module, method, x, precision) for module in (fast, plain))
    true = training_step(exact, method, x.double(), "fp32")
    # An activation that rounding moves across a ReLU's corner changes a network's gradients by more than rounding.
    for kind, tolerance in ((0, 2e-5), (1, 2e-5 if case in BLOCKS else 2e-2)):
        assert list(ours[kind]) == list(theirs[kind])
        for key, expected in true[kind].items():
            error, plain_error = ((each[kind][key] - expected).double().norm() for each in (ours, theirs))
            assert error <= max(tolerance * expected.double().norm(), 3 * plain_error), key


@needs_kernels
@pytest.mark.parametrize("case", [*BLOCKS, "plane6", "resnet14a"])
def test_evaluation_is_pytorchs_own(case):
    plain, x, method = plain_module(case)
    fast = copy.deepcopy(plain)
    cpu.accelerate(fast)
    with torch.inference_mode():
        outputs = (flat(getattr(module.eval(), method)(x)) for module in (fast, plain))
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


OWN = """
import model_factory
from torch import nn

class BasicBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()

class ResNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.block, self.fc = BasicBlock(), nn.Linear(16, classes)

    def stem(self, x):
        return nn.functional.gelu(self.bn1(self.conv1(x)))

    def forward(self, x):
        return self.fc(self.block(self.stem(x)).mean((2, 3)))

class Wider(model_factory.PlaneCNN):
    def __init__(self, classes):
        super().__init__("C32 MP C32 MP", classes)

    def stages(self, images):
        return super().stages(2 * images)
"""


@pytest.mark.parametrize("name", ["torchvision:resnet18", "own.py:ResNet", "own.py:Wider", "beside/own.py:ResNet"])
def test_other_networks_stay_as_they_are(name, tmp_path):
    """Torchvision's and the user's, also where their classes, and their module, are called or derived like ours."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/model_factory.py").write_text(OWN.partition("class W")[0].replace("import model_factory", ""))
    (tmp_path / "beside/own.py").write_text("from model_factory import ResNet")
    name = str(tmp_path / name) if ".py" in name else name
    torch.manual_seed(0)
    plain = model_factory.create(name, 10)
    fast, x = copy.deepcopy(plain), torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    cpu.accelerate(fast)
    assert [type(module) for module in fast.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(fast(x), plain(x)) and same_weights(fast.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", ["plane2", "plane6", "plane10", "resnet8", "resnet20", "resnet14a"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_packed_frozen_network_gives_the_same_logits(name, dtype, tolerance):
    torch.manual_seed(0)
    network = model_factory.create(name, 100)
    with torch.no_grad():
        for _ in range(3):  # statistics that are not 0 and 1, as after training
            network(torch.rand(32, 3, 32, 32) * 3)
    before, x = copy.deepcopy(network.state_dict()), torch.randn(8, 3, 32, 32)
    frozen = freeze(network, torch.device("cpu"), dtype, pack=cpu.pack)
    assert any(isinstance(module, fused.PackedConv) for module in frozen.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = frozen(x.contiguous(memory_format=torch.channels_last)).float()
        expected = network.eval()(x)
    assert (logits - expected).norm() <= tolerance * expected.norm()
    assert same_weights(network.state_dict(), before)


# ------------------------------------------------------------------------------------------- runs
def run_python(*arguments, cwd=ROOT, **environment):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def test_a_run_on_the_cpu_records_its_kernels(teacher_run):
    assert read_json(teacher_run / "config.json")["environment"]["kernels"] == kernels.version()


def test_a_run_on_a_gpu_neither_imports_nor_compiles_anything(tmp_path):
    code = """if True:
        import sys, train
        from takd.config import run_config
        config = run_config.parse(["--cuda", "0"]).replace(device="cuda")
        assert train.cpu_annex(config) is None and not [name for name in sys.modules if name.startswith("takd.cpu")]
    """
    outcome = run_python("-c", code, XDG_CACHE_HOME=str(tmp_path))
    assert outcome.returncode == 0 and not list(tmp_path.iterdir()), outcome.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_on_a_gpu_records_no_kernels(tmp_path, call, tiny):
    assert call(train, *tiny, "--cuda", "1", "--run-dir", tmp_path).status == 0
    assert "kernels" not in read_json(tmp_path / "config.json")["environment"]


def test_without_a_compiler_training_works_and_reports_it(tmp_path, run_command, call, tiny):
    """The same losses to rounding, with PyTorch's own operations."""
    command, cache = (*tiny, "--learning-rate", "0.001"), tmp_path / "cache"
    command_line = ("train.py", *command, "--run-dir", tmp_path / "plain")
    outcome = run_command(*command_line, CC="none", XDG_CACHE_HOME=str(cache))
    assert outcome.status == 0 and ", no C compiler: PyTorch's own batch norm, slower\n" in outcome.out, outcome.err
    assert read_json(tmp_path / "plain/config.json")["environment"]["kernels"] is False
    assert not cache.exists() or not list(cache.rglob("*.so"))
    fast = call(train, *command, "--run-dir", tmp_path / "fast")
    assert fast.status == 0 and ("no C compiler" in fast.out) is not kernels.available()
    ours, theirs = (read_lines(tmp_path / run / "metrics.jsonl")[0]["train_loss"] for run in ("fast", "plain"))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("remains", ["nothing", "__pycache__"])
def test_the_suite_works_without_the_folder(remains, tmp_path, tiny):
    """Python takes a folder without modules, which `git rm` may leave, for a package."""
    for name in ("train.py", "data_loader.py", "model_factory.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "takd", tmp_path / "takd", ignore=shutil.ignore_patterns("cpu", "__pycache__"))
    if remains == "__pycache__":
        (tmp_path / "takd/cpu/__pycache__").mkdir(parents=True)
    outcome = run_python("train.py", *tiny, "--run-dir", "run", cwd=tmp_path)
    assert outcome.returncode == 0 and "compiler" not in outcome.stdout, outcome.stderr
    assert "kernels" not in read_json(tmp_path / "run/config.json")["environment"]


@needs_kernels
def test_the_library_is_compiled_once(tmp_path):
    """Into the user's cache folder; nothing else is left there."""
    code, found = "from takd.cpu import kernels; assert kernels.available()", []
    for _ in range(2):
        assert run_python("-c", code, XDG_CACHE_HOME=str(tmp_path)).returncode == 0
        (file,) = (tmp_path / "takd").iterdir()
        found.append((file.name, file.stat().st_mtime_ns))
    assert found[0] == found[1] and file.suffix == ".so"
