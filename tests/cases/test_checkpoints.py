"""Checkpoints as they lie around: whatever the script that saved them, the one dict of tensors that
fits is found and named.
"""

from __future__ import annotations

import argparse
import enum
import os
import pathlib
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cases.conftest import Case, one_line
from kdexp.config import load
from kdexp.distill.datasets import load_splits
from kdexp.distill.models import build, weights_hash
from kdexp.distill.weights import TeacherError, find_weights

State = dict[str, Tensor]


def network(seed: int = 0, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, classes)
    )


def pre(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


OTHER = {"0.weight": torch.ones(2, 1, 3, 3), "1.running_mean": torch.ones(2)}
ADAM = {
    "state": {0: {"exp_avg": torch.zeros(2, 1, 3, 3), "step": torch.tensor(3.0)}},
    "param_groups": [{"lr": 0.1}],
}


class Attributes(dict):
    """A dict of a class of its own, as Lightning's hyper_parameters are."""


class Buffer:
    """An object of a library that is not here, as MMEngine's HistoryBuffer."""

    def __init__(self) -> None:
        self.values = [1, 2]


class Colour(enum.Enum):
    RED = 1


FORMS: dict[str, tuple[Callable[[State], object], str]] = {
    "pytorch-cifar's": (lambda s: {"net": s, "acc": 93.1, "epoch": 7}, "key 'net'"),
    "its DataParallel": (lambda s: {"net": pre("module.", s), "acc": 93.1}, "key 'net', prefix 'module.'"),
    "network": (lambda s: {"network": s}, "key 'network'"),
    "state": (lambda s: {"state": s}, "key 'state'"),
    "params": (lambda s: {"params": s}, "key 'params'"),
    "teacher": (lambda s: {"teacher": s}, "key 'teacher'"),
    "a word nobody uses": (lambda s: {"gewichte": s}, "key 'gewichte'"),
    "nested twice": (lambda s: {"checkpoint": {"net": s}, "epoch": 1}, "key 'checkpoint.net'"),
    "a list": (lambda s: [s], "key '0'"),
    "in a tuple with the optimizer": (lambda s: (3, s, ADAM), "key '1'"),
    "with an optimizer": (lambda s: {"model": s, "optimizer": ADAM}, "key 'model'"),
    "torchvision's references": (lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, path=Path("x"))}, "key 'model'"),
    "Lightning's": (
        lambda s: {"state_dict": pre("model.", s), "hyper_parameters": Attributes(lr=0.1), "loops": {}},
        "key 'state_dict', prefix 'model.'",
    ),
    "a weighted loss": (
        lambda s: {"state_dict": pre("model.", s) | {"criterion.weight": torch.ones(10)}},
        "prefix 'model.'; left out: criterion.weight",
    ),
    "metrics": (
        lambda s: {"state_dict": pre("net.", s) | {"val_acc.tp": torch.zeros(1), "val_acc.fp": torch.zeros(1)}},
        "prefix 'net.'; left out: val_acc.fp, val_acc.tp",
    ),
    "a loss beside layers without a prefix": (lambda s: s | {"loss_fn.weight": torch.ones(10)}, "left out: loss_fn.weight"),
    "compiled": (lambda s: pre("_orig_mod.", s), "prefix '_orig_mod.'"),
    "DDP of a compiled one": (lambda s: pre("module._orig_mod.", s), "prefix 'module._orig_mod.'"),
    "compiled DDP in Lightning": (
        lambda s: {"state_dict": pre("model._orig_mod.module.", s)},
        "prefix 'model._orig_mod.module.'",
    ),
    "a part compiled": (lambda s: {n.replace("0.", "0._orig_mod.", 1) if n[0] == "0" else n: t for n, t in s.items()}, ""),
    "student and teacher in one dict": (
        lambda s: pre("student.", {n: t + 1 for n, t in s.items()}) | pre("teacher.", s),
        "prefix 'teacher.'",
    ),
    "AveragedModel": (lambda s: {"n_averaged": torch.tensor(3)} | pre("module.", s), "prefix 'module.'; left out: n_averaged"),
    "before PyTorch 0.4.1": (lambda s: {n: t for n, t in s.items() if "num_batches" not in n}, ""),
    "half": (lambda s: {n: t.half() if t.is_floating_point() else t for n, t in s.items()}, ""),
    "bf16": (lambda s: {n: t.bfloat16() if t.is_floating_point() else t for n, t in s.items()}, ""),
    "double": (lambda s: {n: t.double() if t.is_floating_point() else t for n, t in s.items()}, ""),
    "parameters": (lambda s: {n: nn.Parameter(t) if t.is_floating_point() else t for n, t in s.items()}, ""),
    "a name beside": (lambda s: {"model_state_dict": s, "model": "resnet18"}, "key 'model_state_dict'"),
    "a name before": (lambda s: {"model": "resnet18", "net": s}, "key 'net'"),
    "the ImageNet example's": (lambda s: {"state_dict": s, "best_acc1": torch.tensor(93.1), "arch": "x"}, "key 'state_dict'"),
    "an OrderedDict in a defaultdict": (lambda s: defaultdict(dict, {"net": OrderedDict(s)}), "key 'net'"),
    "another library's object": (lambda s: {"state_dict": s, "message_hub": {"loss": Buffer()}}, "key 'state_dict'"),
    "the same twice": (lambda s: {"model": s, "model_ema": s}, "key 'model'"),
    "an EMA that differs": (
        lambda s: {"model_ema": {n: t + 1 for n, t in s.items()}, "model": s},
        "key 'model'; not taken: key 'model_ema', which fits too and differs",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FORMS)
def test_the_dict_that_fits_is_found_and_named(tmp_path: Path, name: str) -> None:
    form, says = FORMS[name]
    state = network().state_dict()
    torch.save(form(state), tmp_path / "t.pt")
    module = network(1)
    found = find_weights(tmp_path / "t.pt", module)
    module.load_state_dict(found.state)
    assert all(
        torch.allclose(tensor, state[n].to(tensor.dtype), atol=0.01)
        for n, tensor in module.state_dict().items()
    )
    if name not in ("half", "bf16"):
        assert weights_hash(module.state_dict()) == weights_hash(state)
    assert found.said.startswith(f"{tmp_path / 't.pt'}")
    assert says in found.said


@pytest.mark.parametrize(
    "name", ["t.bin", "t.pth.tar", "t.ckpt", "no-ending", "t.safetensors", "t.pt"]
)
@pytest.mark.parametrize("how", ["torch", "safetensors", "torch of old"])
def test_a_file_is_read_by_its_content_whatever_its_name(
    tmp_path: Path, name: str, how: str
) -> None:
    state, path = network().state_dict(), tmp_path / name
    if how == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "torch")
    assert weights_hash(find_weights(path, network(1)).state) == weights_hash(state)


def test_two_that_fit_and_differ_are_both_named(tmp_path: Path) -> None:
    torch.save(
        {"first": network(1).state_dict(), "second": network(2).state_dict()}, tmp_path / "t.pt"
    )
    with pytest.raises(
        TeacherError, match=r"several networks that fit and differ \(key 'first'; key 'second'\)"
    ):
        find_weights(tmp_path / "t.pt", network())


def test_of_what_does_not_fit_every_shape_is_said(tmp_path: Path) -> None:
    torch.save(
        {"net": pre("module.", network(classes=100).state_dict()), "acc": 1.0}, tmp_path / "t.pt"
    )
    with pytest.raises(TeacherError) as error:
        find_weights(tmp_path / "t.pt", network())
    for part in (
        "key 'net', prefix 'module.'",
        "3.weight is (100, 72)",
        "needs (10, 72)",
        "3.bias is (100,)",
    ):
        assert part in str(error.value)


def test_a_network_with_more_layers_is_another_one(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": pre("model.", network().state_dict() | {"4.weight": torch.ones(3)})},
        tmp_path / "t.pt",
    )
    with pytest.raises(TeacherError, match="has 4.weight, which the network has not"):
        find_weights(tmp_path / "t.pt", network())


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


class Popen:
    def __reduce__(self):
        return __import__("subprocess").Popen, (["touch", "exploded"],)


class Read:
    def __reduce__(self):
        return eval, ("open('exploded', 'w')",)


@pytest.mark.parametrize("kind", [Bomb, Popen, Read])
@pytest.mark.parametrize("forced", ["0", "1"])
def test_code_in_a_checkpoint_is_never_run(
    tmp_path: Path, monkeypatch, kind: type, forced: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    for new in (True, False):
        torch.save(
            {"net": network().state_dict(), "x": kind()}, "t.pt", _use_new_zipfile_serialization=new
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(TeacherError, match="never runs code"):
                find_weights(tmp_path / "t.pt", network())
    assert not (tmp_path / "exploded").exists()


def test_what_harmless_objects_hold_is_skipped(tmp_path: Path) -> None:
    import datetime

    import numpy as np

    beside = {
        "when": datetime.datetime(2026, 1, 1),
        "where": pathlib.PurePosixPath("x"),
        "acc": np.float64(0.9),
        "a": np.ones(3),
    }
    torch.save({"net": network().state_dict(), **beside}, tmp_path / "t.pt")
    assert "key 'net'" in find_weights(tmp_path / "t.pt", network()).said


@pytest.mark.parametrize("key", [None, "model"])
def test_a_whole_pickled_network_is_refused_in_words(tmp_path: Path, key: str | None) -> None:
    torch.save({key: network()} if key else network(), tmp_path / "t.pt")
    with pytest.raises(TeacherError, match="state_dict"):
        find_weights(tmp_path / "t.pt", network())


def test_a_torchscript_archive_is_refused_in_words(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network().eval()), tmp_path / "t.pt")
    with pytest.raises(TeacherError, match="TorchScript"):
        find_weights(tmp_path / "t.pt", network())


def test_the_key_that_was_taken_is_printed_and_what_does_not_fit_is_one_line(case: Case) -> None:
    sweep = load(case.folder / "tiny.yaml")
    state = build(sweep.teacher, load_splits(sweep.data).train).state_dict()
    torch.save({"net": pre("module.", state), "acc": 93.1, "epoch": 7}, case.folder / "net.pth")
    done = case.kd("teacher", "tiny.yaml", "--set", "teacher.weights=net.pth")
    assert done.returncode == 0, done.stderr
    assert "weights   net.pth; key 'net', prefix 'module.'" in done.stdout
    wrong = case.kd(
        "teacher", "tiny.yaml", "--set", "teacher.weights=net.pth", "--set", "teacher.hidden=17"
    )
    one_line(wrong, "net.pth", "key 'net'", "(16, ", "needs (17, ")
