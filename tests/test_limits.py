"""Cores and memory are what affinity and control groups leave, whatever the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdexp.limits import cores, free_memory

GIB = 2**30
OWN = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
V2 = "0::/jobs/7"
V1 = "4:memory:/jobs/7\n3:cpu,cpuacct:/jobs/7\n1:name=systemd:/else\n0::/else"


def machine(root: Path, groups: str, **files: str) -> Path:
    """A machine with 64 GiB free, by what its kernel tells; __ stands for / in names."""
    told = {"proc/meminfo": "MemTotal: 1 kB\nMemAvailable: 67108864 kB", "proc/self/cgroup": groups}
    for name, text in (told | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


CASES: dict[str, tuple[str, dict[str, str], int, int]] = {
    "no limit, v2": (V2, {"jobs/7/cpu.max": "max 100000", "jobs/7/memory.max": "max"}, OWN, 64 * GIB),
    "one core of its own group": (V2, {"jobs/7/cpu.max": "100000 100000"}, 1, 64 * GIB),
    "one core and a half": (V2, {"jobs/7/cpu.max": "150000 100000"}, 1, 64 * GIB),
    "less than a core": (V2, {"jobs/7/cpu.max": "20000 100000"}, 1, 64 * GIB),
    "of a group above": (V2, {"jobs/cpu.max": "100000 100000", "jobs/7/cpu.max": "max 100000"}, 1, 64 * GIB),
    "more than the machine has": (V2, {"jobs/7/cpu.max": "99000000 100000"}, OWN, 64 * GIB),
    "memory": (V2, {"jobs/7/memory.max": str(8 * GIB), "jobs/7/memory.current": str(3 * GIB)}, OWN, 5 * GIB),
    "memory of which files can be read again": (
        V2,
        {"jobs/7/memory.max": str(8 * GIB), "jobs/7/memory.current": str(8 * GIB), "jobs/7/memory.stat": f"anon 5\ninactive_file {2 * GIB}"},
        OWN,
        2 * GIB,
    ),
    "memory of a group above": (
        V2,
        {"jobs/memory.max": str(4 * GIB), "jobs/memory.current": "0", "jobs/7/memory.max": "max", "jobs/7/memory.current": "0"},
        OWN,
        4 * GIB,
    ),
    "more than it may have": (V2, {"jobs/7/memory.max": str(GIB), "jobs/7/memory.current": str(2 * GIB)}, OWN, 0),
    "a container that sees its own group as the top": ("0::/", {"cpu.max": "100000 100000", "memory.max": str(GIB), "memory.current": "0"}, 1, GIB),
    "a path of the host's, in a container": ("0::/docker/abc", {"cpu.max": "100000 100000"}, 1, 64 * GIB),
    "v1": (
        V1,
        {
            "cpu,cpuacct/jobs/7/cpu.cfs_quota_us": "100000",
            "cpu,cpuacct/jobs/7/cpu.cfs_period_us": "100000",
            "memory/jobs/7/memory.limit_in_bytes": str(6 * GIB),
            "memory/jobs/7/memory.usage_in_bytes": str(2 * GIB),
            "memory/jobs/7/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}",
        },
        1,
        5 * GIB,
    ),
    "no limit, v1": (
        V1,
        {
            "cpu,cpuacct/jobs/7/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/jobs/7/cpu.cfs_period_us": "100000",
            "memory/jobs/7/memory.limit_in_bytes": "9223372036854771712",
            "memory/jobs/7/memory.usage_in_bytes": "5",
        },
        OWN,
        64 * GIB,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_least_limit_above_counts(tmp_path: Path, name: str) -> None:
    groups, files, most, free = CASES[name]
    root = machine(tmp_path, groups, **{f"sys/fs/cgroup/{file}": t for file, t in files.items()})
    assert cores(root) == most
    assert free_memory(root) == free


def test_a_system_that_tells_nothing_has_no_limits(tmp_path: Path) -> None:
    assert cores(tmp_path) == OWN
    assert free_memory(tmp_path) == 2**63


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of this system's own, where tests may make one."""
    for top in (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")):
        if (top / "cgroup.procs").exists() and os.access(top, os.W_OK):
            made = top / f"kdexp-test-{os.getpid()}"
            try:
                made.mkdir()
                if (made / "cpu.max").exists():
                    (made / "cpu.max").write_text("100000 100000")
                else:
                    (made / "cpu.cfs_quota_us").write_text("100000")
            except OSError:
                made.rmdir()
                continue
            yield made
            made.rmdir()
            return
    pytest.skip("no control group can be made here")


def test_a_real_quota_of_one_core_leaves_one_worker_with_one_thread(group: Path) -> None:
    script = (
        f"open('{group / 'cgroup.procs'}', 'w').write('0')\n"
        "import torch\nfrom kdexp.environment import configure\nfrom kdexp.settings import Settings\n"
        "from kdexp.workers.pool import pool_size\n"
        "print(torch.get_num_threads(), pool_size(Settings(workers=None), configure('cpu', None), 9))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    threads, _, pool = done.stdout.strip().partition(" ")
    assert int(threads) == OWN, "torch counts the machine's"
    assert pool == "PoolSize(workers=1, threads=1)"
