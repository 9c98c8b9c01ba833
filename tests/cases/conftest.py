"""What people bring: a folder with a tiny sweep and real digits as image files, and kdexp run in it
as they run it.

Each test makes its own inputs. Whatever a case prints, it prints no traceback, no "Unexpected" and
no secret.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

# fixtures
from system.conftest import Kdexp, command, environment, kdexp_here, migrated  # noqa: F401

SECRETS = ("s3cr3t", "p@ss", "hunter2")
"""What the cases use as passwords and tokens."""

TINY = """\
name: tiny
data: {dataset: digits, channels: 1, validation_fraction: 0.2, augment: {flip: false, shift: 0}}
teacher: {architecture: cnn, channels: [8], hidden: 16, dropout: 0.0, epochs: 2, batch_size: 64, learning_rate: 1.0e-2}
student: {architecture: cnn, channels: [4], hidden: 16, dropout: 0.0}
training: {batch_size: 64, learning_rate: 1.0e-2, epochs: 2}
search:
  distillation.alpha: {low: 0.0, high: 1.0}
  student.hidden: {low: 8, high: 32, step: 8}
study: {trials: 3, repeats: 1}
selection: {accuracy_bar: 0.2}
"""
OWN_DATA = (
    "data: {dataset: image_folder, path: shots, image_size: 8, channels: 1, validation_fraction:"
    " 0.2, augment: {flip: false, shift: 0}}"
)


class Case:
    """A user's folder: `tiny.yaml` in it, and what kdexp printed there."""

    def __init__(self, folder: Path, here: Kdexp) -> None:
        self.folder, self._here, self.printed = folder, here, ""
        self.write("tiny.yaml", TINY)

    def write(self, name: str, text: str) -> Path:
        """A text file in the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        return path

    def own(self, name: str = "own.yaml", data: str = OWN_DATA) -> Path:
        """The tiny sweep on the image folder data/shots."""
        text = re.sub(
            "^data:.*$", data, re.sub("^name:.*$", "name: own", TINY, flags=re.M), flags=re.M
        )
        return self.write(name, text)

    def network(
        self, source: str, student: str, search: str = "student.options.width: {low: 4, high: 16}"
    ) -> None:
        """A student of the user's own: nets.py, and tiny.yaml changed to search it."""
        self.write("nets.py", source)
        text = re.sub("^student:.*$", f"student: {student}", TINY, flags=re.M)
        self.write("tiny.yaml", re.sub("student.hidden:.*$", search, text, flags=re.M))

    def pictures(self, where: str = "data/shots", count: int = 20, suffix: str = "png") -> Path:
        """The first `count` real digits of each of three classes, 32x32, as image files."""
        digits, root = load_digits(), self.folder / where
        for label in (0, 1, 7):
            (root / f"digit {label}").mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(digits.images[digits.target == label][:count]):
                picture = Image.fromarray((image * 255 / 16).round().astype(np.uint8)).resize(
                    (32, 32)
                )
                picture.save(root / f"digit {label}" / f"{number:03}.{suffix}")
        return root

    def kd(self, *arguments: str) -> subprocess.CompletedProcess:
        """kdexp's main() in this process, which spares the seconds of its imports."""
        return self._saw(self._here(*arguments))

    def alone(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        wrapped: Sequence[str] = (),
        timeout: float = 300,
    ) -> subprocess.CompletedProcess:
        """The real command in a process of its own: where the environment, the streams or the
        process are what is tried.
        """
        return self._saw(
            subprocess.run(
                [*wrapped, *command(*arguments)],
                cwd=cwd or self.folder,
                env=environment() | dict(env or {}),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        )

    def _saw(self, done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
        self.printed += done.stdout + done.stderr
        return done


@pytest.fixture
def case(tmp_path: Path, kdexp_here: Kdexp, migrated: None) -> Case:  # noqa: F811 - the fixtures
    """A user's folder with a migrated store; afterwards nothing of what was printed may look like a
    bug.
    """
    made = Case(tmp_path, kdexp_here)
    yield made
    for bad in ("Unexpected", "Traceback", *SECRETS):
        assert bad not in made.printed, made.printed


def one_line(done: subprocess.CompletedProcess, *words: str) -> str:
    """A failure in one line that holds these words; the line."""
    assert done.returncode not in (0, None), done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("kdexp:")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]
