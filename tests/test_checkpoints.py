"""Checkpoints: whole or not used; a training that goes on from one ends in the bits of an unbroken
one.
"""

from __future__ import annotations

import dataclasses
import errno
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdexp.config import Augment, Data, Distillation, Recipe, Student, Training
from kdexp.distill.checkpoints import Checkpoint, Checkpoints, Kept
from kdexp.distill.models import weights_hash
from kdexp.distill.packs import Execution, Lane
from kdexp.distill.train import EpochReport, Snapshot, TeacherLogits, train
from kdexp.files import write_atomically
from kdexp.search.scheduler import _Claimed

DATA = Data(
    dataset="digits", channels=1, validation_fraction=0.2, augment=Augment(flip=False, shift=1)
)
EPOCHS = 4


def lane(place: int = 0, optimizer: str = "adam", architecture: str = "cnn", seed: int = 7) -> Lane:
    own = (
        {"architecture": architecture, "channels": None, "hidden": None, "dropout": None}
        if architecture != "cnn"
        else {}
    )
    network = Student(**({"channels": (4, 6), "hidden": 12, "dropout": 0.2} | own))
    training = Training(
        optimizer=optimizer,
        epochs=EPOCHS,
        learning_rate=0.01 / (1 + place),
        seed=seed,
        weight_decay=1e-3,
    )
    return Lane(network, training, Distillation(alpha=0.1 + 0.3 * place, temperature=2.0))


def checkpoint(epoch: int = 3, **changes: object) -> Checkpoint:
    fields = {
        "run_id": "0" * 32,
        "environment": {"threads": "1"},
        "state": "complete",
        "bad_step": None,
        "history": [
            {"epoch": n, "loss": 0.1 * n, "time_ms": 1_700_000_000_000 + n}
            for n in range(1, epoch + 1)
        ],
        "kept": Kept(2, 250, {"0.weight": torch.randn(4, 1, 3, 3)}),
        "snapshot": Snapshot(
            epoch, 250, {"parameters": torch.randn(100), "batches": torch.tensor(51)}
        ),
    }
    return Checkpoint(**(fields | changes))


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return one.to_bytes() == other.to_bytes()


def numbers(report: EpochReport) -> tuple:
    values = (report.epoch, report.loss, report.val_loss, report.val_accuracy, report.learning_rate)
    return values, weights_hash(report.weights) if report.weights else ""


# --- the file ---


@pytest.mark.parametrize("kept", [None, Kept(1, 5, {"w": torch.zeros(2)})])
def test_what_is_saved_is_loaded(tmp_path: Path, kept: Kept | None) -> None:
    before = checkpoint(kept=kept, history=[{"epoch": 1, "loss": float("nan"), "time_ms": 1.0}])
    Checkpoints(tmp_path / "new" / "folder").save("trial-3", before)
    after = Checkpoints(tmp_path / "new" / "folder").load("trial-3")
    assert after is not None
    assert same(before, after)


def test_there_is_none_where_none_was_saved(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nowhere").load("trial-0") is None


@pytest.mark.parametrize("damage", ["empty", "torn", "one bit", "longer", "gone", "another file's"])
def test_a_damaged_checkpoint_is_not_used_the_one_before_it_is(tmp_path: Path, damage: str) -> None:
    checkpoints, former, last = Checkpoints(tmp_path), checkpoint(2), checkpoint(3)
    checkpoints.save("trial-0", former)
    checkpoints.save("trial-0", last)
    path = tmp_path / "trial-0.checkpoint"
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 1
    damaged = {
        "empty": b"",
        "torn": content[:-100],
        "longer": content + b"x",
        "another file's": b"\x80\x04." * 50,
    }
    path.write_bytes(bytes(damaged.get(damage, content)))
    if damage == "gone":
        path.unlink()
    found = checkpoints.load("trial-0")
    assert found is not None
    assert same(found, former)
    (tmp_path / "trial-0.former").write_bytes(b"")
    assert checkpoints.load("trial-0") is None


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_any_flipped_bit_is_noticed(position: int, bit: int) -> None:
    content = bytearray(WHOLE)
    content[position % len(content)] ^= 1 << bit
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint.from_bytes(bytes(content))


WHOLE = checkpoint().to_bytes()


def test_an_ended_training_leaves_no_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "study")
    for name in ("trial-0", "trial-0", "trial-1"):
        checkpoints.save(name, checkpoint())
    checkpoints.remove("trial-0")
    assert checkpoints.load("trial-0") is None
    assert checkpoints.load("trial-1") is not None
    checkpoints.clear()
    assert not (tmp_path / "study").exists()


def test_a_full_disk_leaves_the_last_checkpoint_and_says_where(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the same error comes out of the same
    call.
    """
    code = (
        "import sys, torch\nfrom test_checkpoints import Checkpoints, Path, Snapshot,"
        " checkpoint\nimport resource, signal\ncheckpoints ="
        " Checkpoints(Path(sys.argv[1]))\ncheckpoints.save('trial-0',"
        " checkpoint(2))\nsignal.signal(signal.SIGXFSZ,"
        " signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\ntry:\n   "
        " checkpoints.save('trial-0', checkpoint(3, snapshot=Snapshot(3, 1, {'parameters':"
        " torch.zeros(10_000)})))\nexcept OSError as error:\n    print(error.errno,"
        " error.filename)\n"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(errno.EFBIG), str(tmp_path / "trial-0.checkpoint")]
    found = Checkpoints(tmp_path).load("trial-0")
    assert found is not None
    assert found.snapshot.epoch == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trial-0.checkpoint"], (
        "nothing half-written"
    )


def test_a_write_that_is_broken_off_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def broken(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, broken)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


# --- the training ---


def trained(
    lanes: list[Lane | None], digits, soft, how: Execution, resumed=()
) -> list[tuple[EpochReport | None, ...]]:
    return list(train(lanes, digits, DATA, soft, how, resumed=resumed))


def stopped(lanes: list[Lane], digits, soft, how: Execution, epochs: int) -> list[Snapshot]:
    """Snapshots after so many epochs, through the file's bytes."""
    training = train(lanes, digits, DATA, soft, how)
    for _ in range(epochs):
        reports = next(training)
    snapshots = [report.snapshot() for report in reports]
    training.close()
    return [
        Checkpoint.from_bytes(checkpoint(snapshot=snapshot).to_bytes()).snapshot
        for snapshot in snapshots
    ]


def soft_labels(digits) -> TeacherLogits:
    generator = torch.Generator().manual_seed(0)
    return TeacherLogits(torch.randn(9, len(digits.train), 10, generator=generator).half())


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("architecture", ["cnn", "test_checkpoints:own"])
def test_resumed_equals_unbroken(digits, architecture, optimizer, after) -> None:
    lanes, how, soft = [lane(1, optimizer, architecture)], Execution(), soft_labels(digits)
    whole = [numbers(report) for (report,) in trained(lanes, digits, soft, how)]
    snapshots = stopped(lanes, digits, soft, how, after)
    rest = [numbers(report) for (report,) in trained(lanes, digits, soft, how, snapshots)]
    assert rest == whole[after:]


def own(channels: int, image_size: tuple[int, int], classes: int) -> torch.nn.Module:
    """A network of one's own, with state and chance of its own."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels, 6, 3),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(6 * (image_size[0] - 2) * (image_size[1] - 2), classes),
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lowering", ["grouped", "unfold", "vmap", "separate"])
def test_a_fused_lane_resumed_in_its_place_equals_unbroken_also_without_its_neighbours(
    digits, lowering, shared
) -> None:
    lanes = [lane(place, seed=7 if shared else place) for place in range(3)]
    how, soft = Execution(3, shared, lowering=lowering), soft_labels(digits)
    whole = [
        [numbers(report) for report in reports] for reports in trained(lanes, digits, soft, how)
    ]
    snapshots = stopped(lanes, digits, soft, how, 2)
    for missing in ([], [0], [0, 2]):
        there = [None if place in missing else one for place, one in enumerate(lanes)]
        known = [None if place in missing else one for place, one in enumerate(snapshots)]
        for epoch, reports in enumerate(trained(there, digits, soft, how, known), 2):
            for place, report in enumerate(reports):
                if place in missing:
                    assert report is None
                else:
                    assert numbers(report) == whole[epoch][place]


def test_lanes_with_batches_of_their_own_resume_in_different_epochs(digits) -> None:
    lanes = [lane(place, seed=place) for place in range(2)]
    how = Execution(2, shared=False)
    soft = soft_labels(digits)
    whole = trained(lanes, digits, soft, how)
    snapshots = [
        stopped(lanes, digits, soft, how, epochs)[place] for place, epochs in enumerate((1, 3))
    ]
    rest = trained(lanes, digits, soft, how, snapshots)
    assert [numbers(reports[0]) for reports in rest] == [
        numbers(reports[0]) for reports in whole[1:]
    ]
    assert [numbers(reports[1]) for reports in rest if reports[1]] == [numbers(whole[3][1])]
    with pytest.raises(ValueError, match="one epoch"):
        trained(lanes, digits, soft, Execution(2, shared=True), snapshots)


def cut_short(place: int, digits) -> Lane:
    """A lane whose fourth and last epoch has one step."""
    one = lane(place, seed=place)
    steps = len(digits.train) // one.training.batch_size
    return dataclasses.replace(
        one, training=one.training.model_copy(update={"max_steps": 3 * steps + 1})
    )


def test_lanes_whose_last_epoch_is_cut_short_resume_in_one_epoch_only(digits) -> None:
    """Together, the one that is ahead would have ended the other's epoch after its own last
    step.
    """
    lanes = [cut_short(place, digits) for place in range(2)]
    how = Execution(2, shared=False)
    soft = soft_labels(digits)
    whole = trained(lanes, digits, soft, how)
    assert len(whole) == 4
    apart = [
        stopped(lanes, digits, soft, how, epochs)[place] for place, epochs in enumerate((2, 3))
    ]
    with pytest.raises(ValueError, match="cut short by max_steps"):
        trained(lanes, digits, soft, how, apart)
    for place, snapshot in enumerate(apart):  # so each goes on by itself, in its place
        alone = [snapshot if place == other else None for other in range(2)]
        there = [one if place == other else None for other, one in enumerate(lanes)]
        rest = trained(there, digits, soft, how, alone)
        assert [numbers(reports[place]) for reports in rest] == [
            numbers(reports[place]) for reports in whole[snapshot.epoch :]
        ]


@pytest.mark.parametrize("over", [4, 3])
def test_a_lane_that_is_over_does_not_cut_the_epochs_of_the_others(digits, over) -> None:
    """Also where it was at its last, short epoch; one that was given up before it goes along."""
    lanes = [cut_short(place, digits) for place in range(2)]
    how = Execution(2, shared=False)
    soft = soft_labels(digits)
    whole = trained(lanes, digits, soft, how)
    snapshots = [
        stopped(lanes, digits, soft, how, epochs)[place] for place, epochs in enumerate((1, over))
    ]
    there = [lanes[0], lanes[1] if over == 4 else None]
    rest = trained(there, digits, soft, how, [snapshots[0], snapshots[1] if over == 4 else None])
    assert [numbers(reports[0]) for reports in rest] == [
        numbers(reports[0]) for reports in whole[1:]
    ]


def test_trials_that_go_on_with_max_steps_share_a_pack_only_in_one_epoch(digits) -> None:
    def begun(epoch: int, max_steps: int | None) -> tuple[str, ...]:
        recipe = Recipe(student=lane().network, training=Training(epochs=4, max_steps=max_steps))
        trial = types.SimpleNamespace(recipe=recipe)
        environment = {"threads": "1", **Execution(2, shared=False).record(0)}
        return _Claimed(
            trial,
            dataclasses.replace(
                checkpoint(), environment=environment, snapshot=Snapshot(epoch, 0, {})
            ),
        ).key

    assert begun(1, None) == begun(2, None)
    assert begun(1, 100) != begun(2, 100)
    assert begun(1, 100) == begun(1, 100)


def test_a_training_that_was_at_its_end_has_nothing_left_to_do(digits) -> None:
    lanes, how, soft = [lane()], Execution(), soft_labels(digits)
    assert trained(lanes, digits, soft, how, stopped(lanes, digits, soft, how, EPOCHS)) == []


def test_the_first_bad_step_is_named(digits) -> None:
    healthy = trained([lane()], digits, soft_labels(digits), Execution())
    assert all(report.bad_step is None for (report,) in healthy)
    wild = Lane(
        lane().network, Training(optimizer="sgd", learning_rate=1e6, epochs=2), lane().distillation
    )
    reports = trained([wild], digits, soft_labels(digits), Execution())
    (first,) = next(reports for reports in reports if not reports[0].finite)
    steps = len(digits.train) // wild.training.batch_size
    assert first.bad_step is not None
    assert (first.epoch - 1) * steps < first.bad_step <= first.epoch * steps
