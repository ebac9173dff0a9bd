"""Runs killed and stopped by signals at random moments end with the weights and records of an undisturbed one.

TAKD_KILLS=1000 makes 1000 SIGKILLs and as many signals instead of 40; TAKD_SEED repeats the moments of another test.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import read_json, read_lines, wait_until
from tried import note
from warm import SERVER, Command, children

from takd.files import digest
from takd.run import checkpoint

KILLS = int(os.environ.get("TAKD_KILLS", 40))
SEED = int(os.environ.get("TAKD_SEED", random.randrange(10**6)))
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# 75 steps, and a save after every few.
SHORT = "--dataset digits --train-images 100 --batch-size 4 --epochs 3 --cuda 0 --precision fp32 --save-minutes 0.0005"
RUN = f"train.py {SHORT} --run-dir run --student plane2"
TAUGHT = f"{RUN} --teacher plane2 --teacher-checkpoint teacher.pth.tar"
STUDY = f"{SHORT} --epochs 2 --runs run"
CASES = {
    "train.py": RUN,
    "train.py, lazy table": f"{TAUGHT} --augment crop-flip --teacher-cache lazy",
    "train.py, full table": f"{TAUGHT} --teacher-cache full",
    "train.py --method crd": f"{TAUGHT} --method crd",
    "train.py, two teachers": f"{RUN} --teacher plane2 plane2 --teacher-checkpoint teacher.pth.tar second.pth.tar "
    "--method dgkd --method-option drop=0.4",
    "train.py --repeat": f"{RUN} --repeat 2",
    "train.py, teacher first": f"{RUN} --teacher plane4",
    "train.py, while it starts": RUN,
    "distill_paths.py": f"distill_paths.py {STUDY} --sizes plane4 plane2",
    "sweep.py": f"sweep.py {STUDY} --student plane2 --teacher plane2 --teacher-checkpoint teacher.pth.tar "
    "--space space.json --trials 2",
}
SPACE = {"T": {"_type": "choice", "_value": [1, 4]}}


def outcome(folder, last=True):
    """All that the runs in a folder recorded, except times: of each its records and digests of its weights."""
    found = []
    for file in sorted(folder.rglob("summary.json")):
        run, summary = file.parent, read_json(file)
        lines = read_lines(run / "metrics.jsonl")
        timeless = [{key: value for key, value in line.items() if "second" not in key} for line in lines]
        best = checkpoint.read(folder / summary["checkpoint"])
        weights = [digest(best["model_state_dict"]), best["epoch"]]
        if last:
            weights.append(digest(checkpoint.read(run / "last.pth.tar")["model_state_dict"]))
        if summary["run_dir"].startswith("run/trials"):  # a sweep draws its settings in any order
            summary |= {"run_dir": None, "checkpoint": None}
        found.append(json.dumps([weights, timeless, summary | {"seconds": None}], sort_keys=True))
    assert found
    return sorted(found)


def handles(pid, number):
    """Whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return True
    return int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1


def interrupt(command, number):
    """Send a signal, or SIGKILL to it alone or with its children, and wait until it has ended."""
    victims = [command.pid]
    if number == signal.SIGKILL and random.random() < 0.5:
        victims += children(command.pid)
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):  # a child that has just ended
            os.kill(victim, number)
    status, out, err = command.end()
    assert "Traceback" not in err, err
    over = re.search("^(done|report) ", out, re.MULTILINE)  # all is done, and Python has no handlers any more
    expected = (-number, 0) if number == signal.SIGKILL else (128 + number, 0, -number if over else 0)
    assert status in expected, (number, status, out, err)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interrupted_runs_end_like_undisturbed_ones(case, tmp_path, teacher_run):
    random.seed(f"{SEED} {case}")
    SERVER.Process(target=int).start()  # the server: not counted in the time that a run takes
    print(f"moments: TAKD_SEED={SEED}")
    teacher, folders = teacher_run / "plane2_seed1_best.pth.tar", iter(range(10**6))

    def fresh():
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        for name in ("teacher", "second"):
            shutil.copy(teacher, folder / f"{name}.pth.tar")
        (folder / "space.json").write_text(json.dumps(SPACE))
        return folder

    new = not CASES[case].startswith("train.py") or "starts" in case
    count = len(range(list(CASES).index(case), KILLS, len(CASES)))
    numbers = [signal.SIGKILL] * count + [random.choice(SIGNALS) for _ in range(count)]
    random.shuffle(numbers)
    expected, seconds, folder, sent = None, 0.0, fresh(), []
    while numbers or sent or not expected:
        began, command = time.monotonic(), Command(folder, *CASES[case].split(), new=new)
        if numbers and expected:
            if numbers[-1] != signal.SIGKILL:
                wait_until(lambda command=command: not command.running or handles(command.pid, signal.SIGUSR1))
            command.process.join(random.uniform(0, seconds))
            if command.running:
                sent.append(numbers.pop())
                interrupt(command, sent[-1])
                continue
        status, out, err = command.end()
        assert status == 0, (sent, out, err)
        if expected is None:
            expected, seconds = outcome(folder), time.monotonic() - began
        assert outcome(folder) == expected, sent
        assert not list(folder.rglob("*.tmp")), sent
        for number in sent:
            fault = "SIGKILL" if number == signal.SIGKILL else "SIGTERM, SIGINT or SIGUSR1"
            note(case, fault, "equal weights and records")
        shutil.rmtree(folder)
        folder, sent = fresh(), []
