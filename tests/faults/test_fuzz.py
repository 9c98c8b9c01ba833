"""Whatever a file holds: it is read, or refused in words; never a traceback, a hang, or a write."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from kdexp import KdexpError
from kdexp.config import ConfigError, load
from kdexp.distill.checkpoints import Checkpoint, Kept
from kdexp.distill.datasets import DataError, _read_idx
from kdexp.distill.logits import _open
from kdexp.distill.teacher import TeacherError, read_weights
from kdexp.distill.train import Snapshot

EXAMPLES = 10_000 if os.environ.get("CI") == "true" else 300
ROOT = Path(__file__).parents[2]
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "insert", "repeat", "number"]),
        st.integers(0, 1 << 20),
        st.binary(max_size=12),
    ),
    min_size=1,
    max_size=6,
)


def edited(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """The content after some damage."""
    for how, where, extra in changes:
        at = where % (len(content) + 1)
        if how == "flip" and content:
            at = where % len(content)
            content = content[:at] + bytes([content[at] ^ (1 << where % 8)]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "drop":
            content = content[:at] + content[at + len(extra) + 1 :]
        elif how == "insert":
            content = content[:at] + extra + content[at:]
        elif how == "repeat":
            content = content[:at] + content[max(at - 30, 0) : at] * 3 + content[at:]
        elif how == "number":
            content = content[:at] + str(where).encode() + content[at:]
    return content


def fuzz(
    content: list[bytes], read: Callable[[Path], object], allowed: type[Exception], folder: Path
) -> None:
    """Let `read` see so many damaged files; it succeeds, or raises what is allowed, with a
    message.
    """
    path = folder / "input"

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(content), edits)
    def once(original: bytes, changes: list[tuple[str, int, bytes]]) -> None:
        path.write_bytes(edited(original, changes))
        message = "read"
        try:
            read(path)
        except allowed as error:
            message = str(error)
        assert message

    once()
    assert [file.name for file in folder.iterdir()] == ["input"], "reading writes nothing"


def test_sweep_files(tmp_path: Path) -> None:
    files = [path.read_bytes() for path in sorted((ROOT / "sweeps").glob("*.yaml"))]
    assert len(files) >= 3
    odd = [
        b"a: &a [x, x]\nb: &b [*a, *a]\nname: [*b, *b]\n",
        b"name: x\nteacher: !!python/object/apply:os.system ['touch pwned']\n",
        b"{name: .nan, study: {trials: .inf}, search: {1: 2}}",
        "name: 'ä ö/../😀'\nsearch: {distillation.alpha: {low: 1e400, high: -1}}".encode(),
    ]
    fuzz(files + odd, load, ConfigError, tmp_path)


def test_checkpoints(tmp_path: Path) -> None:
    whole = Checkpoint(
        "0" * 32, {"threads": "1"}, "complete", None, [{"epoch": 1, "loss": 1.0}],
        Kept(1, 5, {"w": torch.zeros(3)}), Snapshot(1, 5, {"parameters": torch.zeros(9)}),
    ).to_bytes()  # fmt: skip
    fuzz([whole], lambda path: Checkpoint.from_bytes(path.read_bytes()), ValueError, tmp_path)


def small() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_teacher_files(tmp_path: Path, suffix: str) -> None:
    buffer, module = io.BytesIO(), small()
    torch.save({"model_state_dict": module.state_dict()}, buffer)
    old = io.BytesIO()
    torch.save(module.state_dict(), old, _use_new_zipfile_serialization=False)
    contents = (
        [buffer.getvalue(), old.getvalue()] if suffix == ".pt" else [save(module.state_dict())]
    )
    folder = tmp_path / "files"
    folder.mkdir()

    def read(path: Path) -> None:
        file = path.with_name(f"weights{suffix}")
        path.rename(file)
        try:
            read_weights(file, small())
        finally:
            file.rename(path)

    fuzz(contents, read, TeacherError, folder)


def test_cached_logits(tmp_path: Path) -> None:
    facts = {"parameters": "1", "val_correct": "1", "val_samples": "2"}
    fuzz(
        [save({"logits": torch.zeros(2, 5, 3).half()}, metadata=facts)], _open, KdexpError, tmp_path
    )


def test_idx_files(tmp_path: Path) -> None:
    header = (0x0803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (3, 4, 4))
    images = header + np.arange(48, dtype=np.uint8).tobytes()
    labels = (0x0801).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes([0, 1, 2])
    stem = "train-images-idx3-ubyte"
    fuzz([images, labels], lambda path: _read_idx(path, "mnist", stem, ""), DataError, tmp_path)
