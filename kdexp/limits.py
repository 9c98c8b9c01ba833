"""How many cores and how much memory this process may use: of the machine's, what its affinity and
the control groups above it leave, which containers, SLURM and systemd set. Standard library only.

    group    cores                                 memory
    v2       cpu.max: quota period                 memory.max, less what memory.current holds
    v1       cpu.cfs_quota_us / cpu.cfs_period_us  memory.limit_in_bytes, memory.usage_in_bytes

A limit holds for all groups below: the least counts. What a group holds of files that can be read
again (inactive_file) is free.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["cores", "free_memory"]

ENDLESS = 2**62  # v1's way to say that there is no limit is a number of this size


def cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may keep busy, 1 or more."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(math.floor(min([own, *_quotas(root)])), 1)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that processes may still take; where nothing says it, more than they ever will."""
    found = [2**63]
    with suppress(OSError, StopIteration):
        lines = (root / "proc/meminfo").read_text("utf-8").splitlines()
        free = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(int(free.split()[1]) * 1024)
    return max(min([*found, *_left(root)]), 0)


def _quotas(root: Path) -> Iterator[float]:
    for group in _groups("cpu", root):
        quota, period = _words(group / "cpu.max") or ["max", "1"]
        if quota != "max":
            yield int(quota) / int(period)
        quota, period = (
            (_words(group / f"cpu.cfs_{name}_us") or ["-1"])[0] for name in ("quota", "period")
        )
        if int(quota) > 0:
            yield int(quota) / int(period)


def _left(root: Path) -> Iterator[int]:
    for group in _groups("memory", root):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, held = _words(group / limit), _words(group / used)
            if most and held and most[0] != "max" and int(most[0]) < ENDLESS:
                yield int(most[0]) - int(held[0]) + _reclaimable(group)


def _reclaimable(group: Path) -> int:
    words = _words(group / "memory.stat")
    known = dict(zip(words[::2], words[1::2], strict=False))
    return int(known.get("total_inactive_file", known.get("inactive_file", 0)))


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """This process's group, and all above it. In a container with a view of its own the path may
    lead nowhere: then its top is what there is.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        inside = Path(path.lstrip("/"))
        for part in (inside, *inside.parents) if inside.parts else (inside,):
            yield top / part


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8").splitlines()
    except OSError:
        return []


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()
