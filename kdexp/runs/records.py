"""What a run's own record gives back: its recipe, and its student with the weights it ended with.

Nothing is taken from a record unseen: each file is compared with the SHA-256 that was recorded when
it was written.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdexp import KdexpError
from kdexp.config import Recipe, upgrade
from kdexp.distill.datasets import Split
from kdexp.distill.inputs import Input
from kdexp.distill.models import build, weights_hash
from kdexp.files import sha256_of
from kdexp.reading import validate
from kdexp.runs.tracking import ARTIFACTS, NOTE, RunRecord, Tracking

__all__ = [
    "ARTIFACTS",
    "FOLDS",
    "INPUT",
    "LONGEST_NOTE",
    "NOTE",
    "PARTS",
    "REPEAT",
    "REPEATS",
    "SELECTED_TRIAL",
    "SURE",
    "WEIGHTS",
    "RecordError",
    "answer_of",
    "artifact_of",
    "environment_of_run",
    "input_of",
    "input_text",
    "load_student",
    "log_text",
    "recipe_of",
    "seal",
    "sealed",
    "text_of",
    "values_of",
    "weights_of",
]

WEIGHTS = "kdexp.weights_sha256"
REPEATS, REPEAT = "kdexp.repeats", "kdexp.repeat"
"""On a trial's run: the number of the trial whose recipe it repeats, and which repeat it is."""
SELECTED_TRIAL = "kdexp.selected_trial"
"""On a trial's run: the goal that its recipe is selected by. The model may be a repeat's."""
FOLDS, SURE = "kdexp.folds", "kdexp.sure"
"""On a study's run: how many folds there are; the trials that were found to be sure."""

INPUT = "input.json"
"""The file that says what a run's student takes and answers, so that it needs no data set."""


LONGEST_NOTE = 8000  # characters of a description that MLflow takes
PARTS = "mlflow.kdexp.note."
"""What the tags begin with that keep the parts of a study's description: MLflow's page shows none
that begins with mlflow. Former versions wrote kdexp.selected_note, kdexp.confirmed_note.
"""


class RecordError(KdexpError):
    """A record that does not say what is so: a file that was changed, or numbers that contradict
    each other.
    """


def recipe_of(run: RunRecord, tracking: Tracking) -> Recipe:
    """The recipe of a run, from its record alone."""
    text = tracking.read_text(run.run_id, "config.json")
    try:
        stored = json.loads(text)
    except ValueError as error:
        raise RecordError(
            f"Run {run.run_id}: config.json is damaged ({error}); put it back from a copy of the"
            " store: without it there is no recipe to go by"
        ) from None
    source = f"config.json of run {run.run_id}, recorded by another version of kdexp"
    return validate(Recipe, upgrade(stored), source)


def input_text(split: Split) -> str:
    """What a student of images like those of a split takes and answers, as it is recorded."""
    return json.dumps(asdict(Input.of(split)), indent=2, ensure_ascii=False)


def input_of(run: RunRecord, tracking: Tracking) -> Input | None:
    """What a run's student takes and answers; None where an earlier version recorded the run.
    Raises RecordError.
    """
    if INPUT not in sealed(run):
        return None
    stored = json.loads(text_of(run, INPUT, tracking))
    return Input(**{**stored, "classes": tuple(stored["classes"])})


def values_of(run: RunRecord, keys: Iterable[str]) -> dict[str, Any]:
    """What a run's params hold under these keys: words as they are, else JSON. Without those that
    it has not.
    """
    found: dict[str, Any] = {}
    for key in keys:
        if key in run.params:
            try:
                found[key] = json.loads(run.params[key])
            except ValueError:
                found[key] = run.params[key]
    return found


def environment_of_run(run: RunRecord, tracking: Tracking) -> dict[str, str]:
    """What a run recorded of code, libraries, machine, and of how it was trained. Raises
    RecordError.
    """
    try:
        recorded = json.loads(tracking.read_text(run.run_id, "environment.json"))
        return {str(name): str(value) for name, value in recorded.items()}
    except (ValueError, AttributeError) as error:
        raise RecordError(
            f"Run {run.run_id}: environment.json is damaged ({error}); put it back from a copy of"
            " the store: it says in which form the run was trained"
        ) from None


def load_student(run: RunRecord, recipe: Recipe, like: Split, tracking: Tracking) -> nn.Module:
    """The student of a finished run, whose recipe this is, with its recorded weights. Raises
    RecordError.
    """
    module, state = build(recipe.student, like), weights_of(run, tracking)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise RecordError(
            f"Run {run.run_id}: its weights do not fit the student of its config.json"
            f" ({str(error).splitlines()[-1].strip()}): the recipe, or the network's own file, was"
            " changed since"
        ) from None
    return module.eval()


def weights_of(run: RunRecord, tracking: Tracking) -> dict[str, Tensor]:
    """The weights that a run ended with. Raises RecordError where they are not those that were
    recorded.
    """
    recorded = run.tags.get(WEIGHTS, "")
    with tempfile.TemporaryDirectory() as temporary:
        file = tracking.download(run.run_id, "weights.safetensors", Path(temporary))
        try:
            state = load_file(file)
        except (SafetensorError, OSError):
            raise _another(
                run, "weights.safetensors", f"unreadable, {sha256_of(file)}", recorded
            ) from None
    found = weights_hash(state)
    if found != recorded:
        raise _another(run, "weights.safetensors", found, recorded)
    return state


def artifact_of(run: RunRecord, place: str, folder: Path, tracking: Tracking) -> Path:
    """A file out of a run's record. Raises RecordError where it is not the one that was recorded,
    if its sum was.
    """
    file = tracking.download(run.run_id, place, folder)
    recorded = sealed(run).get(place)
    if recorded is not None and (found := sha256_of(file)) != recorded:
        raise _another(run, place, found, recorded)
    return file


def seal(run_id: str, sums: Mapping[str, str], tracking: Tracking) -> None:
    """Remember the SHA-256 of files that were logged to a run, by their place."""
    tracking.tag(run_id, {ARTIFACTS: json.dumps({**sealed(tracking.read(run_id)), **sums})})


def log_text(run_id: str, name: str, text: str, tracking: Tracking) -> None:
    """A text as a file of a run, with its SHA-256."""
    tracking.log_text(run_id, name, text)
    seal(run_id, {name: hashlib.sha256(text.encode()).hexdigest()}, tracking)


def text_of(run: RunRecord, place: str, tracking: Tracking) -> str:
    """What a text file of a run says. Raises RecordError where it is not the one that was recorded,
    if its sum was.
    """
    with tempfile.TemporaryDirectory() as temporary:
        return artifact_of(run, place, Path(temporary), tracking).read_text("utf-8")


def sealed(run: RunRecord) -> dict[str, str]:
    """SHA-256 of a run's files by their place; a former version recorded none. Raises
    RecordError.
    """
    text = run.tags.get(ARTIFACTS, "{}")
    try:
        found: dict[str, str] = json.loads(text)
        return dict(found)
    except (ValueError, TypeError):
        raise RecordError(
            f"Run {run.run_id}: its tag {ARTIFACTS} is no list of checksums any more; put it back,"
            " or delete the tag: its files are then no longer compared with it"
        ) from None


def answer_of(tags: Mapping[str, str]) -> str:
    """What a study has come to, for its description; nothing yet where nothing was selected."""
    parts = (
        tags.get(f"{PARTS}{part}", tags.get(f"kdexp.{part}_note", ""))
        for part in ("confirmed", "selected")
    )
    return "\n\n".join(filter(None, parts))


def _another(run: RunRecord, place: str, found: str, recorded: str) -> RecordError:
    anew = {
        "study": "run the same kdexp sweep again, which writes it anew",
        "teacher": "delete it: the teacher is then trained again",
    }.get(run.tags.get("kdexp.kind", ""), f"make it anew: kdexp reproduce {run.run_id}")
    return RecordError(
        f"Run {run.run_id}: {place} is not the file that was recorded (SHA-256 {found[:28]}…,"
        f" recorded {recorded[:16] or 'none'}…): it was changed or damaged. Put it back from a copy"
        f" of the store, or {anew}"
    )
