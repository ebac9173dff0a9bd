"""Every flag of every command, so that adding or dropping one is a decision."""

import re

import pytest
from conftest import ROOT

import takd
from takd.config import run_config

FLAGS = {
    "train.py": """
        --any-teacher --augment --batch-size --cuda --dataset --dataset-dir --download --epochs --help --help-methods
        --image-size --init-from --json --label-smoothing --lambda --learning-rate --learning-rate-decay --lr --measure
        --method --method-option --milestones --model --momentum --nesterov --no-cuda-graph --no-download --no-nesterov
        --precision --pretrained --recipe --repeat --run-dir --save-minutes --schedule --seed --student --teacher
        --teacher-cache --teacher-checkpoint --temperature --test-images --train-images --validation-split
        --version --warmup-epochs --weight-decay --workers""",
    "evaluate.py": """
        --checkpoint --cuda --dataset --dataset-dir --help --image-size --json --model --no-download --report
        --teacher --teacher-checkpoint --test-images --version""",
    "distill_paths.py": """
        --account --cpus --dry-run --family --gpu-type --gpus --guidance --help --jobs --mem --memory --modules --only
        --pack --paths --runs --sbatch --seeds --set --sizes --slurm --stage --time --venv --version""",
    "sweep.py": """
        --account --cpus --dry-run --gpu-type --help --jobs --mem --memory --modules --runs --sbatch --slurm --space
        --stage --time --trials --venv --version --workers""",
    "report.py": "--help --keep --output --price-per-hour --table --version",
    "export.py": "--checkpoint --dataset --dataset-dir --help --image-size --model --no-download --output --version",
    "data_loader.py": "--dataset-dir --download --help --version",
}


@pytest.mark.parametrize("command", FLAGS)
def test_flags(command, run_command):
    entries = re.findall(r"^  (-[^\n]*?)(?:  |\n|$)", run_command(command, "--help").out, re.MULTILINE)
    flags = {flag for entry in entries for flag in re.findall(r"(?<![\w-])--[a-z-]+", entry)}
    assert flags == set(FLAGS[command].split())


@pytest.mark.parametrize("command", FLAGS)
def test_version(command, run_command, nothing_heavy):
    outcome = run_command(command, "--version", **nothing_heavy)
    assert (outcome.status, outcome.err) == (0, "")
    assert re.fullmatch(rf"{command} \(TAKD\) {re.escape(takd.__version__)}, commit \w+( \(changed\))?\n", outcome.out)
    assert f'version: "{takd.__version__}"' in (ROOT / "CITATION.cff").read_text()


def test_the_short_flags_are_those_of_knowledge_distillation():
    short = "-m resnet_32_20 -t resnet_32_110 -d cifar10 -k at -s 7 -b 64 -l 0.05 -e 100 -i 3"
    long = "--student resnet20 --teacher resnet110 --dataset cifar10 --method at --seed 7 --batch-size 64 --lr 0.05"
    parsed = [run_config.parse(each.split(), elsewhere=True) for each in (short, f"{long} --epochs 100 --repeat 3")]
    assert parsed[0].record() == parsed[1].record() and parsed[0].repeat == 3
    assert parsed[0].origins["seed"] == "command line"
