"""The benchmarks compare like with like: the same loss, the same images, the same network."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_sweep

from benchmarks import contenders, honesty, leak
from benchmarks.report import Kept, print_report
from kdexp.config import Recipe, identity, load
from kdexp.distill.datasets import Split
from kdexp.distill.losses import distillation_loss
from kdexp.distill.models import build, measure

ROOT = Path(__file__).parents[1]
ROWS = list(csv.DictReader((ROOT / "docs" / "results" / "frontier.csv").read_text().splitlines()))


def test_the_contenders_hyperparameters_and_loss_are_the_documented_ones() -> None:
    recipe = Recipe()
    training, how = recipe.training, recipe.distillation
    ours = (
        how.alpha,
        how.temperature,
        training.learning_rate,
        training.final_learning_rate,
        training.weight_decay,
    )
    assert ours == (
        contenders.ALPHA,
        contenders.TEMPERATURE,
        contenders.RATE,
        contenders.FINAL_RATE,
        contenders.DECAY,
    )
    assert (training.batch_size, training.seed) == (contenders.BATCH, contenders.SEED)
    student, teacher = torch.randn(8, 10).double(), torch.randn(8, 10).double()
    labels = torch.randint(10, (8,))
    expected = distillation_loss(student, teacher, labels, how.alpha, how.temperature).total
    assert contenders._loss(student, teacher, labels).item() == pytest.approx(
        expected.item(), rel=1e-12
    )


def test_torchdistills_loss_at_its_own_alpha_is_ours() -> None:
    losses = pytest.importorskip(
        "torchdistill.losses.mid_level", reason="torchdistill is installed for the benchmark only"
    )
    kd = losses.KDLoss("s", "output", "t", "output", contenders.TEMPERATURE, 1 - contenders.ALPHA)
    student = torch.randn(8, 10).double()
    teacher = torch.randn(8, 10).double()
    labels = torch.randint(10, (8,))
    theirs = kd({"s": {"output": student}}, {"t": {"output": teacher}}, labels)
    assert theirs.item() == pytest.approx(
        contenders._loss(student, teacher, labels).item(), rel=1e-12
    )


def test_the_contenders_images_are_ours(digits) -> None:
    from kdexp.distill.batches import pixels

    split = digits.train.take(torch.arange(5))
    floats = torch.stack(
        [contenders._Images(split, contenders.TEST)[number][0] for number in range(5)]
    )
    assert torch.allclose(floats, pixels(split, torch.arange(5)).expand(-1, 3, -1, -1), atol=1e-6)
    assert torch.allclose(floats, contenders._floats(split.images), atol=1e-6)


with_results = pytest.mark.parametrize(
    "row", ROWS, ids=[row["command"].split("&&")[-1].split()[2] for row in ROWS]
)


@with_results
def test_a_row_of_the_frontier_is_what_its_command_trains(row) -> None:
    sweep_command, confirm_command = (
        shlex.split(command) for command in row["command"].split("&&")
    )
    assert (sweep_command[:3], confirm_command[:2]) == (
        ["kdexp", "sweep", row["sweep_file"]],
        ["kdexp", "confirm"],
    )
    sweep = load(ROOT / row["sweep_file"], sweep_command[4::2])
    assert (set(sweep_command[3::2]), sweep.name) == ({"--set"}, confirm_command[2])
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    like = Split(
        images,
        torch.zeros(2, dtype=torch.int64),
        tuple("0123456789"),
        sweep.data.channels or 1,
        0.5,
        0.5,
    )
    size = measure(build(sweep.student, like), like)
    assert [str(size.parameters), str(size.multiply_adds), str(size.bytes)] == [
        row[key] for key in ("parameters", "multiply_adds", "bytes")
    ]


@with_results
def test_a_row_of_the_frontier_is_the_mean_of_its_runs(row) -> None:
    name = shlex.split(row["command"].split("&&")[1])[2]
    runs = json.loads((ROOT / "docs" / "results" / "runs" / f"{name}.json").read_text())["runs"]
    fresh = [run["metrics"] for run in runs if "fresh seed" in run["name"]]
    assert len(fresh) == int(row["seeds"]) >= 3
    assert float(row["val_accuracy"]) == pytest.approx(
        np.mean([run["val_accuracy"] for run in fresh]), abs=1e-5
    )
    assert float(row["test_accuracy"]) == pytest.approx(
        np.mean([run["test_accuracy"] for run in fresh]), abs=1e-5
    )
    assert float(row["test_sd"]) == pytest.approx(
        np.std([run["test_accuracy"] for run in fresh], ddof=1), abs=1e-5
    )


def test_the_simulated_noise_of_a_model_is_binomial_and_that_of_two_is_correlated() -> None:
    options = honesty._options(
        ["--candidates", "2", "--images", "500", "--shared", "0.4", "--seed-sd", "0"]
    )
    off = []
    for seed in range(4000):
        study = honesty.draw(options, 0.075, seed)
        found, true = np.array([r.first.accuracy for r in study.every]), np.array(study.true)
        off.append((found - true) / np.sqrt(true * (1 - true) / 500))
    assert np.cov(np.array(off).T) == pytest.approx(np.array([[1, 0.4], [0.4, 1]]), abs=0.06)
    assert np.mean(off) == pytest.approx(0, abs=0.04)


def test_confidence_and_fresh_seeds_each_make_the_selector_more_honest_at_the_cost_of_size(
    capsys,
) -> None:
    names = ["today", "confirm", "confidence", "both"]
    honesty.main(["--repetitions", "60", "--exponents", "0.075", "--policies", *names])
    plain, confirmed, sure, both = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    for better, worse in ((confirmed, plain), (sure, plain), (both, confirmed), (both, sure)):
        assert better["under_bar_%"] < worse["under_bar_%"]
        assert better["size_ratio"] > worse["size_ratio"]
    assert both["under_bar_%"] <= 10


def test_a_block_of_pairs_is_of_one_fold_under_two_teachers_of_one_seed(tmp_path, digits) -> None:
    first, second = islice(leak.blocks(tiny_sweep().recipe, digits, 2, tmp_path), 2)
    assert (first["fold"], second["fold"]) == (1, 2)
    assert first["teacher_seed"] == second["teacher_seed"]
    assert first["difference"] == first["shared"] - first["own"]
    homes = [file.parent for file in tmp_path.glob("*/weights.safetensors")]
    assert len(homes) == 3, "the shared one, and each fold's own"


def test_the_interval_of_what_leaks_is_that_of_its_blocks() -> None:
    row = {"shared": 90.0, "own": 89.0, "teacher_shared": 95.0, "teacher_own": 94.0, "pairs": 2}
    found = leak.summed_up([{**row, "difference": value} for value in (0.0, 1.0, 2.0)])
    assert (found["pairs"], found["blocks"], found["difference"]) == (6, 3, 1.0)
    assert (found["low"], found["high"]) == (-1.484, 3.484)
    assert leak.summed_up([{**row, "difference": 1.0}])["low"] == -np.inf


def test_repeats_on_fresh_folds_are_honest_and_smaller(capsys) -> None:
    options = ["--repetitions", "30", "--exponents", "0.15", "--policies", "both", "repeats"]
    honesty.main(options)
    both, repeats = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert repeats["under_bar_%"] <= 10
    assert repeats["none_%"] == 0
    assert repeats["size_ratio"] < both["size_ratio"]


def test_a_whole_study_spends_its_trainings_and_comes_to_an_answer(capsys) -> None:
    options = ["--repetitions", "1", "--trainings", "25", "--exponents", "0.15"]
    honesty.main([*options, "--policies", "both", "repeats"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["trainings"] <= 25 for row in rows] == [True, True]
    assert rows[1]["none_%"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("fashion")
@pytest.mark.parametrize("name", contenders.CONTENDERS)
def test_a_contender_trains_and_reports(tmp_path, name) -> None:
    from safetensors.torch import save_file
    from torchvision.models import resnet50

    if name == "torchdistill":
        pytest.importorskip(
            "torchdistill", reason="torchdistill is installed for the benchmark only"
        )
    save_file(resnet50(num_classes=10).state_dict(), tmp_path / "teacher.safetensors")
    command = [
        sys.executable,
        "-m",
        "benchmarks.contenders",
        name,
        "--teacher",
        str(tmp_path / "teacher.safetensors"),
    ]
    done = subprocess.run(
        [*command, "--steps", "2", "--images", "300", "--threads", "1"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["name"] == name
    assert figures["step_seconds"] > 0
    assert 0 <= figures["val_accuracy"] <= 1


def test_what_a_long_benchmark_has_measured_is_kept_and_not_measured_again(tmp_path) -> None:
    file, asked = tmp_path / "kept.jsonl", []

    def row(kept: Kept, number: int) -> dict:
        return kept.row({"study": number}, lambda: asked.append(number) or {"true": number / 3})

    first = Kept(file)
    assert [row(first, number) for number in (1, 2, 1)] == [
        {"study": 1, "true": 1 / 3},
        {"study": 2, "true": 2 / 3},
        {"study": 1, "true": 1 / 3},
    ]
    assert row(Kept(file), 2) == {"study": 2, "true": 2 / 3}
    assert asked == [1, 2]


def test_simulated_studies_go_on_from_what_is_kept(tmp_path, capsys) -> None:
    options = ["--trainings", "14", "--repetitions", "2", "--exponents", "0.15"]
    options += ["--policies", "repeats"]
    honesty.main(options)
    plain = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    file = tmp_path / "kept.jsonl"
    for repetitions in ("1", "2"):
        honesty.main([*options, "--repetitions", repetitions, "--keep", str(file)])
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
        assert len(file.read_text().splitlines()) == int(repetitions)
    assert rows == plain


def test_a_table_has_a_column_for_every_figure_that_some_row_has(capsys) -> None:
    print_report("x", [{"way": "a", "only": 1.5}, {"way": "b", "other": 2}], {"n": 1})
    head, *rows = capsys.readouterr().out.splitlines()[1:4]
    assert head.split() == ["way", "only", "other"]
    assert [row.split() for row in rows] == [["a", "1.5"], ["b", "2"]]


def test_what_was_measured_of_real_studies_is_found_again() -> None:
    kept = ROOT / "docs" / "results" / "answers.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    named = f"digits {sha256(identity(load(ROOT / 'sweeps' / 'digits.yaml')).encode()).hexdigest()[:12]}"
    assert {row["file"] for row in rows} == {named}, "of the file as it is now"
    assert sorted((row["study"], row["way"]) for row in rows) == [
        (study, way) for study in range(20) for way in ("one", "repeats")
    ]
