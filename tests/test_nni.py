"""config.yml and search_space.json as shipped, run by a real `nnictl create` with two trials at once.

Only what a machine without a GPU cannot do is changed: the networks and the data set are small, there are fewer and
shorter trials, no GPU is requested, and everything that NNI and the trials write goes into the test's folder.
"""

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from conftest import ROOT, read_json, read_lines, wait_until

import report
from takd.config import flags

BIN = Path(sys.executable).parent
TRIALS, EPOCHS = 6, 2
SMALLER = {"--teacher": "plane4", "--cuda": "0", "--dataset": "digits"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("nni"), reason="nni is not installed (requirements.txt has it)"),
]


def derived_config(folder, epochs=EPOCHS, student="plane2", **changes):
    """The shipped config.yml with what must differ, written into `folder`."""
    import yaml

    config = yaml.safe_load((ROOT / "config.yml").read_text())
    words = shlex.split(config["trialCommand"])
    for flag, value in (SMALLER | {"--student": student, "--epochs": str(epochs)}).items():
        words[words.index(flag) + 1] = value
    config |= {
        "trialCommand": shlex.join([*words, "--run-dir", str(folder / "runs")]),
        "trialCodeDirectory": str(ROOT / config["trialCodeDirectory"]),
        "searchSpaceFile": str(ROOT / config["searchSpaceFile"]),
        "trialGpuNumber": 0,
        "trialConcurrency": 2,
        "maxTrialNumber": TRIALS,
        "experimentWorkingDirectory": str(folder / "experiments"),
    } | changes
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    return folder / "config.yml"


class Experiment:
    """A real experiment, from `nnictl create` to `nnictl stop`. NNI's own records go to a home of the experiment's."""

    def __init__(self, config, folder):
        self.home = folder / "home"
        self.home.mkdir()
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])  # as in a shell with the environment activated
        self.environment = os.environ | {"HOME": str(self.home), "PATH": path}
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for _ in range(3):  # on a loaded machine it may fail once: docs/nni.md
            created = self.nnictl("create", "--config", config, "--port", self.port, "--debug")
            if created.returncode == 0:
                break
        assert created.returncode == 0, created.stdout + created.stderr
        (self.id,) = json.loads((self.home / "nni-experiments" / ".experiment").read_text())
        self.folder = folder / "experiments" / self.id

    def nnictl(self, *words):
        command = [str(BIN / "nnictl"), *map(str, words)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)

    def get(self, what):
        """The manager's REST interface."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.port}/api/v1/nni/{what}", timeout=20) as answer:
            return json.load(answer)

    def done(self):
        """Whether all trials are done and their metrics, which NNI reads from files, are there (after a second)."""
        time.sleep(1)
        status = self.get("check-status")
        assert not status["errors"], status
        finals = sum(metric["type"] == "FINAL" for metric in self.get("metric-data"))
        return status["status"] == "DONE" and finals >= TRIALS

    def processes(self):
        """What runs with the experiment's home, and so was started by it."""
        import psutil

        mine = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.home):
                    mine.append(process)
        return mine

    def kill(self):
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def database(self, query):
        with closing(sqlite3.connect(self.folder / "db" / "nni.sqlite")) as database:
            return database.execute(query).fetchall()


@contextmanager
def running(folder, **changes):
    """An experiment whose config.yml has these changes; nothing of it is left at the end."""
    config = derived_config(folder, **changes)
    made = Experiment.__new__(Experiment)
    try:
        made.__init__(config, folder)
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    with running(tmp_path_factory.mktemp("nni")) as made:
        wait_until(made.done, seconds=900)
        yield made


@pytest.fixture(scope="module")
def proposals(experiment):
    """{trial id: (parameter id, parameters)}: what the tuner proposed to which trial, from NNI's database."""
    rows = experiment.database("select trialJobId, data from TrialJobEvent where event = 'WAITING'")
    parsed = {trial: json.loads(data) for trial, data in rows}
    return {trial: (proposal["parameter_id"], proposal["parameters"]) for trial, proposal in parsed.items()}


def record(experiment, trial, name="config.json"):
    return read_json(experiment.folder.parents[1] / "runs" / trial / name)


def test_every_trial_succeeds_with_parameters_of_the_shipped_space(experiment, proposals):
    jobs = experiment.get("trial-jobs")
    assert [job["status"] for job in jobs] == ["SUCCEEDED"] * TRIALS
    assert {job["trialJobId"] for job in jobs} == set(proposals)
    assert len({number for number, _ in proposals.values()}) == TRIALS
    space = read_json(ROOT / "search_space.json")
    for _, parameters in proposals.values():
        assert parameters.keys() == space.keys()
        assert parameters["T_student"] in space["T_student"]["_value"]
        assert parameters["seed"] in space["seed"]["_value"]
        assert 0.05 <= parameters["lambda_student"] <= 1


def test_every_trial_records_the_parameters_that_it_used(experiment, proposals):
    for trial, (_, parameters) in proposals.items():
        config, summary = record(experiment, trial), record(experiment, trial, "summary.json")
        for key, setting in (("T_student", "temperature"), ("lambda_student", "lambda"), ("seed", "seed")):
            assert config[setting] == parameters[key]
            assert config["origins"][setting] == "tuner"
        assert summary["method_options"]["temperature"] == parameters["T_student"]
        assert summary["method_options"]["lambda"] == parameters["lambda_student"]
        assert summary["seed"] == parameters["seed"]
        assert summary["path"] == ["plane4", "plane2"]
        assert Path(summary["checkpoint"]).name == f"plane2_{trial}_best.pth.tar"
        assert Path(summary["checkpoint"]).is_file()


def test_the_tuner_gets_each_final_metric_for_the_parameters_that_led_to_it(experiment, proposals):
    """By the parameter id in the message that NNI's manager sends to the tuner, as its debug log has it."""
    sent = {}
    for line in (experiment.folder / "log" / "nnimanager.log").read_text().splitlines():
        if message := re.search(r"WebSocketChannel\) Sending ME(\{.*\})", line):
            metric = json.loads(message[1])
            if metric["type"] == "FINAL":
                sent[metric["parameter_id"]] = (metric["trial_job_id"], json.loads(metric["value"]))
    proposed = dict(proposals.values())  # by parameter id
    results = {}
    for number, (trial, accuracy_percent) in sent.items():
        config = record(experiment, trial)
        used = {"T_student": config["temperature"], "lambda_student": config["lambda"], "seed": config["seed"]}
        assert used == proposed[number]
        assert accuracy_percent == record(experiment, trial, "summary.json")["best"]["accuracy_percent"]
        results[trial] = accuracy_percent
    assert results.keys() == proposals.keys()
    assert len(set(results.values())) > 1  # else any mix-up would pass


def test_every_epoch_of_the_student_and_none_of_the_teacher_is_reported(experiment, proposals):
    columns = "trialJobId, parameterId, sequence, data"
    rows = experiment.database(f"select {columns} from MetricData where type = 'PERIODICAL'")
    reported = {(trial, int(number), sequence): float(json.loads(data)) for trial, number, sequence, data in rows}
    expected = {}
    for trial, (number, _) in proposals.items():
        lines = read_lines(experiment.folder.parents[1] / "runs" / trial / "metrics.jsonl")
        assert len(lines) == EPOCHS
        expected |= {(trial, number, epoch): line["test_accuracy_percent"] for epoch, line in enumerate(lines)}
    assert reported == expected


def test_all_trials_learn_from_one_teacher(experiment, proposals):
    teacher = record(experiment, "teacher", "summary.json")
    assert teacher["path"] == ["plane4"]
    assert teacher["seed"] == flags.DEFAULT_SEED
    assert len({record(experiment, trial)["teacher_weights"] for trial in proposals}) == 1
    assert {record(experiment, trial)["teacher_checkpoint"] for trial in proposals} == {teacher["checkpoint"]}
    runs = experiment.folder.parents[1] / "runs"
    assert {entry.name for entry in runs.iterdir()} == {"teacher", *proposals}


def test_the_report_ranks_settings_by_what_their_trials_recorded(experiment, proposals, call, tmp_path):
    reached = {}
    for trial, (_, parameters) in proposals.items():
        accuracy = record(experiment, trial, "summary.json")["best"]["accuracy_percent"]
        reached.setdefault((parameters["T_student"], parameters["lambda_student"]), []).append(accuracy)
    expected = [(f"{T:g}", f"{lam:g}", f"{len(a)}", f"{sum(a) / len(a):.2f}") for (T, lam), a in reached.items()]
    outcome = call(report, experiment.folder.parents[1] / "runs", "--output", tmp_path)
    assert outcome.status == 0, outcome.err
    table = (tmp_path / "report.md").read_text().split("All settings")[1].split("##")[0]
    rows = re.findall(r"^\| \**([\d.]+)\** \| \**([\d.]+)\** \| \**(\d+)\** \| \**([\d.]+)", table, re.MULTILINE)
    assert sorted(rows) == sorted(expected)
    assert [float(row[3]) for row in rows] == sorted((float(row[3]) for row in expected), reverse=True)


def test_stopping_leaves_no_process(experiment):
    assert experiment.processes()
    stopped = experiment.nnictl("stop", experiment.id)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    wait_until(lambda: not experiment.processes(), seconds=60)


# ----------------------------------------------------------------------------------- experiments of their own
def test_a_trial_that_is_resumed_numbers_its_epochs_on(tmp_path):
    """NNI reads what a resumed trial had reported before once more; that is the same."""

    def curve():
        rows = experiment.database("select sequence, data from MetricData where type = 'PERIODICAL'")
        return sorted({(number, float(json.loads(value))) for number, value in rows})

    with running(tmp_path, epochs=20, student="plane6", trialConcurrency=1, maxTrialNumber=2) as experiment:
        wait_until(lambda: (experiment.folder / "db" / "nni.sqlite").exists() and len(curve()) >= 3)
        (run,) = [folder for folder in (tmp_path / "runs").iterdir() if folder.name != "teacher"]
        assert experiment.nnictl("stop", experiment.id).returncode == 0
        wait_until(lambda: not experiment.processes())
        assert not (run / "summary.json").exists()
        resumed = experiment.nnictl("resume", experiment.id, "--port", experiment.port)
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        wait_until((run / "summary.json").exists)
        wait_until(lambda: curve()[-1][0] == 19)
        lines = read_lines(run / "metrics.jsonl")
        assert curve() == [(line["epoch"], line["test_accuracy_percent"]) for line in lines]


def test_a_misspelt_type_in_the_search_space_fails_the_trial(tmp_path):
    space = read_json(ROOT / "search_space.json")
    space["T_student"]["_type"] = "chioce"
    (tmp_path / "space.json").write_text(json.dumps(space))
    with running(tmp_path, searchSpaceFile=str(tmp_path / "space.json"), maxTrialNumber=1) as experiment:
        (trial,) = wait_until(lambda: [job for job in experiment.get("trial-jobs") if job["status"] == "FAILED"])
        errors = (experiment.folder / "trials" / trial["trialJobId"] / "stderr").read_text()
    assert "T_student of _type 'chioce' (did you mean choice?)" in errors and errors.count("\n") == 1
