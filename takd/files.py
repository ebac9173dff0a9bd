"""Files: atomic writes, JSON of a given form, locks, digests, and classes from a user's own FILE.py. Standard library
only at import."""

import contextlib
import difflib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from takd import process
from takd.errors import UserError

Say = Callable[[str], None]  # prints a line for the user
ROOT = Path(__file__).resolve().parents[1]  # the suite's folder, where its commands are


def commit() -> str | None:
    """The suite's commit, marked if files were changed since; None outside a clone."""
    git: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(["git", "rev-parse", "HEAD"], **git).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **git).stdout
        return found + (" (changed)" if changed else "")
    return None


# -------------------------------------------------------------------------------------------------- reading
def read_bytes(path: str | Path) -> bytes:
    """A regular file's contents. Anything else is an OSError: a named pipe would be waited for."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a file", str(path))
        return file.read()


def read_text(path: str | Path) -> str:
    """A regular file's text; a ValueError where it is not UTF-8."""
    contents = read_bytes(path)
    try:
        if b"\0" not in contents:
            return contents.decode()
    except UnicodeDecodeError:
        pass
    raise ValueError("it is not text (UTF-8)")


def printable(text: str) -> str:
    """The text with escapes in place of what cannot be shown: control characters, and a file name's bytes that are not
    UTF-8."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# -------------------------------------------------------------------------------------------------- writing
def check_folder(path: str | Path, flag: str) -> None:
    """A UserError unless this folder exists and can be written, or can be made."""
    there = next(each for each in (Path(path), *Path(path).absolute().parents) if os.path.lexists(each))
    if not there.is_dir() or not os.access(there, os.W_OK):
        state = "not a folder" if not there.is_dir() else "read-only"
        raise UserError(f"{flag} {path}: {there} is {state}; give another folder")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path that replaces `path` when the block ends without an error: readers see the old or the new."""
    path = Path(path)
    with contextlib.suppress(OSError):  # absent, for one
        if stat.S_ISCHR(mode := path.lstat().st_mode) or stat.S_ISBLK(mode):  # root may replace /dev/null
            raise UserError(f"{path} is a device; give a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and str(error.filename) in ("None", str(temporary)):  # a name that tells the user nothing
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary files of processes killed while they wrote files of this name. Only where no other process
    may be writing them."""
    for path in folder.glob(f".{name}.*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Whether no other process is inside such a block for this folder. Leaves no file there, unlike `locked`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except OSError:  # held, or a file system without locks
        alone = False
    try:
        yield alone
    finally:
        os.close(descriptor)


def save_json(contents: Any, path: str | Path) -> None:
    """Indented JSON, written atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- JSON
class Rule(NamedTuple):
    """What a single value must be: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _finite(value):
    return type(value) in (int, float) and abs(value) < 1e300


def _encodes(value):
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:  # JSON's \ud800
        return False


ANYTHING = Rule("anything", lambda value: True)
TEXT = Rule("text", _encodes)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
WHOLE = Rule("a whole number from 0 on", lambda value: type(value) is int and 0 <= value < 2**63)
COUNT = Rule("a whole number from 1 on", lambda value: type(value) is int and 0 < value < 2**63)
NUMBER = Rule("a number", _finite)
SECONDS = Rule("a time in seconds", lambda value: _finite(value) and 0 <= value < 1e12)
PERCENT = Rule("a percentage", lambda value: _finite(value) and 0 <= value <= 100)


def misfit(value: Any, form: Any, name: str = "it") -> str | None:
    """Where `value` differs from `form`, such as "epochs is 'x', not a whole number from 1 on"; None where it fits.

    A form is a Rule, [form] for a list of any length, {key: form} for a dict that has at least these keys, or
    {...: form} for one with any keys. A key written with a "?" at its end may be absent, or None.
    """
    if isinstance(form, Rule):
        return None if form.holds(value) else f"{name} is {_short(value)}, not {form.words}"
    if not isinstance(value, type(form)):
        return f"{name} is {_short(value)}, not a {'list' if isinstance(form, list) else 'dict'}"
    prefix = "" if name == "it" else f"{name}."
    if isinstance(form, list):
        items = [(f"{name}[{i}]", item, form[0]) for i, item in enumerate(value)]
    elif ... in form:
        items = [(f"{prefix}{key}", item, form[...]) for key, item in value.items()]
    else:
        items = []
        for key, each in form.items():
            plain = key.removesuffix("?")
            if value.get(plain) is not None:
                items.append((f"{prefix}{plain}", value[plain], each))
            elif plain == key:
                return f"{prefix}{key} is missing"
    return next(filter(None, (misfit(item, each, place) for place, item, each in items)), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:36]}..."


def read_json(path: Path, form: Any, fix: str) -> Any:
    """The contents of a JSON file, or None where there is none. A UserError, ending with `fix`, if it is damaged."""
    try:
        contents = json.loads(read_text(path))
        wrong = misfit(contents, form)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        wrong = str(error)
    if wrong:
        raise UserError(f"{path} cannot be read ({wrong}); {fix}")
    return contents


# -------------------------------------------------------------------------------------------------- locking
class Busy(UserError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, what: str, wait: bool = False, say: Callable[[str], None] = lambda line: None) -> Iterator[int]:
    """Hold an exclusive lock on a file for the block; the system releases it however the process ends.

    The block gets the file's descriptor: a child process that inherits it holds the lock too.

    If another process holds the lock, Busy is raised at once, or with `wait` one line is printed and the lock is waited
    for. On a file system without locks (some clusters' scratch) the block runs without one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        reported = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    break
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                raise Busy(f"{what} is in use by {holder}; wait for it or stop it, then repeat the command")
            if not reported:
                say(f"waiting for {holder}, which holds {what}")
                reported = True
            process.safe_point()
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield file.fileno()


def is_locked(path: str | Path) -> bool:
    """Whether a process holds the lock on a file at this moment."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
    return False


# -------------------------------------------------------------------------------------------------- digests
def digest(*parts: Any) -> str:
    """32 hexadecimal digits that identify tensors, state dicts and plain values."""
    import torch

    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, dict):
            for key in sorted(part):
                hasher.update(f"{key}:{digest(part[key])};".encode())
        elif isinstance(part, torch.Tensor):
            array = part.detach().cpu().contiguous()
            hasher.update(f"{array.dtype}{tuple(array.shape)}".encode())
            hasher.update(array.flatten().view(torch.uint8).numpy().data)
        else:
            hasher.update(json.dumps(part).encode())
    return hasher.hexdigest()


# ------------------------------------------------------------------------------------------- a user's own class
_user_modules: dict[tuple[Path, bytes], Any] = {}


def import_class(name: str) -> Any:
    """The class or function that `FILE.py:CLASS` names. This runs the file, once; its errors become UserErrors.

    The file imports modules beside it as a script would: its own losses.py or data_loader.py, not the suite's,
    which only imports inside functions find first.
    """
    file, _, class_name = name.strip().rpartition(":")
    path = Path(os.path.realpath(file))
    try:
        key = path, read_bytes(path)
    except OSError as error:
        reason = {errno.EISDIR: "a folder", errno.ENOENT: "no such file"}.get(error.errno or 0, error.strerror)
        raise UserError(f"{file} cannot be read ({reason}); give FILE.py:CLASS") from None
    try:
        if key not in _user_modules:
            spec: Any = importlib.util.spec_from_file_location(f"user_file_{path.stem}", path)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            with _importing_from(path.parent):
                spec.loader.exec_module(module)
            _user_modules[key] = module
    except SyntaxError as error:
        raise UserError(f"{file} is not Python: {error}") from None
    except (Exception, SystemExit) as error:
        line, what = traceback.extract_tb(error.__traceback__)[-1].lineno, " ".join(str(error).split())
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        fix = f"; if it is a package: {sys.executable} -m pip install {absent}" if absent else ""
        raise UserError(f"{name} cannot be imported: {type(error).__name__}: {what} (line {line}){fix}") from None
    module = _user_modules[key]
    if not hasattr(module, class_name):
        defined = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        close = "".join(f" (did you mean {name}?)" for name in difflib.get_close_matches(class_name, defined, 1))
        raise UserError(f"{file} defines no '{class_name}'{close}; it defines: {' '.join(defined) or 'nothing'}")
    return getattr(module, class_name)


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let imports find modules in `folder`, even if modules of the same names were imported before."""

    def namesakes() -> dict[str, Any]:
        tops = {name.partition(".")[0] for name in sys.modules} - {"takd"} if folder != ROOT else set()
        beside = {top for top in tops if (folder / f"{top}.py").exists() or (folder / top / "__init__.py").exists()}
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in beside}

    others = namesakes()
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.path.append(str(folder))  # for what the file imports later, inside a function
        for name in namesakes():
            del sys.modules[name]  # the file keeps what it has imported
        sys.modules.update(others)
