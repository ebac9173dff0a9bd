#!/usr/bin/env python3
"""Train a network, or distil one from a teacher, directly or through assistants (Mirzadeh et al., AAAI 2020).

  python3 train.py --student plane10 --dataset digits --epochs 10               cross-entropy only, the paper's NOKD
  python3 train.py --teacher plane10 --student plane2 --dataset digits --epochs 10
  python3 train.py --teacher resnet110 --teacher-checkpoint FILE --student resnet20 --dataset cifar100 --cuda 1
  torchrun --nproc-per-node 2 train.py --student resnet20                       as --cuda 2: two GPUs share each batch

Without --teacher-checkpoint the teacher is trained first, with its own recipe, and its run is kept. The same command
again continues an interrupted run, or reports that it is finished. Everything is written to --run-dir.
"""

from takd import process

if __name__ == "__main__":
    process.start()

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from takd.config import flags, names, nni_trial, run_config
from takd.config.run_config import RunConfig
from takd.run import launch

if __name__ == "__main__":  # usage errors are reported before torch is imported, which takes seconds
    STDOUT = sys.stdout  # importing nni in a trial replaces it
    with process.rank_zero_output():
        CONFIG = run_config.parse(sys.argv[1:], __doc__)
    flags.check_packages("train.py", "torch", "torchvision", "numpy")
    if (CONFIG.cuda or 0) > 1 and process.place().size == 1:
        command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:]]
        sys.exit(launch.launch(CONFIG.cuda, command, lambda line: flags.fail("train.py", line, 1)))

import torch
from torch import nn

import data_loader
import model_factory
from takd.distill import evaluation, methods
from takd.distill.logit_table import choose_cache, features_cache
from takd.distill.methods import Logits
from takd.distill.teacher import Progress, Teacher, Teachers, members, no_progress
from takd.errors import UserError
from takd.files import Say
from takd.images.augmentation import VIEWS
from takd.images.folder import folder_digest
from takd.images.split import Batch, Split, Transform, class_order
from takd.process import Stopped, StopSignals
from takd.run import checkpoint, engine, saved
from takd.run.console import Console, defaults_line, setup_lines
from takd.run.cuda_graph import WARM_UP, StepGraph
from takd.run.distributed import World, join, part_of
from takd.run.engine import TrainStep
from takd.run.run_directory import RunDirectory
from takd.run.trainer import Context, Trainer, hardware_notes, outcome_line, repetition_line

ITS_OWN = "its own run"  # the origin of the checkpoint of a teacher that was trained first
SMALLER = "a smaller --batch-size, --teacher-cache live, or fewer runs at once (--jobs) need less"


def main(argv: list[str] | None = None) -> None:
    stdout, config = (STDOUT, CONFIG) if argv is None else (sys.stdout, run_config.parse(argv, __doc__))
    with flags.errors_in_one_line("train.py"), evaluation.out_of_memory(SMALLER):
        evaluation.check_gpu(config.device)
        if config.measure:
            return measure(config)
        world = join(config.device)
    stream = sys.stderr if config.json else sys.stdout
    console = Console(stream if world.is_rank_zero else open(os.devnull, "w"))
    summaries: list[dict[str, Any]] = []
    if line := defaults_line(config):
        console.say(line)
    try:
        with StopSignals() as signals, evaluation.out_of_memory(SMALLER):
            context = Context(world, console, signals)
            check_folders(config, world)
            if config.teacher and not config.teacher_checkpoint:
                config = train_teacher_first(config, context)
            for each in config.repetitions():
                summaries.append(run(each, context))
    except Stopped as stop:
        world.end(stop.code)
    except (UserError, engine.Diverged, OSError, MemoryError) as error:
        begun = summaries or config.origins.get("teacher_checkpoint") == ITS_OWN
        status = 2 if isinstance(error, UserError) and not begun else 1  # 2: nothing was written
        world.end(flags.fail("train.py", error, status) if world.claims_error() else status)
    except RuntimeError as error:
        if not world.is_peer_failure(error):
            raise
        world.end(launch.PEER_FAILED)  # the process that failed prints why
    world.leave()
    if config.trial and world.is_rank_zero:
        nni_trial.report_final(summaries[0]["best"]["accuracy_percent"])
    if config.repeat:
        console.say(repetition_line(summaries))
    if config.json and world.is_rank_zero:
        for summary in summaries:
            print(json.dumps(summary), file=stdout)


# ---------------------------------------------------------------------------------------------------- a run
def run(config: RunConfig, context: Context, wait: bool = False) -> dict[str, Any]:
    """One training, begun or continued. Returns its summary.

    In a group of processes all call this and get the same summary. `wait`: if another process is making the same
    run, wait for it. Raises UserError, engine.Diverged where the loss is no longer finite, Stopped on a signal.
    """
    world, console, signals = context
    if config.without_effect:
        proposed = ", ".join(f"{key} {value:g}" for key, value in config.without_effect.items())
        console.say(f"note: the tuner's {proposed} have no effect without --teacher")
    config = world.broadcast(lambda: with_digests(config))
    directory = RunDirectory(config.run_path)

    def earlier():
        """The config and the summary of this run from an earlier start."""
        return recorded_of(directory, config), directory.summary()

    recorded, summary = world.broadcast(earlier)
    if summary:
        world.broadcast(lambda: saved.check_finished(config, directory, summary, console.say))
        console.say(f"finished  {directory.path} (best {outcome_line(summary)})")
        return summary

    check_fit(config)
    splits = world.rank_zero_first(lambda: data_loader.load(config, console.say))
    precision, cpu, teacher = actual_precision(config, recorded), cpu_annex(config), None
    for line in hardware_notes(config.device, precision, world.size, splits.train.image_size):
        console.say(line)
    if config.teacher:
        teacher = world.rank_zero_first(
            lambda: load_teacher(config, splits, precision, cpu, console.say, console.progress)
        )
    step = assemble(config, splits.train, teacher, precision, cpu)
    wants_table = teacher and (step.active_teacher or config.teacher_cache != "auto")
    for each, file in zip(members(teacher), config.teacher_checkpoints, strict=True) if wants_table else ():
        each.choose_table(splits.train, config.augment, config.teacher_cache, file)

    with directory.claim(wait, console.say) if world.is_rank_zero else contextlib.nullcontext():
        recorded, summary = world.broadcast(earlier)  # whoever held the lock may have finished it, or was stopped
        if summary:
            return summary
        where, parameters = hardware(config, precision, world.size, cpu), evaluation.count_parameters(step.student)
        for line in setup_lines(config, where, parameters):
            console.say(line)
        trainer = Trainer(config, splits, step, directory, context)
        trainer.resume(recorded, {"processes": world.size} | ({"kernels": cpu.kernels.version()} if cpu else {}))
        for each in members(teacher) if world.is_rank_zero else ():
            each.keep_score()
        if teacher and wants_table:
            world.rank_zero_first(lambda: attach_tables(config, teacher, splits.train, console.say))
        step.distribute(world)
        trainer.take_step = step_graph(config, step, world.size, console.say) or step
        # Processes of a group stop where they agreed upon it and nowhere else: the others would wait for one that left.
        with signals.deferred() if world.size > 1 else contextlib.nullcontext(), recorded_failure(directory, world):
            for epoch in range(trainer.epoch, config.epochs):  # the first perhaps from its middle on
                trainer.train(epoch)
                record = trainer.evaluate(epoch)
                trainer.save(record)
        return trainer.summary()


@contextlib.contextmanager
def recorded_failure(directory: RunDirectory, world: Any) -> Iterator[None]:
    """An error that ends the run is recorded in its folder, for reports."""
    try:
        yield
    except (engine.Diverged, MemoryError, torch.cuda.OutOfMemoryError) as error:
        if world.is_rank_zero:
            directory.fail(str(error) or type(error).__name__)
        raise


def train_teacher_first(config: RunConfig, context: Context) -> RunConfig:
    """The configuration with a teacher trained for it; errors in the student's part are raised before that.

    Of several teachers the last is trained, as the student of those before it, for which the same holds.
    """
    check_folders(config, context.world)
    train, last = check_fit(config), config.teacher_config()
    if not needs_features(config) and not last.best_file.exists():
        choose_cache(train, config.augment, config.teacher_cache, last.best_file / "table")
    if last.teacher:
        last = train_teacher_first(last, context)
    else:
        context.console.say(f"Training the teacher {last.student} first:")
    summary = run(last, context, wait=True)
    context.console.say(f"Training the student {config.student}:")
    files = [*last.teacher_checkpoints, summary["checkpoint"]]
    return config.replace(ITS_OWN, teacher_checkpoint=files if last.teacher else files[0])


def recorded_of(directory: RunDirectory, config: RunConfig) -> dict[str, Any] | None:
    """The config of an earlier start of this run; a UserError if the folder holds another run."""
    directory.check_length(config)
    return directory.check(config)


def check_folders(config: RunConfig, world: World) -> None:
    """A UserError if one of the run's folders, known where --run-dir is given, holds another run."""
    for each in config.repetitions() if config.run_dir else ():
        world.broadcast(lambda each=each: recorded_of(RunDirectory(each.run_path), each))


def with_digests(config: RunConfig) -> RunConfig:
    """The configuration with digests of the files that the outcome depends on."""
    if config.dataset == "folder":  # the name does not identify the images
        config = config.replace(images=folder_digest(config.dataset_dir))
    if config.teacher:
        digests = [checkpoint.weights_digest(file) for file in config.teacher_checkpoints]
        config = config.replace(teacher_weights=digests if len(digests) > 1 else digests[0])
    if config.init_from:
        config = config.replace(init_weights=checkpoint.weights_digest(config.init_from))
    return config


def actual_precision(config: RunConfig, recorded: dict[str, Any] | None) -> str:
    """ "bf16", "tf32" or "fp32"; a continued run keeps what it began with."""
    native = evaluation.native_bf16(torch.device(config.device or "cpu"))
    if config.precision == "tf32" and not native:
        raise UserError("--precision tf32: this GPU has no TF32 (those of compute capability 8.0 on have); use fp32")
    if config.precision != "auto":
        return config.precision
    return (recorded or {}).get("environment", {}).get("precision", "bf16" if native else "fp32")


def cpu_annex(config: RunConfig) -> Any:
    """takd.cpu for a run on a CPU, None on a GPU or where its folder was removed."""
    if config.device != "cpu":
        return None
    try:
        import takd.cpu.kernels  # a module: an empty folder, left by git with its __pycache__, is a package to Python
    except ImportError:
        return None
    takd.cpu.keep_freed_memory()
    return takd.cpu


def hardware(config: RunConfig, precision: str, processes: int, cpu: Any) -> str:
    """What the run computes on, in one line."""
    several = f"{processes} processes of " if processes > 1 else ""
    slower = ", no C compiler: PyTorch's own batch norm, slower" if cpu and not cpu.kernels.available() else ""
    return f"{config.device}, {precision}, {several}{torch.get_num_threads()} threads{slower}"


# --------------------------------------------------------------------------- teacher, student, method, optimiser
def load_teacher(
    config: RunConfig, splits: data_loader.Splits, precision: str, cpu: Any, say: Say, progress: Progress = no_progress
) -> Teacher | Teachers:
    """The run's frozen teachers, scored on the test images."""
    loaded = []
    for name, file in zip(config.teachers, config.teacher_checkpoints, strict=True):
        network, transform, metadata = teacher_network(config, name, file, splits.train)
        teacher = Teacher(network, transform, splits.train, precision, needs_features(config), cpu and cpu.pack)
        teacher.label = f"{name}: " if len(config.teachers) > 1 else ""
        teacher.path = metadata.get("path", [name])
        same_images = metadata.get("dataset", config.dataset) == config.dataset and not config.test_images
        recorded_percent = metadata.get("test_accuracy_percent") if same_images else None
        teacher.score(splits.test, file, recorded_percent, say, bool(config.any_teacher), progress)
        loaded.append(teacher)
    return Teachers(loaded) if len(loaded) > 1 else loaded[0]


def teacher_network(config: RunConfig, name: str, file: str, train: Split) -> tuple[Any, Transform, dict[str, Any]]:
    """(network, transform, metadata) of a checkpoint; a UserError unless it was trained for these classes."""
    network, metadata = model_factory.load(file, name)
    class_names = metadata.get("class_names")
    if metadata["classes"] != len(train.classes):
        what = f"{metadata['classes']} classes; {config.dataset} has {len(train.classes)}"
        raise UserError(f"{file} was trained for {what}; give a teacher trained on {config.dataset}")
    if class_order(class_names, train.classes):
        what = f"the classes of {config.dataset} in another order than {config.dataset_dir}"
        raise UserError(f"{file} has {what}; train the teacher on the same folders")
    if config.dataset == metadata.get("dataset") == "folder" and class_names != list(train.classes):
        what = f"other classes than those of {config.dataset_dir}"
        raise UserError(f"{file} was trained on {what}: train its teacher there")
    other_data = metadata.get("dataset", config.dataset) != config.dataset
    if other_data and class_names and set(class_names) != set(train.classes):
        what = f"on {metadata['dataset']}, and this run is on {config.dataset}, which has other classes"
        raise UserError(f"{file} was trained {what}; give a teacher trained on {config.dataset}")
    transform = Transform(tuple(metadata["mean"]), tuple(metadata["std"]), metadata["image_size"] or train.image_size)
    return network, transform, metadata


def needs_features(config: RunConfig) -> bool:
    """Whether the method uses more of the teacher than its logits."""
    return getattr(methods.find(config.method), "needs_features", True)


def assemble(
    config: RunConfig, train: Split, teacher: Teacher | Teachers | None, precision: str, cpu: Any
) -> TrainStep:
    """The optimisation step of a run: its student, method and optimizer."""
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True  # a run has few shapes, which recur
    student = model_factory.create(config.student, len(train.classes), train.image_size, pretrained(config))
    if config.initialisation:
        model_factory.INITIALISATIONS[config.initialisation](student)
    if config.init_from:
        model_factory.start_from(config.init_from, config.student, student, train.classes)
    check_smallest_batch(config, student, train)
    student.to(train.device, memory_format=torch.channels_last)
    if cpu:
        cpu.accelerate(student)
    # After the student, whose initialisation is then the same whatever the method:
    method = methods.CrossEntropy()
    if teacher:
        method = build_method(config, student, [(each.exact, each.transform) for each in members(teacher)], train)
    if config.label_smoothing:
        method.label_smoothing = config.label_smoothing
    method.to(train.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        [*student.parameters(), *method.parameters()],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return TrainStep(student, method, teacher, optimizer, train, precision)


def pretrained(config: RunConfig) -> bool:
    """Whether the student, and not only a teacher trained first, begins with pretrained weights."""
    return bool(config.pretrained and names.has_pretrained(config.student))


def build_method(config: RunConfig, student: Any, teachers: Sequence[tuple[Any, Transform]], train: Split) -> nn.Module:
    """The run's method, its parameters sized by the networks' Features of two images, each normalised for it."""
    images = train.take(torch.arange(2))
    with torch.no_grad():
        own, *theirs = (
            network.eval().forward_features(transform(images))
            for network, transform in ((student, train.transform), *teachers)
        )
    teacher = theirs[0] if len(theirs) == 1 else Logits(torch.stack([each.logits for each in theirs]))
    return methods.build(config.method, config.method_options, own, teacher, train.labels)


def check_fit(config: RunConfig) -> Split:
    """The training images without their pixels. A UserError if networks, method and images do not fit each other: found
    before images are decoded or fetched and before a teacher is trained, which has random weights here."""
    train = data_loader.outline(config).train
    student = model_factory.create(config.student, len(train.classes), train.image_size, pretrained(config))
    check_smallest_batch(config, student, train)
    teachers = []
    if config.teacher_checkpoint:
        pairs = zip(config.teachers, config.teacher_checkpoints, strict=True)
        teachers = [teacher_network(config, name, file, train)[:2] for name, file in pairs]
    else:
        each = config
        while each.teacher:
            each = each.teacher_config()
            images = data_loader.outline(each).train
            network = model_factory.create(each.student, len(images.classes), images.image_size)
            teachers.insert(0, (network, images.transform))
    if teachers:
        build_method(config, student, teachers, train)
        if needs_features(config):
            features_cache(str(config.teacher_cache))
    return train


def check_smallest_batch(config: RunConfig, student: nn.Module, train: Split) -> None:
    """Batch norm fails on one image whose maps have shrunk to one pixel: an error now, not at an epoch's last step."""
    size = config.batch_size
    if (len(train) % size or size) != 1:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            copy.deepcopy(student).train()(torch.zeros(1, 3, train.image_size, train.image_size))
    except ValueError:
        left = f"leaves one of {len(train)} images for the last step"
        why = f"too few for the batch norm of {config.student} at this --image-size"
        raise UserError(f"--batch-size {size} {left}, {why}; change one of them") from None


def attach_tables(config: RunConfig, teacher: Teacher | Teachers, train: Split, say: Say) -> None:
    for each, file in zip(members(teacher), config.teacher_checkpoints, strict=True):
        each.attach_table(train, config.augment, config.teacher_cache, file, say)


def step_graph(config: RunConfig, step: TrainStep, processes: int, say: Say) -> StepGraph | None:
    """Steps as CUDA graphs, where they never need the host; else None, and on a GPU a line with the reason."""
    if config.device != "cuda" or config.cuda_graph is False:
        return None
    tables, images = [each.table for each in members(step.active_teacher) if each.table], step.split.images
    reasons = {
        "several processes share a step": processes > 1,
        "the images do not fit on the GPU": images.device != step.split.device,
        "random augmentation runs in other processes": VIEWS[config.augment] is None,
        "a teacher's table does not fit on the GPU": any(table.resident is None for table in tables),
    }
    if why := next((reason for reason, holds in reasons.items() if holds), None):
        say(f"steps     kernel by kernel, without a CUDA graph: {why}")
        return None
    say("steps     as CUDA graphs")
    return StepGraph(step, say, min(config.batch_size, len(images)))


# ------------------------------------------------------------------------------------- several runs, measurements
def measure(config: RunConfig) -> None:
    """For each network of --measure a JSON line: images per second in training and evaluation, and parameters."""
    if names.DATASETS[config.dataset].classes is None:
        why = "only data sets of a known size can be measured"
        sys.exit(flags.fail("train.py", f"--measure --dataset {config.dataset}: {why}", 2))
    precision, cpu = actual_precision(config, None), cpu_annex(config)
    split = data_loader.random_split(config.dataset, config.image_size, 8 * config.batch_size).to(config.device)
    for name in config.measure:
        step = assemble(config.replace(student=name), split, None, precision, cpu)
        graph = step_graph(config, step, 1, lambda line: None)
        training_rate(step, graph or step, least=WARM_UP + 2 if graph else 1)  # not timed: it includes the capture
        rate = training_rate(step, graph or step, seconds=1.5)
        evaluation.predict(step.student, split.subset(slice(0, 100), "random"))  # warm-up
        started = time.perf_counter()
        evaluation.score(evaluation.predict(step.student, split), split.labels)
        line = {
            "network": name,
            "train_images_per_second": rate,
            "evaluation_images_per_second": len(split) / (time.perf_counter() - started),
            "parameters": evaluation.count_parameters(step.student),
        }
        print(json.dumps(line), flush=True)


def training_rate(step: TrainStep, take_step: Any, seconds: float = 0, least: int = 1) -> float:
    """Images per second over at least this many seconds and steps, each an eighth of the split, not augmented."""
    index = torch.arange(len(step.split) // 8, device=step.split.device)
    step.student.train()
    started, steps = time.perf_counter(), 0
    while steps < least or time.perf_counter() - started < seconds:
        take_step(Batch(step.split, "none", index, torch.zeros_like(index)), part_of(slice(0, len(index))))
        steps += 1
    if step.split.device.type == "cuda":
        torch.cuda.synchronize()
    return steps * len(index) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
