"""What the commands' argument parsers share: spellings of values, files of arguments, one-line errors. Standard library only."""

import argparse
import contextlib
import ctypes
import math
import shlex
import sys
from pathlib import Path

from takd.config import names
from takd.config.names import UserError


class Parser(argparse.ArgumentParser):
    """argparse with `@file` arguments (several a line, # comments), no abbreviations, and errors of one line (exit status 2).

    `flag` notes a default in `defaults` and leaves argparse's at None, so that a given value can be told from an absent one.
    """

    def __init__(self, description):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
        )
        self.defaults, self.actions = {}, {}

    def flag(self, group, *spellings, default=None, help, **options):
        if default is not None:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            help = f"{help} (default: {shown})".replace("%", "%%")
        action = group.add_argument(*spellings, default=None, help=help, **options)
        self.defaults[action.dest], self.actions[action.dest] = default, action

    def convert_arg_line_to_args(self, arg_line):
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            self.error(f"arguments file: {error} in the line: {arg_line.strip()}")

    def parse_args(self, args=None, namespace=None):
        try:
            return super().parse_args(args, namespace)
        except UnicodeDecodeError:
            self.error("an @file of arguments must be text (UTF-8)")
        except RecursionError:
            self.error("an @file of arguments names itself")

    def named_in(self, argv):
        """Destinations of the flags that stand in `argv` itself, not in an @file."""
        flags = {word.split("=")[0] for word in argv}
        return {action.dest for action in self._actions if flags.intersection(action.option_strings)}

    def error(self, message):
        print(f"{self.prog}: error: {' '.join(message.split())} ({self.prog} --help explains)", file=sys.stderr)
        sys.exit(2)


class Show(argparse.Action):
    """A flag that prints what `text()` gives, and ends."""

    def __init__(self, option_strings, dest, text, **options):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, **options)
        self.text = text

    def __call__(self, parser, *_):
        print(self.text())
        parser.exit()


@contextlib.contextmanager
def requirements(program):
    """For a command's imports: a package that is not installed is one line, not a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        fix = f"install what the suite needs with: {sys.executable} -m pip install -r requirements.txt"
        sys.exit(fail(program, f"{error}; {fix} (or activate the environment that has it)", 2))


def fail(program, error, status):
    """Print an error as one line; returns the exit status."""
    print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def download(description):
    """The arguments of data_loader.py, which imports torch: read before."""
    parser = Parser(description)
    fetched = [name for name in names.DATASETS if name.startswith("cifar")]
    parser.add_argument("--download", nargs="+", choices=fetched, required=True, help="data sets to fetch where they are absent")
    parser.add_argument("--dataset-dir", default="./data", metavar="DIR", help="where to (default: ./data)")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------ spellings
def checked(check):
    """A UserError inside an argument's type, as argparse wants it told."""

    def convert(text):
        try:
            return check(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


network = checked(names.network)
dataset = checked(names.dataset)
method = checked(names.method)


def number(kind, minimum=None, maximum=None, above=None, below=None):
    """A type for numbers of `kind` within bounds; nan and infinity are refused."""
    bounds = {"at least": minimum, "at most": maximum, "above": above, "below": below}
    allowed = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
    what = f"a {'whole ' if kind is int else ''}number {allowed}".strip()

    def convert(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):  # the latter of a whole number beyond every float
            raise argparse.ArgumentTypeError(f"'{text}' is not {what}") from None
        fits = (
            finite
            and (minimum is None or value >= minimum)
            and (maximum is None or value <= maximum)
            and (above is None or value > above)
            and (below is None or value < below)
        )
        if not fits:
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return convert


def method_option(option):
    """A type for a value of a names.Option: of its default's kind, and within its bounds."""
    kind, words = type(option.default), option.bounds.split()
    if kind is bool:
        return _one_of({"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}, "yes or no")
    if kind is str:
        return _one_of({word: word for word in words if word != "or"}, option.bounds) if words else str
    if words[1:2] == ["to"]:
        return number(kind, minimum=float(words[0]), maximum=float(words[2]))
    if words[:1] == ["above"]:
        return number(kind, above=float(words[1]))
    return number(kind, minimum=kind(words[-1]) if words else 0)


def _one_of(values, allowed):
    def convert(text):
        if text.lower() not in values:
            raise argparse.ArgumentTypeError(f"'{text}' is not {allowed}")
        return values[text.lower()]

    return convert


def cuda(text):
    """Number of GPUs: the released code's spellings of yes and no, or a count. Nothing else, so never a silent CPU."""
    word = text.strip().lower()
    if word in ("true", "yes", "t", "y", "on"):
        return 1
    if word in ("false", "no", "f", "n", "off"):
        return 0
    if word.isascii() and word.isdigit():
        return int(word)
    raise argparse.ArgumentTypeError(f"'{text}' is neither yes or no (1 true yes t y on, 0 false no off) nor a number of GPUs")


def gpus_present():
    """GPUs that this process may use, asked of the driver itself: torch takes seconds to import."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
        return 0
    if Path("/dev/kfd").exists():  # AMD's driver: torch knows its GPUs under the name of CUDA
        import torch

        return torch.cuda.device_count()
    return 0


def device_name(wanted):
    """'cuda' or 'cpu' for `--cuda`'s number of GPUs (None: a GPU if there is one), or a UserError that says what is there."""
    present = 0 if wanted == 0 else gpus_present()
    if wanted is not None and wanted > present:
        there = f"{present} GPU{'s' if present != 1 else ''}" if present else "no GPU (or no driver for it)"
        raise UserError(f"--cuda {wanted}: this machine has {there}; {'--cuda 0 runs on the CPU' if not present else f'at most --cuda {present}'}")
    return "cuda" if present else "cpu"
