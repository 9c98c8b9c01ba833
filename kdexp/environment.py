"""What a result may depend on besides its recipe: code, libraries, threads, device, CPU."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kdexp import __version__
from kdexp.config import Recipe
from kdexp.imported import own_modules
from kdexp.limits import cores
from kdexp.own import own_file

__all__ = [
    "commit",
    "configure",
    "core",
    "cpu_name",
    "differing",
    "own_networks",
    "record",
    "remember_code",
]

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # mallopt(3)
PACKAGE = Path(__file__).resolve().parent
CORE = ("config.py", "own.py", "workers/work.py")
"""Besides distill/: what a training's bits depend on."""
LIBRARIES = (
    "torch",
    "torchvision",
    "numpy",
    "mlflow",
    "optuna",
    "torchinfo",
    "safetensors",
    "scikit-learn",
)


def configure(device: str, threads: int | None) -> Any:
    """Pick the device ('auto': a GPU where there is one), set threads, ask for deterministic
    kernels.

    Returns the torch.device. Raises KdexpError for a device that is not there.
    """
    import os

    import torch

    from kdexp import KdexpError

    # what cuBLAS needs to be deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise KdexpError(
            f"--device {device}: {str(error).splitlines()[0]}; use cpu, cuda or auto"
        ) from None
    # torch counts the machine's cores, whatever a container leaves of them
    if threads or cores() < torch.get_num_threads():
        torch.set_num_threads(threads or cores())
    _keep_memory()
    remember_code()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling memory that nobody reads takes 1.2 ms of a 40 ms step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    # compiling for a CPU, it misses CUDA
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return chosen


def _keep_memory() -> None:
    """Let glibc keep what a step frees for the next step.

    Else a worker may give 100 MB back in every step, and take them again page by page: 60,000 page
    faults a second.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(TRIM_THRESHOLD, 2**30)
        libc.mallopt(MMAP_THRESHOLD, 2**25)  # the most that glibc takes
        libc.mallopt(ARENA_MAX, 1)  # for threads too: the thresholds hold for the first arena alone


def remember_code() -> None:
    """The code of this process, and of all forked from it, is what lies on the disk now, whatever
    is edited later.
    """
    _source(), _core(), commit()


def record(device: str, recipe: Recipe, threads: int) -> dict[str, str]:
    """This machine and code, and a training's CPU threads, as text by name; no paths, names of
    people or variables.
    """
    import torch

    return {
        "kdexp": __version__,
        "source": _source(),
        "core": _core(),
        "commit": commit(),
        **own_networks(recipe),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(threads),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        **{name: _version(name) for name in LIBRARIES},
    }


def differing(recorded: Mapping[str, str], here: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What differs from what is recorded: name → (recorded, here). What was not recorded then is
    not compared.
    """
    return {
        name: (value, here.get(name, "—"))
        for name, value in recorded.items()
        if here.get(name) != value
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def cpu_name() -> str:
    """The processor as the system calls it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def _source() -> str:
    """SHA-256 of the package's source files."""
    return _digest(PACKAGE.rglob("*.py"))


@cache
def _core() -> str:
    """SHA-256 of those that a training's bits depend on: an edit of any other breaks off nothing
    that is under way.
    """
    return _digest(core())


def core() -> list[Path]:
    """The files that a training's bits depend on."""
    return [*(PACKAGE / "distill").rglob("*.py"), *(PACKAGE / name for name in CORE)]


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def commit() -> str:
    """The commit of kdexp's own checkout, with + where its package has changes; 'none' where it is
    installed.
    """
    try:
        # not somebody else's repository around us
        _git("ls-files", "--error-unmatch", "__init__.py", folder=PACKAGE)
        commit = _git("rev-parse", "--short=12", "HEAD", folder=PACKAGE)
        return (
            f"{commit}+changes"
            if _git("status", "--porcelain", "--", ".", folder=PACKAGE)
            else commit
        )
    except (OSError, subprocess.SubprocessError):
        return "none"


def own_networks(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the files that hold the recipe's own networks: of each network's own, and of all
    that it imports.
    """
    found = {}
    for role, network in (("student", recipe.student), ("teacher", recipe.teacher)):
        place, separator, _ = network.architecture.rpartition(":")
        file = (
            (own_file(place) or getattr(sys.modules.get(place), "__file__", None))
            if separator
            else None
        )
        if file:
            found[f"{role} source"] = _hash(Path(file))
            imported = {
                name: path for name, path in own_modules(place, Path(file)).items() if name != place
            }
            found |= {
                f"{role} imports {name}": _hash(path) for name, path in sorted(imported.items())
            }
    return found


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _git(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=True,
        timeout=10,
    )
    return done.stdout.strip()
