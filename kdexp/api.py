"""kdexp from Python: run a study, read it as data frames, load its model.

    import kdexp

    study = kdexp.run_sweep(kdexp.load_sweep("digits.yaml"))
    print(study.frontier())
    model = kdexp.load_model(study.selected.run_id)
    model(["photo.png"])                       # probabilities, a row for each image

What commands do, these do: the same records, the same rule, one look at the test split. `import
kdexp` imports nothing heavy; these names come with the first use.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdexp import KdexpError
from kdexp.config import Recipe, Size, Sweep, load, select_rule
from kdexp.distill.datasets import Split
from kdexp.distill.images import Picture, Unreadable, shown
from kdexp.distill.inputs import open_image, probabilities
from kdexp.environment import configure
from kdexp.runs.records import recipe_of
from kdexp.runs.tracking import RunRecord, Tracking
from kdexp.search.sweep import run_sweep as events_of
from kdexp.select.listing import TrialRow, frontier, trials_of
from kdexp.select.page import kept
from kdexp.select.predict import BATCH, input_like
from kdexp.select.promote import Promotion, promote, sweep_of
from kdexp.select.students import student_named
from kdexp.select.variants import load_variant
from kdexp.selection import NothingPasses
from kdexp.settings import Settings, checked, deaf

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("kdexp")
__all__ = ["Model", "Study", "load_model", "load_sweep", "open_study", "run_sweep"]


def load_sweep(file: str | Path, values: Mapping[str, Any] | None = None) -> Sweep:
    """The sweep file, with `values` by key in place of its own, such as {"study.trials": 30}.

    Raises KdexpError, which names the file, the key, and what is allowed.
    """
    given = [f"{key}={json.dumps(value)}" for key, value in (values or {}).items()]
    return load(Path(file), given)


def run_sweep(
    sweep: Sweep,
    *,
    on_event: Callable[[Any], None] | None = None,
    **where: Any,
) -> Study:
    """Run a study, or continue it, to its last trial, and select its smallest model over the bar.

    `on_event` gets what happens, as it happens (`kdexp.search.sweep.Event`): an epoch, a trial that
    has ended. `where` are the fields of `kdexp.settings.Settings`: stores, storage, tracking_uri,
    data_dir, device, threads, workers, pack. Raises KdexpError. Where no trial passes, the study
    has no `selected`.
    """
    settings = _settings(where)
    tracking, device = Tracking(settings), configure(settings.device, settings.threads)
    with closing(events_of(sweep, settings, tracking, device)) as events:
        for event in events:
            if on_event:
                on_event(event)
    study = Study(tracking.study(sweep.name), settings, tracking, device)
    try:
        promote(study.record, sweep.selection, settings, tracking, device, sure=True)
    except NothingPasses as why:
        log.warning("%s", why)
    if failure := kept(study.record, sweep.selection, settings, tracking):
        log.warning("%s", failure)
    return study


def open_study(name: str, **where: Any) -> Study:
    """A study that was run before, by its name. `where` as of run_sweep. Raises KdexpError."""
    settings = _settings(where)
    tracking = Tracking(settings, make=False)
    return Study(tracking.study(name), settings, tracking, configure(settings.device, None))


def load_model(name: str, **where: Any) -> Model:
    """The student of a run (its ID; as it was trained), or a registered one: models:/NAME@ALIAS.

    `where` as of run_sweep. Raises KdexpError.
    """
    settings = _settings(where)
    tracking, device = Tracking(settings, make=False), configure(settings.device, settings.threads)
    run, variant = student_named(name, "predict", tracking)
    recipe = recipe_of(run, tracking)
    like = input_like(run, recipe, settings, tracking).to(device)
    module = load_variant(run, recipe, variant, like, tracking).to(device)
    return Model(run.run_id, recipe, like, module)


@dataclass(frozen=True, repr=False)
class Study:
    """A study of the store, as it is now."""

    record: RunRecord
    """Its MLflow run."""
    settings: Settings
    tracking: Tracking
    device: torch.device

    def __repr__(self) -> str:
        return f"<study '{self.name}' in {self.tracking.shown}>"

    @property
    def name(self) -> str:
        """As in its sweep file."""
        return self.record.tags["kdexp.study"]

    @property
    def sweep(self) -> Sweep:
        """The sweep file it was last run with."""
        return sweep_of(self.record, self.tracking)

    @property
    def trials(self) -> pd.DataFrame:
        """Every trial, repeats among them, a row each: the fields of
        `kdexp.select.listing.TrialRow` and a column for each key that is searched.
        """
        return _frame(self._rows)

    def frontier(self, size: Size = "parameters") -> pd.DataFrame:
        """The trials than which none is both as small and more accurate, smallest first."""
        return _frame(frontier(self._rows, size))

    @property
    def selected(self) -> TrialRow | None:
        """The trial whose model is registered; None where none passes."""
        run_id = self.tracking.read(self.record.run_id).tags.get("kdexp.selected_run")
        return next((row for row in self._rows if row.run_id == run_id), None)

    def select(self, **rule: Any) -> Promotion:
        """Select by the study's own rule with what is given of `selection.…` in its place, such as
        accuracy_bar=0.95; look at the test split once for it, and register it.

        Raises KdexpError, of these NothingPasses where no trial passes.
        """
        changed = select_rule(self.sweep.selection, rule)
        return promote(self.record, changed, self.settings, self.tracking, self.device)

    @property
    def _rows(self) -> list[TrialRow]:
        return trials_of(self.record, self.tracking)


@dataclass(frozen=True, repr=False)
class Model:
    """A trained student, from pixels to probabilities."""

    run_id: str
    recipe: Recipe
    like: Split
    """Images of the form that it takes."""
    module: torch.nn.Module

    def __repr__(self) -> str:
        return f"<student of run {self.run_id}, {len(self.classes)} classes>"

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the probabilities."""
        return self.like.classes

    def __call__(self, images: np.ndarray | Sequence[str | Path]) -> np.ndarray:
        """The probability of each class for each image: float32 of shape (images, classes).

        `images` are files of any size and mode, prepared as in training, or an array of uint8, 0 to
        255, of the size that the model takes: (images, height, width) where it is grey, with
        channels last or first. Raises KdexpError.
        """
        pictures = (
            self._of_array(images)
            if isinstance(images, np.ndarray)
            else [self._of_file(Path(file)) for file in images]
        )
        if not pictures:
            return np.zeros((0, len(self.classes)), np.float32)
        return np.concatenate(
            [
                probabilities(self.module, pictures[first : first + BATCH], self.like).numpy()
                for first in range(0, len(pictures), BATCH)
            ]
        )

    def predict(self, images: np.ndarray | Sequence[str | Path]) -> list[str]:
        """The name of the likeliest class of each image."""
        return [self.classes[index] for index in self(images).argmax(1)]

    def _of_file(self, file: Path) -> Picture:
        try:
            return open_image(file, self.recipe.data, self.like)
        except Unreadable as why:
            raise KdexpError(f"{shown(file)} {why}") from None

    def _of_array(self, images: np.ndarray) -> list[Picture]:
        shape = (channels, height, width) = tuple(self.like.images.shape[1:])
        if images.dtype != np.uint8:
            raise KdexpError(
                f"images: an array of {images.dtype}; give uint8, pixels from 0 to 255"
            )
        if channels == 1 and images.shape[1:] == (height, width):
            images = images[:, None]
        elif images.ndim == 4 and images.shape[1:] == (height, width, channels):
            images = images.transpose(0, 3, 1, 2)
        if images.shape[1:] != shape:
            raise KdexpError(
                f"images: an array of shape {images.shape}; the model takes (images, {channels},"
                f" {height}, {width}) or channels last. Files may be of any size: give their paths"
            )
        return [Picture(pixels, frozenset()) for pixels in images]


def _settings(where: Mapping[str, Any]) -> Settings:
    known = [field.name for field in fields(Settings)]
    if unknown := [name for name in where if name not in known]:
        raise KdexpError(f"{unknown[0]}: not known; what there is: {', '.join(known)}")
    deaf()
    paths = {name: Path(where[name]) for name in ("stores", "data_dir") if where.get(name)}
    return checked(Settings(**{"workers": None, **where, **paths}))


def _frame(rows: Sequence[TrialRow]) -> pd.DataFrame:
    import pandas as pd

    names = [field.name for field in fields(TrialRow) if field.name != "searched"]
    table = [{name: getattr(row, name) for name in names} | dict(row.searched) for row in rows]
    return pd.DataFrame(table, columns=None if table else names)
