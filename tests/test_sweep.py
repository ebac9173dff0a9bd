"""sweep.py: the space it reads, which trials a worker takes, the ranking, and real sweeps here and on SLURM."""

import json
import os
import re
import shlex
import signal
import statistics

import pytest
from conftest import listing, read_json, wait_until

import model_factory
import report
import sweep
from takd.config import run_config
from takd.files import is_locked
from takd.run import checkpoint
from takd.study import space
from takd.study.search import Draws, TrialState, Worker

DIGITS = ("--dataset", "digits", "--epochs", "2", "--cuda", "0", "--precision", "fp32")
PAIR = ("--teacher", "plane4", "--student", "plane2", *DIGITS)
SIX = {
    "T": {"_type": "choice", "_value": [1, 4, 10]},
    "lambda": {"_type": "quniform", "_value": [0.5, 1, 0.5]},
    "seed": {"_type": "choice", "_value": [20, 31]},
}


@pytest.fixture
def space_file(tmp_path):
    """space_file(contents) writes a search space."""

    def write(contents):
        (tmp_path / "space.json").write_text(contents if isinstance(contents, str) else json.dumps(contents))
        return tmp_path / "space.json"

    return write


@pytest.fixture
def make_sweep(space_file, tmp_path):
    """make_sweep(contents of the space, further flags) is the Sweep of such a command, in the test's runs/."""

    def make(contents=SIX, *argv):
        words = [*PAIR, "--space", space_file(contents), "--runs", tmp_path / "runs", *argv]
        return sweep.sweep_of(sweep.read_arguments(list(map(str, words))))

    return make


# --------------------------------------------------------------------------------------------------- the space
def test_the_types_of_nni_are_read(space_file):
    entries = {
        "T_student": {"_type": "choice", "_value": [1, 2.5]},
        "lambda": {"_type": "quniform", "_value": [0.05, 1, 0.05]},
        "dkd.beta": {"_type": "loguniform", "_value": [0.1, 10]},
        "dkd.alpha": {"_type": "uniform", "_value": [0, 2]},
        "dkd.warmup": {"_type": "qloguniform", "_value": [1, 20, 5]},
        "seed": {"_type": "randint", "_value": [1, 4]},
    }
    settings, seeds = space.read(space_file(entries))
    assert list(settings) == ["temperature", "lambda", "dkd.beta", "dkd.alpha", "dkd.warmup"] and seeds == [1, 2, 3]
    assert settings["temperature"].values == [1, 2.5]
    assert settings["lambda"].values == [round(0.05 * i, 2) for i in range(1, 21)], "0.15, not 0.15000000000000002"
    assert settings["dkd.warmup"].values == [1, 5, 10, 15, 20] and settings["dkd.warmup"].value(7.6) == 10
    assert settings["dkd.beta"].values is None and settings["dkd.beta"].log and settings["dkd.alpha"].value(0.3) == 0.3


@pytest.mark.parametrize(
    "contents, message",
    [
        ("{", "cannot be read as a search space"),
        ({"T": [1, 2]}, "it looks like"),
        ({"T": {"_type": "normal", "_value": [1, 2]}}, 'T: _type "normal" is not known here; known: choice randint'),
        ({"T": {"_type": "choise", "_value": [1, 2]}}, '"choise" is not known'),
        ({"T": {"_type": "choice", "_value": []}}, "[] of a choice is not [VALUE, ...]"),
        ({"T": {"_type": "choice", "_value": [4, {"_name": "x"}]}}, "of a choice is not"),
        ({"T": {"_type": "uniform", "_value": [4, 1]}}, "[4, 1] of a uniform is not [LOWEST, HIGHEST]"),
        ({"T": {"_type": "quniform", "_value": [1, 4]}}, "is not [LOWEST, HIGHEST, STEP]"),
        ({"T": {"_type": "loguniform", "_value": [0, 4]}}, "above 0"),
        ({"T": {"_type": "randint", "_value": [1, 4.5]}}, "of a randint is not"),
        ({"seed": {"_type": "uniform", "_value": [1, 4]}}, "seeds are counted"),
        ({"seed": {"_type": "choice", "_value": [1, -4]}}, "seed -4"),
        ({"alpha": {"_type": "choice", "_value": [1]}}, "alpha; search_space.json may hold"),
        ({"T": SIX["T"], "T_student": SIX["T"]}, "two names"),
        ({"T": {"_type": "choice", "_value": [4, 0]}}, "temperature 0: 0 is not a number above 0"),
        ({"lambda": {"_type": "uniform", "_value": [0.5, 1.5]}}, "lambda 1.5"),
        ({"dkd.beta": SIX["T"]}, "the method is kd; add --method dkd"),
        ({"kd.beta": SIX["T"]}, "method kd has no option 'beta'"),
    ],
)
def test_a_space_that_is_none_is_refused_in_one_line(call, space_file, tmp_path, contents, message):
    file = space_file(contents)
    outcome = call(sweep, *PAIR, "--space", file, "--runs", tmp_path / "runs")
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--temperature 3", "--temperature is given and also proposed by the tuner"),
        ("--seed 3", "--seed is given and also proposed"),
        ("--repeat 3", "--repeat is not for a search; let the search space have seeds"),
        ("--run-dir x", "use --runs"),
        ("--workers 3", "--workers needs --slurm"),
        ("--account me", "--account needs --slurm"),
        ("--space none.json", "none.json cannot be read"),
        ("--temprature 3", "unrecognized arguments: --temprature"),
        ("--trials 0", "at least 1"),
        ("--cuda 99", "--cuda 99: this machine has"),
        ("--teacher-checkpoint none.pth.tar", "none.pth.tar: no such file"),
    ],
)
def test_usage_errors_of_a_sweep_are_one_line(call, tmp_path, argv, message):
    outcome = call(sweep, *PAIR, "--runs", tmp_path / "runs", *argv.split())
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1, outcome
    assert not (tmp_path / "runs").exists()


def test_without_a_teacher_only_seeds_can_be_searched(call, space_file):
    outcome = call(sweep, "--student", "plane2", *DIGITS, "--space", space_file(SIX))
    assert outcome.status == 2 and "--temperature needs --teacher" in outcome.err
    outcome = call(sweep, "--student", "plane2", *DIGITS, "--space", space_file({"dkd.beta": SIX["T"]}), "--method=dkd")
    assert outcome.status == 2 and "needs --teacher" in outcome.err


# ------------------------------------------------------------------------------------------- trials and workers
def test_a_trials_command_has_what_was_drawn(make_sweep, tmp_path):
    beta = {"dkd.beta": {"_type": "choice", "_value": [2, 8.0]}, "seed": SIX["seed"]}
    made = make_sweep(beta, "--method", "dkd", "--method-option", "warmup=3", "--batch-size", "64")
    config = run_config.parse(made.arguments(7, {"dkd.beta": 8.0}, 31), elsewhere=True)
    assert config.method_options["beta"] == 8 and config.method_options["warmup"] == 3
    assert (config.seed, config.batch_size, config.run_path) == (31, 64, tmp_path / "runs" / "trials" / "007")
    assert config.teacher_checkpoint == str(tmp_path / "runs" / "teacher" / "plane4_seed1_best.pth.tar")
    teacher = run_config.parse(made.teacher_arguments, elsewhere=True)
    assert teacher.identity() == made.base.teacher_config().identity()
    assert str(teacher.best_file) == config.teacher_checkpoint


def finish(made, trial, accuracy):
    """What train.py leaves of a trial, as far as the sweep reads it; the claim is released."""
    run = made.trial(trial.number)
    run.path.mkdir(parents=True)
    outcome = {"epoch": 0, "split": "test", "accuracy_percent": accuracy, "test_accuracy_percent": accuracy}
    summary = {"model": "plane2", "dataset": "digits", "path": ["plane2"], "seed": 1, "epochs": 1, "parameters": 13_082}
    summary |= {
        "seconds": 1.0,
        "selection_split": "test",
        "checkpoint": "best.pth.tar",
        "best": outcome,
        "last": outcome,
    }
    run.summary_file.write_text(json.dumps(summary))
    trial.claim.close()


def test_every_setting_is_made_once_with_every_seed_whoever_makes_it(make_sweep):
    """Two workers, one of which is killed now and then: its claim ends, and its trial is taken again."""
    made = make_sweep()
    made.record(12)
    lines = []
    workers = [Worker(made, [], 1, lines.append) for _ in range(2)]
    taken, killed = [], 0
    while True:
        trials = [worker.next_trial() for worker in workers]
        for trial in filter(None, trials):
            if trial.number % 3 == 0 and killed <= trial.number:
                killed += 3
                trial.claim.close()
            else:
                taken.append(trial)
                finish(made, trial, trial.setting["temperature"] + trial.seed / 10)
        if not any(trials):
            break
    assert sorted(trial.number for trial in taken) == list(range(12)) and killed == 12
    runs = {(trial.setting["temperature"], trial.setting["lambda"], trial.seed) for trial in taken}
    assert len(runs) == 12
    told = {t.params["temperature"]: t.value for t in Draws(made).study.get_trials(states=[TrialState.COMPLETE])}
    assert told == pytest.approx({T: statistics.fmean((T + 2.0, T + 3.1)) for T in (1, 4, 10)}), "a setting's mean"
    made.record(40)
    assert workers[0].next_trial() is None, "the space holds no other setting"


def test_the_same_command_tops_up_and_another_is_refused(make_sweep, call, space_file, tmp_path):
    plane4 = tmp_path / "plane4.pth.tar"
    checkpoint.save({"model": "plane4", "model_state_dict": model_factory.create("plane4", 10).state_dict()}, plane4)
    made = make_sweep()
    made.record(1)
    first = Worker(made, [], 1, print).next_trial()
    finish(made, first, 50.0)
    assert Worker(made, [], 1, print).next_trial() is None
    made.record(2)
    second = Worker(made, [], 1, print).next_trial()
    assert (second.number, second.setting, second.seed) == (1, first.setting, 31)
    second.claim.close()
    before = listing(tmp_path / "runs")
    other = SIX | {"T": {"_type": "choice", "_value": [1, 4]}}
    for contents, argv, differs in (
        (SIX, ("--epochs", "3"), "epochs 2 there, 3 now"),
        (other, (), r'temperature "choice \[1, 4, 10\]" there, "choice \[1, 4\]" now'),
        (SIX | {"seed": {"_type": "choice", "_value": [20]}}, (), r"seed \[20, 31\] there, \[20\] now"),
        (SIX, ("--teacher-checkpoint", plane4), "teacher_checkpoint null there, .* now"),
        (SIX, ("--train-images", "100"), "train_images null there, 100 now"),
    ):
        outcome = call(sweep, *PAIR, "--space", space_file(contents), "--runs", tmp_path / "runs", *argv)
        assert outcome.status == 2 and outcome.err.count("\n") == 1 and re.search(differs, outcome.err), outcome
    after = listing(tmp_path / "runs")
    assert {path: time for path, time in after.items() if before.get(path) != time}.keys() <= {made.claims / ".lock"}


def test_a_failed_trial_is_noted_and_its_settings_others_are_made(make_sweep):
    made = make_sweep()
    made.record(2)
    worker = Worker(made, [], 1, print)
    first = worker.next_trial()
    made.note_failure(first.name, "exit status 1: no longer finite")
    first.claim.close()
    finish(made, worker.next_trial(), 50.0)
    assert worker.next_trial() is None
    assert [trial.state for _, trial in Draws(made).settings()] == [TrialState.FAIL]
    assert sweep.sweep.state(made.folder) == (1, 0, 2, {"000": "exit status 1: no longer finite"})


def test_a_journal_with_a_torn_last_line_is_mended(make_sweep):
    made = make_sweep()
    made.record(12)
    worker = Worker(made, [], 1, print)
    first = worker.next_trial()
    with open(made.journal, "a") as file:
        file.write('{"op_code":4,"worker_id":"tor')
    second = Worker(made, [], 1, print).next_trial()
    assert (first.number, second.number, second.setting) == (0, 1, first.setting)


def test_on_slurm_one_job_trains_the_teacher_and_an_array_the_trials(call, tmp_path):
    """The script is not run here; the command of the array is the one that was given, without what is SLURM's."""
    site = ("--account", "def-me", "--gpu-type", "h100", "--time", "3:00:00", "--workers", "10", "--trials", "20")
    outcome = call(sweep, *PAIR, "--runs", tmp_path / "runs", "--slurm", "--dry-run", *site)
    assert outcome.status == 0, outcome.err
    teacher, workers = (line for line in outcome.out.splitlines() if "sbatch" in line)
    assert "--student plane4" in teacher and "--dependency" not in teacher and "--array" not in teacher
    assert "--dependency=afterok:$teacher --kill-on-invalid-dep=yes" in workers and "--array=1-10" in workers
    assert "--gpus-per-node=h100:1" in teacher and "--gpus-per-node=h100:1" in workers
    words = shlex.split(workers.split("sweep.py")[-1].rstrip(")"))
    args = sweep.read_arguments(words)
    assert (args.trials, args.runs, args.slurm) == (20, tmp_path / "runs", None)
    assert sweep.sweep_of(args).base.teacher == "plane4"
    assert not (tmp_path / "runs").exists()
    (tmp_path / "x.pth.tar").touch()
    given = ("--teacher-checkpoint", tmp_path / "x.pth.tar")
    assert call(sweep, *PAIR, *given, "--slurm", "--dry-run").out.count("$(sbatch") == 1, "it needs no job"


# -------------------------------------------------------------------------------------------------- the ranking
@pytest.fixture(params=["sweep.py", "NNI"])
def searched(request, write_run, tmp_path):
    """The folder of a search: T 10 is best by its mean, T 4 by a single seed, and a trial of T 1 is not finished."""
    nni = request.param == "NNI"
    accuracies = {(4.0, 1): 80.0, (4.0, 2): 60.0, (10.0, 1): 75.0, (10.0, 2): 77.0, (1.0, 1): 65.0, (1.0, 2): 90.0}
    for i, ((temperature, seed), accuracy) in enumerate(accuracies.items()):
        options = {"temperature": temperature, "lambda": 0.5}
        extra = {"trial": f"t{i}"} if nni else {"validation_split": 0.0}
        origins = {"teacher": "command line", "student": "command line", "method_options": "resolved"}
        origins |= {"temperature": "tuner", "seed": "tuner", "lambda": "default of kd"}
        run = write_run(
            ("plane4", "plane2"),
            seed,
            (50.0, accuracy),
            finished=accuracy < 90,
            folder="runs" if nni else "runs/trials",
            method_options=options,
            temperature=temperature,
            teacher_checkpoint="teacher.pth.tar",
            origins=origins,
            **extra,
        )
        run.rename(run.with_name(f"{i:03}"))
    if not nni:
        (tmp_path / "runs" / "study.json").write_text(json.dumps({"sweep": {}, "trials": 7, "failed": {"006": "lost"}}))
    return tmp_path / "runs"


def test_settings_are_ranked_by_their_mean_over_seeds(searched, call):
    outcome = call(report, searched)
    assert outcome.status == 0, outcome.err
    text = (searched / "report.md").read_text()
    assert "The best setting is T 10: 76.00 ± 1.41 % on the test images (mean of 2 seeds)." in text
    assert re.findall(r"^\| \**(\d+)\** \| \**([\d of]+)\** \| \**([\d.]+(?: ± [\d.]+)?)", text, re.MULTILINE) == [
        ("10", "2", "76.00 ± 1.41"),
        ("4", "2", "70.00 ± 14.14"),
        ("1", "1 of 2", "65.00"),
    ]
    (command,) = re.findall(r"^    (python3 train.py .*)", text, re.MULTILINE)
    config = run_config.parse(shlex.split(command)[2:], elsewhere=True)
    assert (config.teacher, config.student, config.temperature, config.seed) == ("plane4", "plane2", 10, 1)
    assert config.teacher_checkpoint == "teacher.pth.tar" and config.run_dir is None
    assert (searched / "figures" / "plane2-digits-search.png").stat().st_size > 10_000
    assert "settings, of which the fullest" not in text, "trials are no path study"


def test_the_table_needs_neither_optuna_nor_torch(searched, run_command, nothing_heavy):
    outcome = run_command("sweep.py", searched, **nothing_heavy)
    if not (searched / "study.json").exists():
        assert outcome.status == 2 and "holds no sweep" in outcome.err
        return
    assert outcome.status == 0, outcome.err
    assert [line.split()[:3] for line in outcome.out.splitlines()[1:4]] == [
        ["1", "10", "2"],
        ["2", "4", "2"],
        ["3", "1", "1"],
    ]
    assert "5 of 7 trials finished, 0 in progress, 1 failed" in outcome.out and "006: lost" in outcome.err


def test_settings_are_judged_on_the_split_that_epochs_are_chosen_on(write_run, tmp_path, call):
    """By validation the second setting is the better one, by the test images the first."""
    for temperature, validation in ((2.0, 70.0), (3.0, 80.0)):
        run = write_run(
            ("plane4", "plane2"),
            1,
            (95.0 - temperature,),
            folder="runs/trials",
            method_options={"temperature": temperature, "lambda": 0.5},
            validation_split=0.1,
        )
        line = read_json(run / "metrics.jsonl") | {"validation_accuracy_percent": validation}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert call(report, tmp_path / "runs").status == 0
    text = (tmp_path / "runs" / "report.md").read_text()
    assert "| T | seeds | validation, % | test, % |" in text and "chosen on the test images" not in text
    assert "The best setting is T 3: 80.00 % on the validation images (one seed)." in text


# ------------------------------------------------------------------------------------------------- real sweeps
def check_whole(folder, seeds, trials):
    """Every trial is finished, each setting was made with each seed once, and Optuna has the means of the records."""
    runs = {path.name: read_json(path / "summary.json") for path in sorted((folder / "trials").iterdir())}
    assert list(runs) == [f"{number:03}" for number in range(trials)]
    reached = {}
    for summary in runs.values():
        setting = tuple(summary["method_options"][key] for key in ("temperature", "lambda"))
        assert summary["seed"] not in reached.setdefault(setting, {}), "made twice"
        reached[setting][summary["seed"]] = summary["best"]["accuracy_percent"]
    assert all(sorted(made) == seeds for made in reached.values())
    lines = [json.loads(line) for line in (folder / "journal.log").read_text().splitlines()]
    told = [line["values"][0] for line in lines if line.get("values")]
    assert sorted(told) == pytest.approx(sorted(statistics.fmean(made.values()) for made in reached.values()))


def process_of(lock):
    """The id of the process that holds a lock, as the file has it."""
    return int(re.search(r"process (\d+)", lock.read_text())[1])


@pytest.mark.slow
def test_two_workers_one_killed_in_mid_trial(start_command, space_file, tmp_path):
    runs = tmp_path / "runs"
    long = ("--teacher", "plane2", "--epochs", "40")
    argv = ("sweep.py", *PAIR, *long, "--space", space_file(SIX), "--runs", runs, "--trials")
    workers = [start_command(*argv, 4) for _ in range(2)]
    for name in ("000", "001"):
        wait_until((runs / "trials" / name / "last.pth.tar").exists, workers[0])  # after an epoch
    lost, training = process_of(runs / "claims" / "000"), process_of(runs / "trials" / "000" / ".lock")
    killed, other = workers if workers[0].pid == lost else reversed(workers)
    killed.kill()
    killed.wait()
    assert is_locked(runs / "claims" / "000"), "the training goes on, and nobody else may begin it"
    os.kill(training, signal.SIGKILL)
    wait_until(lambda: not is_locked(runs / "claims" / "000"))
    out, err = other.communicate(timeout=600)
    assert other.returncode == 0, err
    assert "continue  000" in out and "begin     000" not in out
    assert "continuing at epoch" in (runs / "logs" / "000.log").read_text()
    check_whole(runs, [20, 31], 4)

    third = start_command(*argv, 6)
    metrics = runs / "trials" / "004" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text(), third)
    third.send_signal(signal.SIGTERM)
    out, err = third.communicate(timeout=120)
    assert third.returncode == 143 and "stopped by SIGTERM; the same command continues" in out, err
    before = listing(runs / "trials" / "000")
    fourth = start_command(*argv, 6, "--jobs", 2)
    out, err = fourth.communicate(timeout=600)
    assert fourth.returncode == 0 and "continue  004" in out and "6 of 6 trials finished" in out, (out, err)
    assert listing(runs / "trials" / "000") == before
    check_whole(runs, [20, 31], 6)
    assert "Search of plane2 > plane2 on digits" in (runs / "report.md").read_text()


@pytest.mark.slow
def test_a_trial_that_fails_is_repeated_once_and_the_users_error_ends_the_worker(start_command, space_file, tmp_path):
    runs = tmp_path / "runs"
    argv = ("sweep.py", *PAIR, "--space", space_file(SIX), "--runs", runs, "--trials", 1)
    worker = start_command(*argv, "--learning-rate", "1e30")
    out, err = worker.communicate(timeout=300)
    assert worker.returncode == 1 and out.count("repeat    000") == 1 and out.count("failed    000") == 1, (out, err)
    assert "failed    000: exit status 1" in err and "0 of 1 trials finished, 0 in progress, 1 failed" in out
    argv = ("sweep.py", *PAIR, "--space", space_file(SIX), "--runs", tmp_path / "other", "--trials", 3)
    (tmp_path / "other" / "trials" / "000").mkdir(parents=True)
    (tmp_path / "other" / "trials" / "000" / "in the way").touch()
    worker = start_command(*argv, "--teacher-checkpoint", next((runs / "teacher").glob("*_best.pth.tar")))
    out, err = worker.communicate(timeout=300)
    assert worker.returncode == 1 and "holds files but no run" in err and err.count("\n") == 1, (out, err)
    assert out.count("begin") == 1
