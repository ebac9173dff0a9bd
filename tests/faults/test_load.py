"""Many runs at once, many runs in one report, and what a run leaves in its records and opens on the network.

TAKD_AT_ONCE=200 is another number of trainings that share a table than 50.
"""

import ipaddress
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import wait_until
from test_kills import CASES, outcome
from tried import note
from warm import Command

AT_ONCE = int(os.environ.get("TAKD_AT_ONCE", 50))
RUNS = 1000


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["lazy", "full"])
def test_many_trainings_with_one_table_equal_serial_ones(cache, tmp_path, teacher_run):
    """In the same folder, so with the same table, which none of them finds whole; then one after another alone."""

    def start(seed, place):
        if not (tmp_path / place).exists():  # and not while the runs started before read it
            (tmp_path / place).mkdir()
            shutil.copy(teacher_run / "plane2_seed1_best.pth.tar", tmp_path / place / "teacher.pth.tar")
        words = f"{CASES[f'train.py, {cache} table']} --epochs 1 --run-dir run/{seed} --seed {seed}".split()
        return Command(tmp_path / place, *words, output=tmp_path / f"{place} {seed}")

    seeds = range(AT_ONCE // 2)
    commands = [start(seed, "at once") for seed in seeds]
    for status, _, err in [command.end() for command in commands]:
        assert status == 0, err
    for seed in seeds:
        status, _, err = start(seed, f"alone{seed}").end()
        assert status == 0, err
    alone = [record for seed in seeds for record in outcome(tmp_path / f"alone{seed}")]
    assert outcome(tmp_path / "at once") == sorted(alone)
    for _ in seeds:
        note(f"{len(seeds)} runs of train.py at once, one {cache} table", "concurrency", "equal to serial runs")


@pytest.mark.slow
def test_a_report_over_a_thousand_runs(tmp_path, run_command, write_run):
    paths = [("plane10",), ("plane4",), ("plane10", "plane4"), ("plane10", "plane2"), ("plane10", "plane4", "plane2")]
    for seed in range(RUNS // len(paths)):
        for i, path in enumerate(paths):
            write_run(path, seed, (40 + i, 50 + i + seed % 7 / 10))
    status, out, err = run_command("report.py", tmp_path / "runs")
    assert (status, err) == (0, "") and f"{RUNS} runs" in out, err
    assert "From plane10 to plane2 on digits" in (tmp_path / "runs/report.md").read_text()


# ------------------------------------------------------------------------------------------- what others may see
LONG = ("--dataset", "digits", "--student", "plane2", "--cuda", "0", "--epochs", "1000", "--train-images", "200")


@pytest.mark.slow
def test_records_hold_neither_environment_nor_user(tmp_path, start_command):
    private = {"TAKD_PASSWORD": "correcthorse", "USER": "batterystaple", "LOGNAME": "batterystaple"}
    private |= {"HOME": "/home/batterystaple", "WANDB_API_KEY": "correcthorse"}
    process = start_command("train.py", *LONG, "--run-dir", "run", cwd=tmp_path, **private)
    wait_until((tmp_path / "run/last.pth.tar").exists, process)
    listening = listening_addresses(process.pid)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert listening == set()
    written = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.json", "metrics.jsonl", "last.pth.tar"} <= set(written)
    for name, contents in (written | {"output": (out + err).encode()}).items():
        assert not re.search(rb"correcthorse|batterystaple", contents), name


@pytest.mark.slow
def test_two_processes_listen_on_this_machine_alone(tmp_path, start_group):
    process = start_group(2, "train.py", *LONG, "--run-dir", tmp_path / "run")
    wait_until((tmp_path / "run/last.pth.tar").exists, process)
    members = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    listening = set().union(*map(listening_addresses, [process.pid, *members]))
    process.terminate()
    process.communicate(timeout=60)
    assert listening and listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def listening_addresses(pid):
    """The addresses on which a process accepts connections, as /proc has them."""
    descriptors = Path(f"/proc/{pid}/fd").iterdir()
    sockets = {os.readlink(each).removeprefix("socket:[").rstrip("]") for each in descriptors if each.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] in ("0A", "07") and fields[9] in sockets:  # TCP_LISTEN; UDP that is not connected
                found.add(address(fields[1].partition(":")[0]))
    return found


def address(hexadecimal):
    """/proc's form of an address: hexadecimal words in the machine's order of bytes."""
    words = [bytes.fromhex(hexadecimal[i : i + 8])[::-1] for i in range(0, len(hexadecimal), 8)]
    return str(ipaddress.ip_address(b"".join(words)))
