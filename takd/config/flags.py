"""Command lines: spellings of values, files of arguments, one-line errors, and train.py's flags."""

import argparse
import contextlib
import ctypes
import importlib.util
import math
import operator
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import takd
from takd import files
from takd.config import methods, names, recipes
from takd.errors import UserError

DEFAULT_SEED = 1
# Other spellings. The short ones are those of hankyul2's KnowledgeDistillation.
ALIASES = {
    "--model": "--student",
    "-m": "--student",
    "-t": "--teacher",
    "-d": "--dataset",
    "-k": "--method",
    "-e": "--epochs",
    "-b": "--batch-size",
    "-l": "--learning-rate",
    "--lr": "--learning-rate",
    "-s": "--seed",
    "-i": "--repeat",
    "--mem": "--memory",
}


class Parser(argparse.ArgumentParser):
    """argparse with `@file` arguments (several a line, # comments), no abbreviations, and errors of one line (status
    2).

    `given` has the values that were given, without the `defaults` of the others.
    """

    def __init__(self, description: str | None) -> None:
        look = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=look, allow_abbrev=False)
        self.group = self.add_argument_group("flags")
        self.add_argument("--version", action=_Version, nargs=0, help="show the suite's version and exit")
        self.others: list[str] = []  # settings of the parser that passes on what it does not know
        self.files = ""  # the setting that words without a flag are, wherever they stand
        self.defaults: dict[str, Any] = {}
        self.actions: dict[str, argparse.Action] = {}

    def section(self, title: str) -> None:
        """The flags that follow are listed under this title."""
        self.group = self.add_argument_group(title)

    def flag(self, *spellings: str, default: Any = None, help: str, **options: Any) -> None:
        """A flag of these spellings and their ALIASES; `options` are add_argument's."""
        if default is not None:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            help = f"{help} (default: {shown})".replace("%", "%%")
        aliases = [alias for alias, name in ALIASES.items() if name in spellings]
        action = self.group.add_argument(*spellings, *aliases, default=default, help=help, **options)
        self.defaults[action.dest], self.actions[action.dest] = default, action

    def switch(self, spelling: str, help: str) -> None:
        """A flag without a value: True for --name, False for --no-name, None where it is not given."""
        on = not spelling.startswith("--no-")
        dest = spelling.removeprefix("--no-").removeprefix("--").replace("-", "_")
        action = self.group.add_argument(spelling, dest=dest, action="store_const", const=on, default=None, help=help)
        self.actions.setdefault(dest, action)

    def value(self, key: str, text: str) -> Any:
        """A setting's value from one word, as its flag would convert it. Raises ArgumentTypeError."""
        action: Any = self.actions[key]
        if action.choices and text not in action.choices:
            raise argparse.ArgumentTypeError(f"'{text}' is not {' or '.join(action.choices)}")
        return action.type(text) if action.type else text

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(self._expanded(words, set()), namespace)

    def _expanded(self, words: Iterable[str], read: set[str]) -> list[str]:
        """The words with those of @files in their place. Each file is read once, so that none includes itself."""
        result = []
        for word in words:
            if not word or re.fullmatch(r"--[\w-]+=(--)?", word):
                self.error(f"'{word}' has no value, as from a variable that is not set; give one or leave it out")
            if word.encode(errors="surrogatepass") != os.fsencode(word):  # PyTorch and TensorBoard take UTF-8 alone
                self.error(f"'{files.printable(word)}' is not UTF-8 in this locale; rename it, or set LC_ALL=C.UTF-8")
            if not word.startswith("@"):
                result.append(word)
                continue
            file = os.path.realpath(word[1:])
            if file in read:
                self.error(f"arguments file {word[1:]} includes itself, or is given twice")
            read.add(file)
            try:
                lines = files.read_text(file).splitlines()
                result += self._expanded((each for line in lines for each in shlex.split(line, comments=True)), read)
            except OSError as error:
                self.error(f"arguments file {word[1:]} cannot be read ({error.strerror})")
            except ValueError as error:
                self.error(f"arguments file {word[1:]}: {error}")
        return result

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        found, unknown = self.parse_known_args(args, namespace)
        flag = next((i for i, word in enumerate(unknown) if word.startswith("-")), None)
        if self.files and flag is None:
            setattr(found, self.files, [*unknown, *(getattr(found, self.files) or [])])
        elif unknown := unknown[flag:]:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown)}")
        return found

    def _hint(self, unknown: list[str]) -> str:
        """The flag nearest to the unknown one."""
        flag = unknown[0].split("=")[0]
        return names.nearest(
            flag, [*self._option_string_actions, *(f"--{key.replace('_', '-')}" for key in self.others)]
        )

    def given(self, argv: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
        """({setting: value} of the flags that were given, {setting: 'command line' or 'arguments file'})."""
        found = vars(self.parse_args(argv, argparse.Namespace(**dict.fromkeys(self.actions))))
        values = {key: value for key, value in found.items() if value is not None}
        words = {word.split("=")[0] if word.startswith("--") else word[:2] for word in argv}
        direct = {action.dest for action in self._actions if words.intersection(action.option_strings)}
        return values, {key: "command line" if key in direct else "arguments file" for key in values}

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(self.prog, f"{message} (see {self.prog} --help)", 2))


class _Version(argparse.Action):
    """Prints the version and the commit; the latter only when it is asked for."""

    def __call__(self, parser, *_):  # type: ignore[no-untyped-def, override]
        print(f"{parser.prog} (TAKD) {takd.__version__}, commit {files.commit() or 'unknown'}")
        parser.exit()


def check_packages(program: str, *packages: str, file: str = "requirements.txt") -> None:
    """End with one line where a package is not installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        fix = f"install what the suite needs with: {sys.executable} -m pip install -r {file}"
        sys.exit(fail(program, f"No module named '{missing[0]}'; {fix} (or activate the environment that has it)", 2))


def fail(program: str, error: object, status: int) -> int:
    """Print an error as one line; returns the exit status."""
    warn(f"{program}: error: {' '.join(str(error).split())}")
    return status


def warn(line: str) -> None:
    print(line, file=sys.stderr)


@contextlib.contextmanager
def errors_in_one_line(program: str) -> Iterator[None]:
    """A user's mistake ends the command with status 2, what the system lacks (a file, memory) with 1."""
    try:
        yield
    except UserError as error:
        sys.exit(fail(program, error, 2))
    except (OSError, MemoryError) as error:
        sys.exit(fail(program, error, 1))


# ------------------------------------------------------------------------------------------------ spellings
def checked(check: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument's type from a function that raises UserError."""

    def convert(text: str) -> Any:
        try:
            return check(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


network, dataset, method = checked(names.network), checked(names.dataset), checked(methods.method_name)


BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("at least", operator.ge),
    "maximum": ("at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


def number(kind: type, **bounds: float | None) -> Callable[[str], Any]:
    """A type for numbers of `kind` within BOUNDS; nan and infinity are refused."""
    tests = [(*BOUNDS[key], bound) for key, bound in bounds.items() if bound is not None]
    allowed = " and ".join(f"{word} {bound}" for word, _, bound in tests)
    what = f"a {'whole ' if kind is int else ''}number {allowed}".strip()

    def convert(text: str) -> Any:
        try:
            value = kind(text)
            fits = math.isfinite(value) and all(compare(value, bound) for _, compare, bound in tests)
        except (ValueError, OverflowError):  # the latter of a whole number beyond every float
            raise argparse.ArgumentTypeError(f"'{text}' is not {what}") from None
        if not fits:
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return convert


class OneOrMore(argparse.Action):
    """One value as itself, several as a list."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


YES_OR_NO: dict[str, methods.Value] = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def option_value(option: methods.Option, text: str) -> methods.Value:
    """A method option's value: of its default's type and within its bounds."""
    kind = type(option.default)
    if kind is str and not option.choices:
        return text
    if kind in (bool, str):
        words: dict[str, methods.Value] = YES_OR_NO if kind is bool else {word: word for word in option.choices}
        if text.lower() not in words:
            raise argparse.ArgumentTypeError(f"'{text}' is not {option.bounds or 'yes or no'}")
        return words[text.lower()]
    minimum = option.minimum if option.above is None else None
    return number(kind, above=option.above, minimum=minimum, maximum=option.maximum)(text)


def share_or_count(text: str) -> float:
    """A share below 1, or a whole number."""
    value = number(float, minimum=0)(text)
    if value > 1 and value % 1:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a share below 1 nor a whole number of images")
    return value


def cuda(text: str) -> int:
    """Number of GPUs: the released code's spellings of yes and no, or a count; anything else is an error."""
    word = text.strip().lower()
    if word in ("true", "yes", "t", "y", "on"):
        return 1
    if word in ("false", "no", "f", "n", "off"):
        return 0
    if word.isascii() and word.isdigit():
        return int(word)
    raise argparse.ArgumentTypeError(
        f"'{text}' is neither yes or no (1 true yes t y on, 0 false no off) nor a number of GPUs"
    )


def _driver() -> Any:
    """NVIDIA's driver library, initialised (importing torch takes seconds). None without a GPU or a driver."""
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        return driver if driver.cuInit(0) == 0 else None
    return None


def gpu_name() -> str:
    """The first GPU's name, such as 'NVIDIA H200'."""
    driver, name = _driver(), ctypes.create_string_buffer(100)
    known = driver is not None and driver.cuDeviceGetName(name, len(name), 0) == 0
    return name.value.decode() if known else "the GPU"


def gpus_present() -> int:
    """GPUs that this process may use."""
    driver, count = _driver(), ctypes.c_int(0)
    if driver is not None:
        return count.value if driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0
    if Path("/dev/kfd").exists():  # AMD's driver: torch knows its GPUs under the name of CUDA
        import torch

        return torch.cuda.device_count()
    return 0


def device_name(wanted: int | None) -> str:
    """'cuda' or 'cpu' for --cuda's number of GPUs (None: a GPU if there is one). Too many are a UserError."""
    present = 0 if wanted == 0 else gpus_present()
    if wanted is not None and wanted > present:
        there = f"{present} GPU{'s' if present != 1 else ''}" if present else "no GPU (or no driver for it)"
        fix = f"at most --cuda {present}" if present else "--cuda 0 runs on the CPU"
        raise UserError(f"--cuda {wanted}: this machine has {there}; {fix}")
    return "cuda" if present else "cpu"


# ------------------------------------------------------------------------------------------------- train.py's
# fmt: off
def train_parser(description: str = "") -> Parser:
    """train.py's flags."""
    parser, kd = Parser(description), methods.METHODS["kd"].options
    flag, switch, section = parser.flag, parser.switch, parser.section
    whole, positive = number(int, minimum=1), number(float, above=0)
    section("networks")
    flag("--student", type=network, default="resnet8", metavar="NAME",
         help=f"network to train: {' '.join(names.NETWORKS)}, {names.MORE_NETWORKS}")
    flag("--teacher", nargs="+", action=OneOrMore, type=network, metavar="NAME",
         help="network to learn from, or several (default: none, labels only)")
    flag("--teacher-checkpoint", nargs="+", action=OneOrMore, metavar="FILE",
         help="each teacher's weights (default: they are trained first, each from those before it)")
    flag("--init-from", metavar="FILE",
         help="start from a checkpoint's weights; where the classes differ, with a new last layer")
    switch("--pretrained", "torchvision's weights except the last layer, or those that your own class loads, in the "
           "student or a teacher trained first")
    section("data")
    flag("--dataset", type=dataset, default="cifar100", metavar="NAME", help=" ".join(names.DATASETS))
    flag("--dataset-dir", default="./data", metavar="DIR",
         help="where cifar-100-python or cifar100/{train,test}/<class>/ is, or is downloaded to; for --dataset "
         "folder, where train/<class>/ and val or test are")
    flag("--image-size", type=number(int, minimum=8, maximum=1024), metavar="N",
         help="height and width of the networks' input (default: 32, for a folder 224)")
    flag("--train-images", type=whole, metavar="N", help="train on only N images, the same share of each class")
    flag("--test-images", type=whole, metavar="N", help="test on only N images, the same share of each class")
    switch("--download", "download an absent data set (the default)")
    switch("--no-download", "never download a data set")
    flag("--validation-split", type=share_or_count, default=0.0, metavar="SHARE",
         help="share or number of training images held out to select the best epoch, in place of the test set")
    flag("--augment", choices=("auto", *names.VIEWS), default="auto", help="auto: the recipe's")
    flag("--workers", type=number(int, minimum=0, maximum=256), metavar="N",
         help="processes that apply rotate-crop-flip (default: one per core, at most 8)")
    section("distillation")
    flag("--method", type=method, default="kd", metavar="NAME",
         help=f"{' '.join(methods.METHODS)}, or a class of your own: my_file.py:MyClass")
    flag("--method-option", nargs="+", action="extend", metavar="KEY=VALUE", help="options of the method")
    flag("--temperature", type=positive, metavar="T", help=f"option of the method (kd: {kd['temperature'].default:g})")
    flag("--lambda", type=number(float, minimum=0, maximum=1), metavar="L",
         help=f"option of the method: weight of the distillation term in eq. 3 (kd: {kd['lambda'].default:g})")
    parser.group.add_argument("--help-methods", action="version", version=methods.help_methods(),
                              help="list the methods and their options")
    flag("--teacher-cache", choices=("auto", "live", "lazy", "full"), default="auto",
         help="the teacher's logits: computed for every batch (live), or kept in a table, filled lazily or in full")
    switch("--any-teacher", "learn even from a teacher no better than guessing, to try a command out")
    optimisation_flags(parser)
    section("machine")
    flag("--cuda", type=cuda, metavar="N", help="GPUs: 1 or yes, 0 or no, or a number, one process each "
         "(default: a GPU if there is one); under torchrun: 0, or a GPU for each of its processes")
    flag("--precision", choices=("auto", "bf16", "tf32", "fp32"), default="auto",
         help="arithmetic of the networks; auto takes bf16 where the hardware has it, else fp32; evaluation is fp32")
    switch("--no-cuda-graph", "launch a step's kernels one by one (default: as one CUDA graph where possible)")
    flag("--measure", nargs="+", type=network, metavar="NAME",
         help="train nothing; measure these networks' speed on this machine, on random images; one JSON line each")
    section("records")
    flag("--run-dir", metavar="DIR", help="the run's folder (default: runs/<a name made of the settings>)")
    flag("--save-minutes", type=positive, default=10.0, metavar="M",
         help="minutes between saves within an epoch; its end and SIGTERM, SIGINT, SIGUSR1 save too")
    switch("--json", "print the summary as JSON; other lines go to standard error")
    return parser


def optimisation_flags(parser: Parser) -> None:
    """Those of the recipe, and the seed."""
    flag, switch, epochs = parser.flag, parser.switch, number(int, minimum=1, maximum=10**6)
    positive, share = number(float, above=0), number(float, above=0, maximum=1)
    parser.section("optimisation (settings not given come from the recipe)")
    flag("--recipe", choices=tuple(recipes.RECIPES), default="paper", help="see docs/recipes.md")
    flag("--epochs", type=epochs, metavar="N", help="passes over the training images (recipe paper: 160)")
    flag("--batch-size", type=number(int, minimum=1, maximum=2**16), metavar="N",
         help="images per step, over all GPUs (recipe paper: 128)")
    flag("--learning-rate", type=positive, metavar="RATE", help="learning rate of the first epoch")
    flag("--schedule", choices=("steps", "cosine"), help="of the learning rate: decay at the milestones (the default), "
         "or to 0 along a cosine")
    flag("--warmup-epochs", type=number(int, minimum=0), metavar="N",
         help="epochs in which the rate grows linearly from a third (default: 0)")
    flag("--milestones", type=number(int, minimum=0), nargs="*", metavar="EPOCH", help="epochs at which it decays")
    flag("--learning-rate-decay", type=share, metavar="F", help="its factor at each milestone")
    flag("--momentum", type=number(float, minimum=0, below=1), metavar="M", help="momentum of SGD")
    switch("--nesterov", "Nesterov momentum")
    switch("--no-nesterov", "plain momentum")
    flag("--weight-decay", type=number(float, minimum=0), metavar="W", help="L2 penalty of SGD")
    flag("--label-smoothing", type=number(float, minimum=0, below=1), metavar="E",
         help="share of the labels' weight that is spread over all classes, in cross-entropy (default: 0)")
    flag("--seed", type=number(int, minimum=0, maximum=2**63 - 1), default=DEFAULT_SEED, metavar="N",
         help="seed of initialisation, order and augmentation")
    flag("--repeat", type=number(int, minimum=1, maximum=1000), metavar="N",
         help="N runs with consecutive seeds from --seed and one teacher, each in its own folder; prints their mean")


def slurm_flags(parser: Parser) -> None:
    """The SLURM flags of distill_paths.py and sweep.py: --slurm, and the fields of takd.study.slurm.Site."""
    flag = parser.flag
    parser.section("on SLURM")
    parser.switch("--slurm", "submit with sbatch (with --dry-run: print the commands)")
    flag("--account", metavar="NAME", help="to charge; options not given come from SBATCH_* variables or the site")
    flag("--gpu-type", metavar="TYPE[:N]", help="GPU of a job, such as h100")
    flag("--time", metavar="H:MM:SS", help="time limit of a job; one that reaches it saves, is requeued and continues")
    flag("--memory", metavar="SIZE", help="memory of a job, such as 8G")
    flag("--cpus", type=number(int, minimum=1), metavar="N", help="cores of a job")
    flag("--modules", metavar="NAMES", help='modules to load in a job, such as "python/3.11" (or $TAKD_MODULES)')
    flag("--venv", metavar="DIR|FILE", help="environment to activate in a job, or a requirements file to make one from "
         "there (or $TAKD_VENV; default: this Python)")
    flag("--stage", nargs="+", metavar="FILE", help="archives or folders to put in $SLURM_TMPDIR/data (or $TAKD_STAGE)")
    flag("--sbatch", action="append", metavar="OPTION", help="any further option, such as --sbatch=--mail-type=END")


def download_parser(description: str) -> Parser:
    """data_loader.py's flags."""
    parser, fetched = Parser(description), [name for name in names.DATASETS if name.startswith("cifar")]
    parser.group.add_argument("--download", nargs="+", choices=fetched, required=True, help="data sets to fetch")
    parser.group.add_argument("--dataset-dir", default="./data", metavar="DIR", help="target folder (default: ./data)")
    return parser
# fmt: on


def words(settings: Mapping[str, Any]) -> list[str]:
    """The arguments that give these settings to train.py."""
    result = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list | tuple):
            result += [f"--{name}", *map(str, value)]
        else:
            result += [f"--{name}", str(value)]
    return result
