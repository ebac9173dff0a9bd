"""Every flag of every command, so that adding or dropping one is a decision."""

import re

import pytest

FLAGS = {
    "train.py": """--augment --batch-size --cuda --dataset --dataset-dir --download --epochs --help --help-methods --image-size --json
        --lambda --learning-rate --learning-rate-decay --method --method-option --milestones --model --momentum --nesterov
        --no-cuda-graph --no-download --no-nesterov --precision --pretrained --recipe --repeat --run-dir --save-minutes --seed
        --student --teacher --teacher-cache --teacher-checkpoint --temperature --train-images --validation-split --weight-decay
        --workers""",
    "evaluate.py": """--checkpoint --cuda --dataset --dataset-dir --help --image-size --json --model --no-download --report --teacher
        --teacher-checkpoint""",
    "distill_paths.py": """--account --cpus --dry-run --family --gpu-type --gpus --help --jobs --mem --memory --modules --only --pack
        --paths --runs --sbatch --seeds --set --sizes --slurm --stage --time --venv""",
    "report.py": "--help --output --price-per-hour",
    "data_loader.py": "--dataset-dir --download --help",
    "calibrate.py": "--batch-size --cuda --dataset --help --image-size --networks --precision",
}


@pytest.mark.parametrize("command", FLAGS)
def test_flags(command, run_command):
    shown = run_command(command, "--help").out
    entries = re.findall(r"^  (-[^\n]*?)(?:  |\n|$)", shown, re.MULTILINE)
    assert {flag for entry in entries for flag in re.findall(r"(?<![\w-])--[a-z-]+", entry)} == set(FLAGS[command].split())
