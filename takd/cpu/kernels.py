"""kernels.c, compiled once per machine by its C compiler, in a few seconds, and kept in the user's cache folder."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).resolve().with_suffix(".c")
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this process has the compiled kernels."""
    return library(dtype) is not None


def version() -> str | bool:
    """For a run's record: a digest of the kernels' source, False if they are not used."""
    return hashlib.blake2b(SOURCE.read_bytes(), digest_size=4).hexdigest() if available() else False


@functools.cache
def library(dtype: torch.dtype) -> Any:
    """The compiled kernels for a dtype, or None if there is no C compiler that can build them."""
    if platform.system() != "Linux":
        return None
    try:
        path = _compiled("-DBF16" if dtype == torch.bfloat16 else "-DFLOAT32")
        for openmp in _loaded_openmp():  # torch's own threads, not a second set that would compete for the cores
            ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(path)
    except (OSError, subprocess.SubprocessError):
        return None


def _loaded_openmp() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "libgomp" in line or "libiomp" in line or "libomp" in line}


def _compiled(kind: str) -> str:
    """Path of the shared library, compiled unless this compiler, source and processor have one already."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler")
    about = Path("/proc/cpuinfo").read_text().splitlines()
    processor = "".join(sorted({line for line in about if line.startswith(("model name", "flags", "Features"))}))
    by = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.blake2b(SOURCE.read_bytes() + by + processor.encode() + kind.encode(), digest_size=8)
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "takd"
    path = folder / f"kernels-{key.hexdigest()}.so"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            folder = Path(tempfile.mkdtemp())
            path = folder / path.name
        temporary = folder / f".{path.name}.{os.getpid()}"
        # Linked without an OpenMP library of its own: it must use torch's, already in the process.
        subprocess.run(
            [compiler, *FLAGS, kind, "-c", str(SOURCE), "-o", f"{temporary}.o"], capture_output=True, check=True
        )
        subprocess.run(
            [compiler, "-shared", f"{temporary}.o", "-lm", "-o", str(temporary)], capture_output=True, check=True
        )
        os.unlink(f"{temporary}.o")
        os.replace(temporary, path)
    return str(path)
