"""TAKD_MPS in slurm/train.sbatch, with stand-ins for NVIDIA's daemon and for srun: the test needs no GPU, no SLURM."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

DAEMON = """#!/bin/sh
echo "daemon ${1:-$(cat)} $CUDA_MPS_PIPE_DIRECTORY" >> "$LOG"
exit $DAEMON_STATUS
"""
SRUN = """#!/bin/sh
echo "srun ${CUDA_MPS_PIPE_DIRECTORY-none}" >> "$LOG"
exit 7
"""


@pytest.fixture
def job(tmp_path):
    """job(environment) runs the script: (its exit status, the lines that the stand-ins wrote)."""
    for name, text in {"nvidia-cuda-mps-control": DAEMON, "srun": SRUN}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(**environment):
        own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "SLURM_TMPDIR": str(tmp_path)}
        command = ["bash", ROOT / "slurm/train.sbatch", "distill_paths.py", "--jobs", "2"]
        done = subprocess.run(command, env=os.environ | own | environment, capture_output=True)
        log = tmp_path / "log"
        return done.returncode, log.read_text().splitlines() if log.exists() else []

    return run


def test_the_daemon_runs_around_the_one_srun(job, tmp_path):
    status, lines = job(TAKD_MPS="1", DAEMON_STATUS="0")
    (first, option, sockets), (second, seen), (third, quit_, _) = map(str.split, lines)
    assert (first, option, second, third, quit_) == ("daemon", "-d", "srun", "daemon", "quit") and status == 7
    assert seen == sockets and Path(sockets).parent == tmp_path and len(Path(sockets).name) <= 8


def test_a_job_whose_daemon_does_not_start_ends(job):
    status, lines = job(TAKD_MPS="1", DAEMON_STATUS="3")
    assert status == 3 and len(lines) == 1


def test_without_it_there_is_none(job):
    assert job() == (7, ["srun none"])
