"""Records that are not as they were, as a user meets them: what reproduce says, in words."""

from __future__ import annotations

import re
import sqlite3
import sys
from contextlib import closing

import pytest
import torch

from cases.conftest import Case, one_line
from kdexp.distill.datasets import load_splits
from kdexp.runs.records import recipe_of
from kdexp.runs.tracking import Tracking
from kdexp.select.verify import verify
from kdexp.selection import AS_TRAINED
from kdexp.settings import Settings

NETS = """
from torch import nn
from widths import widened


def mlp(channels, image_size, classes, width):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size[0] * image_size[1], widened(width)), nn.ReLU(),
                         nn.Linear(widened(width), classes))
"""
WIDTHS = "def widened(width):\n    return width\n"


def run_id(output: str) -> str:
    return re.findall(r"Run ID: +([0-9a-f]{32})", output)[-1]


def changed(case: Case, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(case.folder / "mlruns" / "mlflow.db")) as database, database:
        assert database.execute(statement, values).rowcount


def test_reproduce_says_what_identical_covers_and_which_number_was_changed(case: Case) -> None:
    trained = case.kd("train", "tiny.yaml", "--set", "training.epochs=1")
    run = run_id(trained.stdout)
    same = case.kd("reproduce", run)
    assert same.returncode == 0, same.stderr
    assert "identical: 6 metric values and the SHA-256 of the weights (" in same.stdout
    assert re.search(
        r"as are +\d+ final metrics, \d+ params, 2 data sets, .*model_summary\.txt,"
        r" weights\.safetensors",
        same.stdout,
    )
    assert "not recorded" not in same.stdout
    changed(
        case,
        "update latest_metrics set value = 0.99 where run_uuid = ? and key = 'val_accuracy'",
        run,
    )
    says = (
        "(val_accuracy of 287 images, val_accuracy_low (of val_accuracy), val_accuracy_high (of"
        " val_accuracy) and "
    )
    line = one_line(case.kd("reproduce", run), f"Run {run} is not reproduced", says)
    assert "the record was changed after the run" in line


def test_without_its_sha_nothing_is_claimed_of_the_weights(case: Case) -> None:
    run = run_id(case.kd("train", "tiny.yaml", "--set", "training.epochs=1").stdout)
    changed(case, "delete from tags where run_uuid = ? and key in ('kdexp.weights_sha256')", run)
    done = case.kd("reproduce", run)
    one_line(done, "is not reproduced: 1 value differs (student weights)")
    assert "identical" not in done.stdout


@pytest.fixture
def forgotten() -> object:
    """Modules of the user's own are imported anew by the next command, as in a process of its
    own.
    """

    def forget() -> None:
        for name in [
            name for name in sys.modules if name in ("nets", "widths") or "kdexp_own" in name
        ]:
            del sys.modules[name]

    forget()
    yield forget
    forget()


def test_a_module_that_ones_own_network_imports_is_on_record(case: Case, forgotten) -> None:
    case.write("widths.py", WIDTHS)
    case.network(NETS, '{architecture: "nets:mlp", options: {width: 8}}')
    trained = case.kd("train", "tiny.yaml", "--set", "training.epochs=1")
    run = run_id(trained.stdout)
    forgotten()
    case.write("widths.py", WIDTHS.replace("return width", "return width + 1"))
    done = case.kd("reproduce", run)
    one_line(done, "is not reproduced", "Environment: student imports widths.")
    assert re.search(r"student imports widths +[0-9a-f]{16} +[0-9a-f]{16}", done.stdout)


def test_what_is_asked_of_a_run_whose_own_network_was_edited_since_says_so(
    case: Case, forgotten, caplog
) -> None:
    case.write("widths.py", WIDTHS)
    case.network(NETS, '{architecture: "nets:mlp", options: {width: 8}}')
    run = run_id(case.kd("train", "tiny.yaml", "--set", "training.epochs=1").stdout)
    case.write("widths.py", f"{WIDTHS}# a word\n")
    tracking = Tracking(Settings(stores=case.folder / "mlruns"))
    record = tracking.read(run)
    recipe = recipe_of(record, tracking)
    verify(record, recipe, AS_TRAINED, load_splits(recipe.data), tracking, torch.device("cpu"))
    assert (
        f"run {run}: not what it was trained with any more: student imports widths" in caplog.text
    )
