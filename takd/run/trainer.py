"""One run from its settings to its summary: data, teacher, student, method, epochs, records, and continuing where it stopped.

Continuing goes by the run's own last.pth.tar: weights, optimizer, position (epoch and step), the epoch's sums so far and the
generators. Order and views are functions of (seed, epoch), so they need no saving. On the CPU with the same number of threads
and processes a continued run ends with the same bits as an undisturbed one.
"""

import contextlib
import copy
import time
from pathlib import Path

import torch

import data_loader
import model_factory
from takd.config import names, recipes
from takd.config import nni_trial as tuner
from takd.config.names import UserError
from takd.cpu import kernels
from takd.distill import methods as losses
from takd.distill.teacher import Teacher, attach_table
from takd.images import augmentation
from takd.run import checkpoint, engine
from takd.run import cuda_graph as graphs
from takd.run import distributed as parallel
from takd.run import run_directory as runlog


def native_bf16(device):
    """Whether the hardware multiplies bf16 itself; elsewhere it is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags  # the last is Arm's spelling


def weights_digest(path):
    """Identity of the network in a checkpoint file, wherever it lies and whatever else it holds."""
    return checkpoint.digest(checkpoint.weights_of(checkpoint.read(path), path))


class Session:
    """Everything of a run that lives in memory. Building it reads and checks; it writes nothing."""

    def __init__(self, settings, recorded, device, console, world=None):
        kernels.keep_freed_memory()
        self.settings, self.console, self.world = settings, console, world or parallel.World()
        self.device = torch.device(device)
        torch.backends.cudnn.benchmark = True  # a run's shapes are few and come again and again
        self.precision = settings["precision"]
        if self.precision == "auto":
            chosen = "bf16" if native_bf16(self.device) else "fp32"
            self.precision = (recorded or {}).get("environment", {}).get("precision", chosen)
        self.kernels = kernels.available(engine.input_dtype(self.precision))
        self._load_data()
        self.teacher, self.teacher_about = None, {}
        if "teacher" in settings:
            self._load_teacher()
        torch.manual_seed(settings["seed"])
        self.student = model_factory.create_network(
            settings["student"], len(self.train.classes), self.train.image_size,
            pretrained=bool(settings.get("pretrained") and names.torchvision_name(settings["student"])),
        )  # fmt: skip
        if "initialisation" in settings:
            model_factory.INITIALISATIONS[settings["initialisation"]](self.student)
        self._check_smallest_batch()
        self.student.to(self.device, memory_format=torch.channels_last)
        self.method = losses.CrossEntropy()
        if self.teacher:  # after the student, whose first weights are then the same whatever the method
            teacher = self.teacher
            self.method = build_method(settings, self.student, teacher.exact, self.train, (teacher.mean, teacher.std, teacher.image_size))
        self.method.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            [*self.student.parameters(), *self.method.parameters()],
            lr=settings["learning_rate"],
            momentum=settings["momentum"],
            nesterov=settings["nesterov"],
            weight_decay=settings["weight_decay"],
            fused=True,
        )
        self.path = [*self.teacher_about.get("path", [settings["teacher"]] if self.teacher else []), settings["student"]]
        self.epoch, self.step = 0, 0  # the next step to train
        self.sums = engine.EpochSums()
        self.best = None  # the record of the best epoch so far
        self.graph = None  # steps as CUDA graphs, where that is possible

    def _load_data(self):
        settings, say = self.settings, self.console.say
        download = settings.get("download", True)
        splits = data_loader.load_parts(settings["dataset"], settings["dataset_dir"], download, say, settings.get("image_size"))
        self.train, self.test, self.validation = splits["train"], splits["test"], splits.get("validation")
        if settings["validation_split"]:
            if self.validation:
                raise UserError(f"{settings['dataset_dir']} has a val folder, which selects the epoch; leave --validation-split away")
            self.train, self.validation = data_loader.held_out(self.train, settings["validation_split"])
        if "train_images" in settings:
            self.train = data_loader.fewer(self.train, settings["train_images"])
        if self.validation:
            self.validation = self.validation.to(self.device)
        self.train, self.test = self.train.to(self.device), self.test.to(self.device)
        self.selection_split = "validation" if self.validation else "test"
        held = f", {len(self.validation)} held out to select the epoch" if self.validation else ""
        size = self.train.image_size
        shown = f", {size}x{size}" if size != 32 else ""
        say(f"data      {settings['dataset']}: {len(self.train)} images to train, {len(self.test)} to test{held}{shown}")

    def _check_smallest_batch(self):
        """One image has no variance where a network's maps have shrunk to one pixel: said now, not at an epoch's last step."""
        size = self.settings["batch_size"]
        if (len(self.train) % size or size) == 1:
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=()):
                    copy.deepcopy(self.student).train()(torch.zeros(1, 3, self.train.image_size, self.train.image_size))
            except ValueError:
                raise UserError(
                    f"--batch-size {size} leaves one of {len(self.train)} images for the last step, too few for the batch norm of "
                    f"{self.settings['student']} at this --image-size; change one of them"
                ) from None

    def _load_teacher(self):
        settings = self.settings
        network, about = model_factory.load_network(settings["teacher_checkpoint"], settings["teacher"])
        if about["classes"] != len(self.train.classes):
            raise UserError(
                f"{settings['teacher_checkpoint']} tells {about['classes']} classes apart, {settings['dataset']} has "
                f"{len(self.train.classes)}; give a teacher trained on {settings['dataset']}"
            )
        if data_loader.class_order(about.get("class_names"), self.train.classes):
            raise UserError(
                f"{settings['teacher_checkpoint']} has the classes of {settings['dataset']} in another order than "
                f"{settings['dataset_dir']}; train the teacher on these very folders"
            )
        if settings["dataset"] == about.get("dataset") == "folder" and about["class_names"] != list(self.train.classes):
            raise UserError(f"{settings['teacher_checkpoint']} knows other classes than {settings['dataset_dir']}: train its teacher there")
        self.teacher_about = about
        needs_features = getattr(losses.find(settings["method"]), "needs_features", True)
        self.teacher = Teacher(network, about["mean"], about["std"], self.train, self.device, self.precision, needs_features,
                               about["image_size"])  # fmt: skip
        comparable = about.get("dataset", settings["dataset"]) == settings["dataset"]
        recorded = about.get("test_accuracy_percent") if comparable else None
        self.teacher_percent = self.teacher.score(self.test, settings["teacher_checkpoint"], recorded, self.console.say)

    @property
    def finished(self):
        return self.epoch >= self.settings["epochs"]

    @property
    def asked(self):
        """The teacher as training asks it; None where there is none or the method, base, does not hear it."""
        return None if self.settings.get("method") == "base" else self.teacher

    def describe(self):
        settings, say = self.settings, self.console.say
        fused = "" if self.device.type != "cpu" or self.kernels else ", no C compiler: PyTorch's own batch norm, slower"
        processes = f"{self.world.size} processes of " if self.world.size > 1 else ""
        say(f"device    {self.device.type}, {self.precision}, {processes}{torch.get_num_threads()} threads{fused}")
        say(f"student   {settings['student']}, {model_factory.count_parameters(self.student):,} parameters")
        if self.teacher:
            options = ", ".join(f"{key} {value}" for key, value in settings["method_options"].items())
            heard = f" from {settings['teacher']}" if settings["method"] != "base" else ", the labels alone: the teacher is not heard"
            say(f"method    {settings['method']}{heard}{f' ({options})' * bool(options)}")
        milestones = " ".join(map(str, settings["milestones"]))
        falls = f" x{settings['learning_rate_decay']:g} at {milestones}" if milestones else ""
        say(
            f"recipe    {settings['recipe']}: {settings['epochs']} epochs of batches of {settings['batch_size']}, rate "
            f"{settings['learning_rate']:g}{falls}, momentum {settings['momentum']:g}{' (Nesterov)' * settings['nesterov']}, "
            f"weight decay {settings['weight_decay']:g}, augmentation {settings['augment']}, seed {settings['seed']}"
        )

    # ---------------------------------------------------------------------------------- saving and restoring
    def network_contents(self, record):
        """A checkpoint of the student as the released code writes it, and what evaluate.py and later runs want to know."""
        return {
            "model_state_dict": {key: value.contiguous() for key, value in self.student.state_dict().items()},
            "optimizer_state_dict": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "model": self.settings["student"],
            "classes": len(self.train.classes),
            "class_names": list(self.train.classes),
            "image_size": self.train.image_size,
            "dataset": self.settings["dataset"],
            "mean": list(self.train.mean),
            "std": list(self.train.std),
            "path": self.path,
            "seed": self.settings["seed"],
            **{key: value for key, value in record.items() if key.endswith("accuracy_percent") and not key.startswith("train")},
        }

    def save(self, file):
        """Everything that continuing needs. Every process calls this, rank 0 writes, and the others wait until it is there."""
        if self.world.size > 1:
            self.sums.unite(self.world.total)
        if self.world.first:
            self._write(file)
        self.world.barrier()

    def _write(self, file):
        contents = self.network_contents(self.best or {})
        contents |= {
            "method_state_dict": self.method.state_dict(),
            "step": self.step,
            "sums": self.sums.state(),
            "best": self.best,
            "random_state": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            contents["cuda_random_state"] = torch.cuda.get_rng_state()
        checkpoint.save(contents, file)

    def restore(self, file):
        contents = checkpoint.read(file)
        model_factory.load_weights(self.student, contents["model_state_dict"])
        self.optimizer.load_state_dict(contents["optimizer_state_dict"])
        self.method.load_state_dict(contents["method_state_dict"])
        self.epoch, self.step, self.best = contents["epoch"], contents["step"], contents["best"]
        sums = contents["sums"]
        self.sums = engine.EpochSums(**sums | {"rows": [row.to(self.device) for row in sums["rows"]]})
        torch.set_rng_state(contents["random_state"])
        if self.device.type == "cuda" and "cuda_random_state" in contents:
            torch.cuda.set_rng_state(contents["cuda_random_state"])


def build_method(settings, student, teacher, split, teacher_sees):
    """The run's method for two networks: they show it their Features of two of the split's images, in evaluation mode.

    `teacher_sees`: mean, std and image size of the teacher's own.
    """
    images, shown = split.take(torch.arange(2)), []
    for network, seen in ((student, (split.mean, split.std, split.image_size)), (teacher, teacher_sees)):
        with torch.no_grad():
            shown.append(network.eval().forward_features(data_loader.normalise(images, *seen)))
    return losses.build(settings["method"], settings["method_options"], *shown, split.labels)


def check_method(settings):
    """A UserError where the method cannot be had for these networks: told before a teacher is trained for it, on random weights."""
    data = names.DATASETS[settings["dataset"]]
    classes, size = data.classes or 10, settings.get("image_size", data.image_size)
    labels, images = torch.arange(2 * classes) % classes, torch.zeros(2, 3, data.image_size, data.image_size, dtype=torch.uint8)
    split = data_loader.Split("random", images, labels, tuple(range(classes)), data.mean, data.std, size)
    networks = [model_factory.create_network(settings[key], classes, size) for key in ("student", "teacher")]
    build_method(settings, *networks, split, (data.mean, data.std, size))


# ------------------------------------------------------------------------------------------------ the epochs
def fit(session, directory, recorded, origins, identity, signals):
    """Train from where the run stands to its end; returns the summary."""
    settings, console, world = session.settings, session.console, session.world
    if recorded and directory.last_file.is_file():
        session.restore(directory.last_file)
    session.describe()
    where = f"epoch {session.epoch}, step {session.step}"
    console.say(f"run       {directory.path}{f' (continuing at {where})' if recorded else ''}")
    config = identity | settings | {"origins": origins, "path": session.path, "argv": _argv()}
    config["environment"] = runlog.environment(session.device) | {
        "precision": session.precision,
        "kernels": session.kernels,
        "processes": world.size,
    }
    before = {"processes": 1} | recorded["environment"] if recorded else config["environment"]
    changed = [key for key in ("threads", "kernels", "torch", "processes") if before.get(key) != config["environment"][key]]
    if changed:
        console.say(f"note: {' and '.join(changed)} changed since the run began: rounding will differ from an undisturbed run")
    if world.first:
        directory.start(config, session.epoch)
    if session.asked or session.teacher and settings["teacher_cache"] != "auto":
        world.in_turn(lambda: attach_table(session.teacher, session.train, settings["augment"], settings["teacher_cache"],
                                           settings["teacher_checkpoint"], settings["epochs"], console.say))  # fmt: skip
    learner, lesson = world.wrap(session.student, session.method)
    session.graph = step_graph(session)
    name = f"{names.file_name(settings['student'])}_{settings.get('trial', 'seed' + str(settings['seed']))}_best.pth.tar"
    # Processes of a group stop where they agreed upon it and nowhere else: one that left alone would leave the others waiting.
    with signals.deferred() if world.size > 1 else contextlib.nullcontext():
        while not session.finished:
            train_one_epoch(session, learner, lesson, directory, signals)
            try:
                record = evaluated_record(session)
            except checkpoint.Stopped:
                session.save(directory.last_file)
                tell_stop(session)
                raise
            with signals.deferred():
                close_epoch(session, directory, record, directory.path / name)
            if stop := world.highest(signals.received or 0):
                tell_stop(session)
                raise checkpoint.Stopped(stop)
    directory.close()
    summary = world.shared(lambda: summarise(session, directory, directory.path / name))
    if world.first:
        directory.finish(summary)
    console.say(f"done      {closing(summary)} in {runlog.duration(summary['seconds'])}; {directory.path}")
    return summary


GO_ON, SAVE, STOP = 0, 1, 2  # after a step; stopping is STOP + the signal's number, and the processes do the greatest


def step_graph(session):
    """Steps as CUDA graphs, where they never need the host; else None, and on a GPU a line that says why."""
    if session.device.type != "cuda" or session.settings.get("cuda_graph") is False:
        return None
    table = session.asked and session.asked.table
    reasons = {
        "several processes share them": session.world.size > 1,
        "the images do not fit on the GPU": session.train.images.device != session.train.device,
        "endless views are made by other processes": augmentation.VIEWS[session.settings["augment"]] is None,
        "the teacher's table is filled as batches ask": table and table.resident is None,
    }
    if why := next((reason for reason, holds in reasons.items() if holds), None):
        return session.console.say(f"steps     kernel by kernel, without a CUDA graph: {why}")
    session.console.say("steps     as CUDA graphs")
    return graphs.StepGraph((session.student, session.method), session.optimizer, session.console.say)


def train_one_epoch(session, learner, lesson, directory, signals):
    """The steps of the current epoch that are still to do. A signal ends it after a step, with everything saved.

    `learner` and `lesson` are the session's student and method as World.wrap gives them.
    """
    settings, world = session.settings, session.world
    if hasattr(type(session.method), "epoch"):
        session.method.epoch = session.epoch
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate(session)
    steps = data_loader.steps_per_epoch(session.train, settings["batch_size"])
    order = session.train, settings["batch_size"], settings["augment"], settings["seed"], session.epoch, session.step
    if session.graph:
        batches = data_loader.train_draws(*order)
    else:
        batches = data_loader.train_batches(*order, world.rank, world.size, settings.get("workers", data_loader.usual_workers()))
    if session.asked and session.asked.table:
        plan = data_loader.epoch_plan(session.train, settings["augment"], settings["seed"], session.epoch)
        parts = data_loader.train_parts(len(session.train), settings["batch_size"], session.step, world.rank, world.size)
        rows = torch.tensor([row for rows, _ in parts for row in range(rows.start, rows.stop)], dtype=torch.int64)
        session.asked.table.expect(plan.order[rows], plan.views[rows])
    saved = time.monotonic()
    with session.console.progress(session.epoch, steps, session.step, settings["batch_size"]) as advance:

        def after_step():
            nonlocal saved
            session.step += 1
            advance()
            due = SAVE if time.monotonic() - saved > 60 * settings["save_minutes"] else GO_ON
            decision = world.highest(STOP + signals.received if signals.received else due)
            if decision == SAVE:
                session.save(directory.last_file)
                saved = time.monotonic()
            return decision > SAVE

        with signals.deferred():
            engine.train_epoch(learner, lesson, session.asked, session.optimizer, session.train, world.noting(batches),
                               session.sums, session.precision, after_step, session.graph)  # fmt: skip
            stop = world.highest(signals.received or 0)
            if stop:
                session.save(directory.last_file)
            elif world.size > 1:
                session.sums.unite(world.total)
    if stop:
        tell_stop(session)
        raise checkpoint.Stopped(stop)


def tell_stop(session):
    session.console.say(f"stopped at epoch {session.epoch}, step {session.step}; the same command continues")


def learning_rate(session):
    settings = session.settings
    return recipes.learning_rate_at(
        session.epoch, settings["learning_rate"], settings["milestones"], settings["learning_rate_decay"]
    )


def evaluated_record(session):
    """The epoch's line for metrics.jsonl. Evaluation is float32 whatever the training was, so that evaluate.py agrees."""
    started = time.perf_counter()
    try:
        record = {"epoch": session.epoch, "learning_rate": learning_rate(session), **session.sums.summary()}
    except engine.Diverged as error:
        raise engine.Diverged(
            f"the loss is no longer a number at epoch {session.epoch}, {error}; a lower --learning-rate "
            f"(now {learning_rate(session):g}) usually helps"
        ) from None
    for name, split in (("validation", session.validation), ("test", session.test)):
        if split is not None:
            result = engine.score(engine.predict(session.student, split), split.labels)
            record |= {f"{name}_loss": result["loss"], f"{name}_accuracy_percent": result["accuracy_percent"]}
    return record | {"evaluation_seconds": time.perf_counter() - started}


def close_epoch(session, directory, record, best_file):
    """Records first, then the best network, then the state to continue from: a crash between them repeats the epoch."""
    key = f"{session.selection_split}_accuracy_percent"
    best = session.best is None or record[key] > session.best[key]
    if best:
        session.best = record
    if session.world.first:
        directory.log(record)
        if "trial" in session.settings:  # not so for a teacher that a trial trains first: the tuner would take it for the student
            tuner.report_epoch(record[key])
        if best:
            checkpoint.save(session.network_contents(record), best_file)
        done = directory.records()
        seconds = sum(line["train_seconds"] + line["evaluation_seconds"] for line in done)
        left = seconds / len(done) * (session.settings["epochs"] - session.epoch - 1)
        session.console.row(record, session.settings["epochs"], left)
    session.epoch, session.step, session.sums = session.epoch + 1, 0, engine.EpochSums()
    session.save(directory.last_file)


def summarise(session, directory, best_file):
    """summary.json: what the run was, its best and its last epoch, and on which split the best was chosen."""
    settings, records = session.settings, directory.records()

    def outcome(record):
        kept = ("epoch", "train_loss", "train_accuracy_percent", "validation_loss", "validation_accuracy_percent", "test_loss",
                "test_accuracy_percent")  # fmt: skip
        return {key: record[key] for key in kept if key in record} | {
            "split": session.selection_split,
            "accuracy_percent": record[f"{session.selection_split}_accuracy_percent"],
        }

    return {
        "model": settings["student"],
        "dataset": settings["dataset"],
        "path": session.path,
        "teacher": settings.get("teacher"),
        "teacher_test_accuracy_percent": session.teacher_percent if session.teacher else None,
        "method": settings.get("method"),
        "method_options": settings.get("method_options"),
        "recipe": settings["recipe"],
        "seed": settings["seed"],
        "epochs": settings["epochs"],
        "parameters": model_factory.count_parameters(session.student),
        "selection_split": session.selection_split,
        "best": outcome(session.best),
        "last": outcome(records[-1]),
        "seconds": sum(line["train_seconds"] + line["evaluation_seconds"] for line in records),
        "checkpoint": str(best_file),
        "run_dir": str(directory.path),
    }


def closing(summary):
    best, last = summary["best"], summary["last"]
    chosen = f", chosen on {best['split']}" if best["split"] != "test" else ""
    return (
        f"{' > '.join(summary['path'])} on {summary['dataset']}: test {best['test_accuracy_percent']:.2f} % at its best epoch "
        f"({best['epoch']}{chosen}), {last['test_accuracy_percent']:.2f} % at its last"
    )


def _argv():
    import sys

    return sys.argv
