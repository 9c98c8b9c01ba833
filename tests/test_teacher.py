"""The teacher: trained once, read from any honest checkpoint, cached, and never silently
another.
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdexp.config import Augment, Data, Distillation, Teacher, Training
from kdexp.distill import teacher as module_under_test
from kdexp.distill.batches import pixels, views
from kdexp.distill.datasets import Splits
from kdexp.distill.evaluate import evaluate, logits_of
from kdexp.distill.execution import choose
from kdexp.distill.logits import CacheProgress
from kdexp.distill.models import build, weights_hash
from kdexp.distill.packs import Lane, fresh
from kdexp.distill.teacher import (
    Ensemble,
    TeacherError,
    WeightsRead,
    lane_of,
    missing,
    prepare_teacher,
    read_weights,
    write_atomically,
)
from kdexp.distill.train import EpochReport, draw, draw_erased, train

DATA = Data(
    dataset="digits", channels=1, validation_fraction=0.2, augment=Augment(flip=False, shift=1)
)
TEACHER = Teacher(
    architecture="cnn", channels=(8, 16), hidden=16, epochs=2, learning_rate=0.01, per_fold=False
)


def prepared(
    folder: Path,
    digits,
    teacher: Teacher = TEACHER,
    data: Data = DATA,
    weights: Path | None = None,
    training: Training | None = None,
    whole: bool = False,
):
    events, steps = [], prepare_teacher(teacher, data, digits, folder, weights, training, whole)
    while True:
        try:
            events.append(next(steps))
        except StopIteration as end:
            return end.value, events


def test_it_is_trained_once_and_its_logits_are_those_of_every_view(tmp_path, digits) -> None:
    first, events = prepared(tmp_path, digits)
    assert [type(e) for e in events] == [EpochReport] * 2 + [CacheProgress] * 9
    again, events = prepared(tmp_path, digits)
    assert events == []
    assert again.sha256 == first.sha256
    assert torch.equal(again.soft.logits, first.soft.logits)
    network = build(TEACHER, digits.train)
    network.load_state_dict(load_file(first.weights))
    at = views(DATA.augment)
    for view in (0, 4, 8):
        with torch.no_grad():
            live = network.eval()(pixels(digits.train, torch.arange(50), at[view].expand(50, 3)))
        assert torch.allclose(first.soft.logits[view, :50].float(), live, rtol=2e-3, atol=2e-2)


def test_its_accuracy_is_measured_on_validation(tmp_path, digits) -> None:
    teacher, events = prepared(tmp_path, digits)
    reports = [e for e in events if isinstance(e, EpochReport)]
    assert teacher.val_accuracy == max(r.val_accuracy for r in reports)
    assert [row["val_accuracy"] for row in teacher.history] == [r.val_accuracy for r in reports]


def test_the_cache_knows_weights_normalisation_and_views(tmp_path, digits) -> None:
    _, _once = prepared(tmp_path, digits)
    teacher, _ = prepared(tmp_path, digits)
    caches = set(tmp_path.glob("logits-*"))
    for change in ({"mean": 0.4}, {"augment": Augment(flip=True, shift=0)}):
        other = DATA.model_copy(update=change)
        prepared(tmp_path, digits, data=other, weights=teacher.weights)
        assert len(set(tmp_path.glob("logits-*")) - caches) == 1
        caches = set(tmp_path.glob("logits-*"))
    prepared(tmp_path, digits, TEACHER.model_copy(update={"seed": 1}))
    assert len(set(tmp_path.glob("logits-*")) - caches) == 1


def test_a_cache_of_another_teacher_under_the_same_name_is_noticed(tmp_path, digits) -> None:
    prepared(tmp_path, digits)
    (cache,) = tmp_path.glob("logits-*")
    content = load_file(cache)
    with module_under_test.safe_open(cache, framework="pt") as file:
        facts = file.metadata()
    del facts["sha256"]  # it would be noticed by that, where a version wrote it that had one
    content["logits"] = content["logits"].flip(1).contiguous()
    cache.unlink()
    save_file(content, cache, metadata=facts)
    with pytest.raises(TeacherError, match="disagrees with the live teacher"):
        prepared(tmp_path, digits)


def changed(file: Path, change, **facts: str) -> None:
    """A safetensors file with other tensors, or other metadata."""
    with module_under_test.safe_open(file, framework="pt") as opened:
        known = opened.metadata()
    content = change(load_file(file))
    file.unlink()
    save_file(
        content, file, metadata={name: value for name, value in {**known, **facts}.items() if value}
    )


def one_logit(content):
    content["logits"][1, 7, 3] += 0.25
    return content


def test_one_changed_logit_is_noticed_and_a_new_cache_made_once_it_is_deleted(
    tmp_path, digits
) -> None:
    first, _ = prepared(tmp_path, digits)
    changed(first.cache, one_logit)
    with pytest.raises(TeacherError) as error:
        prepared(tmp_path, digits)
    assert re.search(
        r"not the logits that were written \(SHA-256 \w{16}…, recorded \w{16}…\); delete it",
        str(error.value),
    )
    first.cache.unlink()
    assert prepared(tmp_path, digits)[0].logits_sha256 == first.logits_sha256


def test_a_worker_does_not_train_on_a_cache_that_was_changed_meanwhile(tmp_path, digits) -> None:
    teacher, _ = prepared(tmp_path, digits)
    sent = pickle.dumps(teacher)
    assert torch.equal(pickle.loads(sent).soft.logits, teacher.soft.logits)
    changed(teacher.cache, one_logit)
    with pytest.raises(
        TeacherError, match=f"{teacher.cache.name}: not the logits that were written"
    ):
        pickle.loads(sent)


# --- for every fold ---


def test_a_cache_of_all_images_serves_every_fold_from_one_file(tmp_path, digits) -> None:
    plain, _ = prepared(tmp_path, digits)
    first, events = prepared(tmp_path, digits, whole=True)
    assert [type(e) for e in events] == [CacheProgress] * 9
    assert first.cache != plain.cache
    assert not plain.of_all_images
    assert first.soft.logits.shape == (9, len(digits.whole), 10)
    for fold in range(5):
        data = DATA.model_copy(update={"fold": fold})
        splits = digits.cut_by(data)
        own, events = prepared(tmp_path, splits, data=data, whole=True)
        assert not events
        assert (own.sha256, own.cache, own.logits_sha256) == (
            first.sha256,
            first.cache,
            first.logits_sha256,
        )
        assert torch.equal(own.soft.columns, splits.kept)
        assert own.soft.samples == len(splits.train)
        assert own.val_correct == plain.val_correct
    near = first.soft.logits[:, digits.kept].float()
    assert torch.allclose(near, plain.soft.logits.float(), rtol=4e-3, atol=2e-2)


def test_with_fewer_epochs_than_views_a_cache_for_every_fold_still_holds_every_view(
    tmp_path, digits
) -> None:
    few, _ = prepared(tmp_path, digits, training=Training(epochs=3), whole=True)
    assert (few.soft.per, len(few.soft.logits)) == ("view", 9)


def test_a_cache_of_all_images_travels_with_its_columns_and_its_damage_is_noticed(
    tmp_path, digits
) -> None:
    teacher, _ = prepared(tmp_path, digits, whole=True)
    there = pickle.loads(pickle.dumps(teacher.on(digits.cut_by(fold(2)).kept)))
    assert torch.equal(there.soft.logits, teacher.soft.logits)
    assert torch.equal(there.soft.columns, digits.cut_by(fold(2)).kept)
    changed(teacher.cache, one_logit)
    with pytest.raises(TeacherError, match="not the logits that were written"):
        prepared(tmp_path, digits, whole=True)
    changed(teacher.cache, lambda content: {"logits": content["logits"].flip(1).contiguous()})
    # without its checksum, as if it had been written so
    changed(teacher.cache, lambda content: content, sha256="")
    with pytest.raises(TeacherError, match="disagrees with the live teacher"):
        prepared(tmp_path, digits, whole=True)


def fold(number: int) -> Data:
    return DATA.model_copy(update={"fold": number})


def test_a_shared_teacher_holds_out_fold_0_whatever_its_students_hold_out(tmp_path, digits) -> None:
    other, events = prepared(tmp_path / "other", digits.cut_by(fold(3)), data=fold(3))
    assert epochs(events) == TEACHER.epochs
    usual, _ = prepared(tmp_path / "usual", digits)
    assert other.sha256 == usual.sha256
    assert other.history[0]["loss"] == usual.history[0]["loss"]
    assert (other.val_correct, other.val_samples) == (usual.val_correct, usual.val_samples)


@pytest.mark.parametrize("fact", ["parameters", "val_correct", "val_samples", "sha256"])
def test_what_a_cache_says_of_its_teacher_is_covered_too(tmp_path, digits, fact) -> None:
    teacher, _ = prepared(tmp_path, digits)
    changed(teacher.cache, lambda content: content, **{fact: "1"})
    with pytest.raises(TeacherError, match="not the logits that were written"):
        prepared(tmp_path, digits)
    changed(teacher.cache, lambda content: content, **{fact: ""})
    if fact != "sha256":
        with pytest.raises(TeacherError, match=f"damaged logits cache .it does not say {fact}"):
            prepared(tmp_path, digits)


def test_a_former_versions_cache_is_compared_with_the_teacher_and_then_has_a_checksum(
    tmp_path, digits
) -> None:
    teacher, _ = prepared(tmp_path, digits)
    changed(teacher.cache, lambda content: content, sha256="")
    again, events = prepared(tmp_path, digits)
    assert not events
    assert again.logits_sha256 == teacher.logits_sha256
    changed(teacher.cache, one_logit)
    with pytest.raises(TeacherError, match="not the logits that were written"):
        prepared(tmp_path, digits)


def test_a_teacher_whose_weights_were_changed_is_noticed_and_one_of_a_former_version_is_read(
    tmp_path, digits
) -> None:
    teacher, _ = prepared(tmp_path, digits)
    name = next(
        name for name, tensor in load_file(teacher.weights).items() if tensor.is_floating_point()
    )

    def nudged(content):
        content[name] += 1e-3
        return content

    changed(teacher.weights, lambda content: content, sha256="")
    assert prepared(tmp_path, digits)[0].sha256 == teacher.sha256
    changed(teacher.weights, lambda content: content, sha256=teacher.sha256)
    changed(teacher.weights, nudged)
    with pytest.raises(
        TeacherError,
        match=r"not the weights that were written .* the teacher is then trained again",
    ):
        prepared(tmp_path, digits)


def test_a_given_teachers_kept_weights_are_written_anew_where_they_were_changed(
    tmp_path, digits
) -> None:
    trained, _ = prepared(tmp_path / "a", digits)
    given = TEACHER.model_copy(update={"weights": str(trained.weights)})
    kept, _ = prepared(tmp_path / "b", digits, given)
    for damage in (b"", kept.weights.read_bytes()[:-1] + b"x"):
        kept.weights.write_bytes(damage)
        prepared(tmp_path / "b", digits, given)
        assert weights_hash(load_file(kept.weights)) == trained.sha256


def test_a_cut_cache_is_noticed(tmp_path, digits) -> None:
    prepared(tmp_path, digits)
    (cache,) = tmp_path.glob("logits-*")
    os.truncate(cache, cache.stat().st_size // 2)
    with pytest.raises(TeacherError, match="damaged logits cache"):
        prepared(tmp_path, digits)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10))


def prefixed(state, prefix: str):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model_state_dict": s, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda s: {"state_dict": prefixed(s, "module.")},
        lambda s: prefixed(s, "model."),
        lambda s: prefixed(s, "module.model."),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_checkpoint_is_read_bare_nested_or_prefixed(tmp_path, wrap, suffix) -> None:
    state, path = network().state_dict(), tmp_path / f"teacher{suffix}"
    wrapped = wrap(state)
    if suffix == ".safetensors":
        if not all(isinstance(value, torch.Tensor) for value in wrapped.values()):
            wrapped = prefixed(state, "module.")
        save_file(wrapped, path)
    else:
        torch.save(wrapped, path)
    assert weights_hash(read_weights(path, network())) == weights_hash(state)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": network().state_dict(), "x": Bomb()}, tmp_path / "evil.pt")
    with pytest.raises(TeacherError, match="never runs code"):
        read_weights(tmp_path / "evil.pt", network())
    assert not (tmp_path / "exploded").exists()


def test_a_whole_pickled_module_is_refused(tmp_path) -> None:
    torch.save(network(), tmp_path / "module.pt")
    with pytest.raises(TeacherError, match="state_dict"):
        read_weights(tmp_path / "module.pt", network())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: s | {"0.weight": torch.zeros(3, 1, 3, 3)},
            "wrong shape: 0.weight is (3, 1, 3, 3)",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "3.bias"}, "lacks 3.bias"),
        (lambda s: s | {"9.extra": torch.zeros(1)}, "has 9.extra"),
        (lambda s: s | {"3.bias": torch.full((10,), float("nan"))}, "NaN or infinity"),
        (lambda s: {}, "no weights"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_said(tmp_path, change, says) -> None:
    torch.save(change(network().state_dict()), tmp_path / "t.pt")
    with pytest.raises(TeacherError) as error:
        read_weights(tmp_path / "t.pt", network())
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04broken"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_checkpoint_is_said(tmp_path, content, suffix) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content)
    with pytest.raises(TeacherError, match=path.name):
        read_weights(path, network())


def test_a_given_checkpoint_is_used_and_one_that_is_missing_is_said(tmp_path, digits) -> None:
    trained, _ = prepared(tmp_path / "a", digits)
    given = TEACHER.model_copy(update={"weights": str(trained.weights), "epochs": 99})
    read, events = prepared(tmp_path / "b", digits, given)
    assert read.sha256 == trained.sha256
    assert not any(isinstance(event, EpochReport) for event in events)
    with pytest.raises(TeacherError, match="no such checkpoint"):
        prepared(tmp_path, digits, TEACHER.model_copy(update={"weights": "nowhere.pt"}))


def test_a_diverging_teacher_is_said_and_leaves_nothing(tmp_path, digits) -> None:
    wild = TEACHER.model_copy(
        update={"optimizer": "sgd", "learning_rate": 1e30, "schedule": "constant"}
    )
    with pytest.raises(TeacherError, match=r"diverged in epoch 1 .* lower teacher.learning_rate"):
        prepared(tmp_path, digits, wild)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_logits_beyond_half_precision_are_refused(tmp_path, digits) -> None:
    trained, _ = prepared(tmp_path / "a", digits)
    state = load_file(trained.weights)
    last = [name for name in state if name.endswith("weight")][-1]
    state[last] = state[last] * 1e6
    save_file(state, tmp_path / "loud.safetensors")
    with pytest.raises(TeacherError, match="half precision"):
        prepared(
            tmp_path / "b",
            digits,
            TEACHER.model_copy(update={"weights": str(tmp_path / "loud.safetensors")}),
        )
    assert not list((tmp_path / "b").glob("logits-*"))


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- several as one ---


def several(members: int, **changes: object) -> Teacher:
    return TEACHER.model_copy(update={"members": members, **changes})


def epochs(events: list) -> int:
    return sum(isinstance(event, EpochReport) for event in events)


def alone(seed: int, folder: Path, digits):
    return prepared(folder, digits, several(1, seed=TEACHER.seed + seed))[0]


def test_an_ensembles_logits_are_the_mean_of_its_members_raw_logits(tmp_path, digits) -> None:
    ensemble, events = prepared(tmp_path / "together", digits, several(3))
    assert epochs(events) == 3 * TEACHER.epochs
    members = [build(TEACHER, digits.train) for _ in range(3)]
    for seed, member in enumerate(members):
        member.load_state_dict(load_file(alone(seed, tmp_path / "alone", digits).weights))
    for view, at in enumerate(views(DATA.augment)):
        chosen = at.expand(len(digits.train), 3)
        mean = torch.stack([logits_of(member, digits.train, chosen) for member in members]).mean(0)
        assert torch.equal(ensemble.soft.logits[view], mean.half())
    correct = (
        torch.stack([logits_of(member, digits.validation) for member in members]).mean(0).argmax(1)
    )
    assert ensemble.val_correct == int((correct == digits.validation.labels).sum())


def test_an_ensembles_parameters_are_the_sum_and_its_history_the_mean(tmp_path, digits) -> None:
    ensemble, _ = prepared(tmp_path, digits, several(2))
    first, second = (alone(seed, tmp_path, digits) for seed in range(2))
    assert ensemble.parameters == first.parameters + second.parameters
    assert [row["epoch"] for row in ensemble.history] == [1, 2]
    for row, *rows in zip(ensemble.history, first.history, second.history, strict=True):
        assert row["val_loss"] == pytest.approx(sum(own["val_loss"] for own in rows) / 2, rel=1e-12)


def test_going_from_one_member_to_two_trains_only_the_second(tmp_path, digits) -> None:
    first, _ = prepared(tmp_path, digits)
    two, events = prepared(tmp_path, digits, several(2))
    assert epochs(events) == TEACHER.epochs
    again, events = prepared(tmp_path, digits, several(2))
    assert events == []
    assert first.sha256 != two.sha256 == again.sha256
    back, events = prepared(tmp_path, digits)
    assert events == []
    assert back.sha256 == first.sha256


def test_an_ensemble_that_breaks_off_in_its_second_member_goes_on_there(
    tmp_path, digits, monkeypatch
) -> None:
    monkeypatch.setattr(module_under_test, "CHECKPOINT_SECONDS", 0)
    steps = prepare_teacher(several(2), DATA, digits, tmp_path / "broken")
    for _ in range(TEACHER.epochs + 1):
        next(steps)
    steps.close()
    broken, events = prepared(tmp_path / "broken", digits, several(2))
    assert [event.epoch for event in events if isinstance(event, EpochReport)] == [2]
    unbroken, _ = prepared(tmp_path / "unbroken", digits, several(2))
    assert broken.sha256 == unbroken.sha256
    assert torch.equal(broken.soft.logits, unbroken.soft.logits)


def test_a_cache_of_an_ensemble_with_another_member_is_noticed(tmp_path, digits) -> None:
    here, _ = prepared(tmp_path / "here", digits, several(2))
    other, _ = prepared(tmp_path / "other", digits, several(2, seed=TEACHER.seed + 1))
    other.cache.replace(here.cache)
    with pytest.raises(TeacherError, match="disagrees with the live teacher"):
        prepared(tmp_path / "here", digits, several(2))


def test_an_ensembles_own_file_gives_it_again(tmp_path, digits) -> None:
    trained, _ = prepared(tmp_path / "a", digits, several(2))
    given, events = prepared(tmp_path / "b", digits, several(2, weights=str(trained.weights)))
    assert epochs(events) == 0
    assert (given.sha256, given.logits_sha256) == (trained.sha256, trained.logits_sha256)
    assert {name.split(".")[1] for name in load_file(trained.weights)} == {"0", "1"}


@pytest.mark.parametrize(("held", "wanted"), [(1, 2), (2, 1), (2, 3)])
def test_a_checkpoint_of_more_or_fewer_members_is_said(tmp_path, held: int, wanted: int) -> None:
    def made(members: int) -> nn.Module:
        return network() if members == 1 else Ensemble([network() for _ in range(members)])

    save_file(made(held).state_dict(), tmp_path / "t.safetensors")
    says = (
        f"holds the weights of {held} networks?, teacher.members is {wanted}; .* set members to"
        f" {held}"
    )
    with pytest.raises(TeacherError, match=says):
        read_weights(tmp_path / "t.safetensors", made(wanted))


# --- stopped early ---

LONG = TEACHER.model_copy(update={"epochs": 4, "seed": 3})


def after_each_epoch(digits) -> list[str]:
    """SHA-256 of the weights after each epoch of the full training."""
    recipe = LONG.model_copy(update={"keep": "last"})
    lane = Lane(recipe, recipe, Distillation(alpha=0.0))
    reports = train([lane], digits, DATA, how=choose([lane], digits.train))
    return [weights_hash(report.weights) for (report,) in reports]


def test_the_weights_of_an_epoch_are_those_of_the_full_training_then(tmp_path, digits) -> None:
    expected = after_each_epoch(digits)
    for epoch in (1, 3, 4):
        teacher, events = prepared(tmp_path, digits, LONG.model_copy(update={"epoch": epoch}))
        assert teacher.sha256 == expected[epoch - 1]
        assert [(e.epoch, e.epochs) for e in events if isinstance(e, EpochReport)] == [
            (n, epoch) for n in range(1, epoch + 1)
        ]
        assert len(teacher.history) == epoch


def test_a_teacher_stopped_early_and_broken_off_before_its_weights_are_written_trains_no_further(
    tmp_path, digits, monkeypatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    early = LONG.model_copy(update={"epoch": 2})
    with monkeypatch.context() as patched:
        patched.setattr(module_under_test, "_write", full)
        with pytest.raises(OSError, match="disk full"):
            prepared(tmp_path, digits, early)
    teacher, events = prepared(tmp_path, digits, early)
    assert epochs(events) == 0
    assert teacher.sha256 == after_each_epoch(digits)[1]


def test_an_epoch_that_max_steps_never_reaches_is_said(tmp_path, digits) -> None:
    with pytest.raises(
        TeacherError,
        match=r"teacher.epoch: 2 is never reached, max_steps ends the training in epoch 1",
    ):
        prepared(tmp_path, digits, LONG.model_copy(update={"epoch": 2, "max_steps": 3}))


def test_a_resnet_with_a_small_stem_teaches_from_grey_images(tmp_path, digits) -> None:
    grey = Teacher(architecture="resnet18", stem="small", epochs=1, max_steps=2, batch_size=16)
    some = torch.arange(32)
    few = Splits(digits.train.take(some), digits.validation.take(some))
    teacher, _ = prepared(tmp_path, few, grey)
    assert teacher.parameters == 11_172_810


def test_what_is_erased_of_an_image_its_teacher_does_not_see_either(tmp_path, digits) -> None:
    """A row for each epoch, also where there are fewer views: rectangles are drawn anew in each."""
    training = Training(epochs=12, seed=5, random_erasing=0.6)
    cached, _ = prepared(tmp_path, digits, training=training)
    assert cached.soft.per == "epoch"
    assert len(cached.soft.logits) == 12 > len(views(DATA.augment))
    module, samples = build(TEACHER, digits.train), len(digits.train)
    module.load_state_dict(load_file(cached.weights))
    chosen = views(DATA.augment)[draw(5, 3, samples, 9)[1]]
    erased = draw_erased(training, 3, samples, digits.train.image_size)
    assert 0.5 < (erased[:, 1] > erased[:, 0]).double().mean() < 0.7
    live = logits_of(module, digits.train, chosen, erased)
    assert torch.allclose(cached.soft.logits[2].float(), live, rtol=4e-3, atol=2e-2)
    whole = logits_of(module, digits.train, chosen)
    assert not torch.allclose(whole, live, rtol=4e-3, atol=2e-2)
    other, _ = prepared(tmp_path, digits, training=Training(epochs=12, seed=5, random_erasing=0.5))
    assert other.logits_sha256 != cached.logits_sha256


def test_each_fold_has_a_teacher_of_its_own_unless_it_is_shared(tmp_path, digits) -> None:
    alone = TEACHER.model_copy(update={"per_fold": True})
    usual, _ = prepared(tmp_path, digits, teacher=alone)
    other, events = prepared(tmp_path, digits.cut_by(fold(3)), teacher=alone, data=fold(3))
    assert epochs(events) == TEACHER.epochs
    assert other.sha256 != usual.sha256
    module = build(alone, digits.train)
    module.load_state_dict(read_weights(other.weights, module))
    held_out = evaluate(module, digits.cut_by(fold(3)).validation)
    assert (other.val_correct, other.val_samples) == (held_out.correct, held_out.samples)


BEGUN = {
    "optimizer": "sgd",
    "learning_rate": 1e-9,
    "weight_decay": 0.0,
    "epochs": 1,
    "max_steps": 1,
}
"""A training that leaves its weights where they begin."""


def test_a_training_begins_from_a_checkpoint_and_its_content_counts_not_its_place(
    tmp_path, digits
) -> None:
    first, _ = prepared(tmp_path, digits)
    save_file(load_file(first.weights), tmp_path / "elsewhere.safetensors")
    begun = TEACHER.model_copy(update={**BEGUN, "start": str(first.weights)})
    tuned, events = prepared(tmp_path, digits, begun)
    assert [type(e) for e in events[:2]] == [WeightsRead, EpochReport]
    assert events[0].said == str(first.weights)
    assert tuned.start_sha256 == first.sha256
    assert tuned.sha256 != first.sha256  # BatchNorm's statistics moved by one batch
    state, start = load_file(tuned.weights), load_file(first.weights)
    for name, _ in build(TEACHER, digits.train).named_parameters():
        assert torch.allclose(state[name], start[name], atol=1e-6)
    moved = begun.model_copy(update={"start": str(tmp_path / "elsewhere.safetensors")})
    again, events = prepared(tmp_path, digits, moved)
    assert events == []
    assert again.sha256 == tuned.sha256
    other = {name: tensor * 1.5 for name, tensor in load_file(first.weights).items()}
    save_file(other, tmp_path / "elsewhere.safetensors")
    _, events = prepared(tmp_path, digits, moved)
    assert any(isinstance(event, EpochReport) for event in events)


def test_a_head_for_other_classes_is_drawn_from_the_seed_and_named(tmp_path, digits) -> None:
    first, _ = prepared(tmp_path, digits)
    state = {n: t for n, t in load_file(first.weights).items() if t.ndim}  # as before PyTorch 0.4.1
    head = sorted(name for name in state if len(state[name]) == 10)
    file = tmp_path / "of7.safetensors"
    save_file(state | {name: state[name][:7].clone() for name in head}, file)
    begun = TEACHER.model_copy(update={**BEGUN, "start": str(file)})
    tuned, events = prepared(tmp_path, digits, begun)
    assert events[0].said == f"{file}; drawn anew: {', '.join(head)}"
    drawn, found = fresh(lane_of(begun), digits.train).state_dict(), load_file(tuned.weights)
    for name, _ in build(TEACHER, digits.train).named_parameters():
        origin = drawn if name in head else state
        assert torch.allclose(found[name], origin[name], atol=1e-6)
    assert missing(begun, DATA, digits, tmp_path).trainings == 0


def test_what_no_training_can_begin_from_is_said(tmp_path, digits) -> None:
    with pytest.raises(
        TeacherError, match=r"nowhere.pt: no such checkpoint; correct teacher.start"
    ):
        prepared(tmp_path, digits, TEACHER.model_copy(update={"start": "nowhere.pt"}))
    first, _ = prepared(tmp_path, digits)
    other = TEACHER.model_copy(update={"channels": (8, 24), "start": str(first.weights)})
    with pytest.raises(TeacherError, match=r"wrong shape: .*\(16, 8, 3, 3\).*\(24, 8, 3, 3\)"):
        prepared(tmp_path, digits, other)
    with pytest.raises(ValueError, match="weights are used as they are, start is trained further"):
        Teacher(weights="a.pt", start="b.pt")


def test_each_member_of_an_ensemble_begins_from_the_same_checkpoint(tmp_path, digits) -> None:
    first, _ = prepared(tmp_path, digits)
    both = TEACHER.model_copy(update={"start": str(first.weights), "epochs": 1, "members": 2})
    teacher, events = prepared(tmp_path, digits, both)
    assert sum(isinstance(event, EpochReport) for event in events) == 2
    assert teacher.val_accuracy > first.val_accuracy, (teacher.val_accuracy, first.val_accuracy)
    alone, events = prepared(tmp_path, digits, both.model_copy(update={"members": 1}))
    assert not any(isinstance(event, EpochReport) for event in events)
    assert alone.start_sha256 == first.sha256
