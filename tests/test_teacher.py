"""The teacher: trained once, read from any honest checkpoint, cached, and never silently another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kdexp.config import Augment, Data, Teacher
from kdexp.distill import teacher as module_under_test
from kdexp.distill.data import pixels, views
from kdexp.distill.models import build, weights_hash
from kdexp.distill.teacher import CacheProgress, TeacherError, prepare_teacher, read_weights, write_atomically
from kdexp.distill.train import EpochReport

DATA = Data(dataset="digits", channels=1, validation_fraction=0.2, augment=Augment(flip=False, shift=1))
TEACHER = Teacher(architecture="cnn", channels=(8, 16), hidden=16, epochs=2, learning_rate=0.01)


def prepared(folder: Path, digits, teacher: Teacher = TEACHER, data: Data = DATA, weights: Path | None = None):
    events, steps = [], prepare_teacher(teacher, data, digits, folder, weights)
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
    content["logits"] = content["logits"].flip(1).contiguous()
    cache.unlink()
    save_file(content, cache, metadata=facts)
    with pytest.raises(TeacherError, match="disagrees with the live teacher"):
        prepared(tmp_path, digits)


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
        (lambda s: s | {"0.weight": torch.zeros(3, 1, 3, 3)}, "wrong shape: 0.weight is (3, 1, 3, 3)"),
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
    wild = TEACHER.model_copy(update={"optimizer": "sgd", "learning_rate": 1e30, "schedule": "constant"})
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
        prepared(tmp_path / "b", digits, TEACHER.model_copy(update={"weights": str(tmp_path / "loud.safetensors")}))
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
