"""What a run's own record gives back: its recipe, and its student with the weights it ended with."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from kdexp.config import Recipe, upgraded
from kdexp.distill.data import Split
from kdexp.distill.models import build
from kdexp.reading import validate
from kdexp.tracking import RunRecord, Tracking

__all__ = ["load_student", "recipe_of"]


def recipe_of(run: RunRecord, tracking: Tracking) -> Recipe:
    """The recipe of a run, from its record alone."""
    text = tracking.read_text(run.run_id, "config.json")
    return validate(Recipe, upgraded(json.loads(text)), f"run {run.run_id}, recorded by another version of kdexp")


def load_student(run: RunRecord, recipe: Recipe, like: Split, tracking: Tracking) -> nn.Module:
    """The student of a finished run, whose recipe this is, with its recorded weights."""
    module = build(recipe.student, like)
    with tempfile.TemporaryDirectory() as temporary:
        module.load_state_dict(load_file(tracking.download(run.run_id, "weights.safetensors", Path(temporary))))
    return module.eval()
