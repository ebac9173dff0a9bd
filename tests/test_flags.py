"""Every flag of every command, so that adding or dropping one is a decision."""

import re

import pytest

FLAGS = {
    "train.py": """
        --any-teacher --augment --batch-size --cuda --dataset --dataset-dir --download --epochs --help --help-methods
        --image-size --json --label-smoothing --lambda --learning-rate --learning-rate-decay --measure --method
        --method-option --milestones --model --momentum --nesterov --no-cuda-graph --no-download --no-nesterov
        --precision --pretrained --recipe --repeat --run-dir --save-minutes --schedule --seed --student --teacher
        --teacher-cache --teacher-checkpoint --temperature --train-images --validation-split --warmup-epochs
        --weight-decay --workers""",
    "evaluate.py": """
        --checkpoint --cuda --dataset --dataset-dir --help --image-size --json --model --no-download --report
        --teacher --teacher-checkpoint""",
    "distill_paths.py": """
        --account --cpus --dry-run --family --gpu-type --gpus --guidance --help --jobs --mem --memory --modules --only
        --pack --paths --runs --sbatch --seeds --set --sizes --slurm --stage --time --venv""",
    "sweep.py": """
        --account --cpus --dry-run --gpu-type --help --jobs --mem --memory --modules --runs --sbatch --slurm --space
        --stage --time --trials --venv --workers""",
    "report.py": "--help --keep --output --price-per-hour --table",
    "export.py": "--checkpoint --dataset --dataset-dir --help --image-size --model --no-download --output",
    "data_loader.py": "--dataset-dir --download --help",
}


@pytest.mark.parametrize("command", FLAGS)
def test_flags(command, run_command):
    entries = re.findall(r"^  (-[^\n]*?)(?:  |\n|$)", run_command(command, "--help").out, re.MULTILINE)
    flags = {flag for entry in entries for flag in re.findall(r"(?<![\w-])--[a-z-]+", entry)}
    assert flags == set(FLAGS[command].split())
