"""Networks of one's own as people write them: what is recorded is what the network itself does with
the stored weights.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sqlite3
import sys
import textwrap
from collections.abc import Iterator

import pytest
from safetensors.torch import load_file

from cases.conftest import Case, one_line
from kdexp.config import load
from kdexp.distill.datasets import load_splits
from kdexp.distill.evaluate import evaluate

HEAD = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm


def flat(channels, image_size):
    return channels * image_size[0] * image_size[1]


def mlp(channels, image_size, classes, width, first=lambda layer: layer, relu=nn.ReLU):
    return nn.Sequential(
        nn.Flatten(), first(nn.Linear(flat(channels, image_size), width)), relu(), nn.Linear(width, width), relu(),
        nn.Linear(width, classes),
    )
"""
NETS = {
    "one_relu": (
        """
    act = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), act, nn.Conv2d(width, width, 3, padding=1), act,
        nn.Flatten(), nn.Linear(width * image_size[0] * image_size[1], 16), act, nn.Linear(16, classes),
    )
"""
    ),
    "each_relu": (
        """
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(width * image_size[0] * image_size[1], 16), nn.ReLU(), nn.Linear(16, classes),
    )
"""
    ),
    "block_twice": (
        """
    block = nn.Sequential(nn.Linear(width, width), nn.ReLU())
    first = nn.Linear(flat(channels, image_size), width)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), block, block, block, nn.Linear(width, classes))
"""
    ),
    "tied": (
        """
    net = mlp(channels, image_size, classes, width)
    net[3] = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    net[3][2].weight = net[3][0].weight
    return net
"""
    ),
    "one_pool": (
        """
    half = nn.AvgPool2d(2)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), half, nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), half,
        nn.Flatten(), nn.Linear(width * (image_size[0] // 4) * (image_size[1] // 4), classes),
    )
"""
    ),
    "one_dropout": (
        """
    drop = nn.Dropout(0.5)
    first = nn.Linear(flat(channels, image_size), width)
    return nn.Sequential(nn.Flatten(), drop, first, nn.ReLU(), drop, nn.Linear(width, classes))
"""
    ),
    "old_weight_norm": "    return mlp(channels, image_size, classes, width, weight_norm)\n",
    "old_spectral_norm": "    return mlp(channels, image_size, classes, width, spectral_norm)\n",
    "new_spectral_norm": (
        "    return mlp(channels, image_size, classes, width, parametrizations.spectral_norm)\n"
    ),
    "pruned": (
        "    return mlp(channels, image_size, classes, width, lambda l:"
        " prune.random_unstructured(l, 'weight', 0.5))\n"
    ),
    "hooked": (
        """
    def clamp(layer):
        layer.register_forward_hook(lambda _, __, out: out.clamp(-0.5, 0.5))
        return layer
    return mlp(channels, image_size, classes, width, clamp)
"""
    ),
    "frozen": (
        """
    net = mlp(channels, image_size, classes, width)
    net[1].weight.requires_grad_(False)
    return net
"""
    ),
    "ceiled": (
        """
    return nn.Sequential(
        nn.Conv2d(channels, width, 2), nn.AvgPool2d(2, ceil_mode=True), nn.ReLU(), nn.AvgPool2d(2, divisor_override=1),
        nn.Flatten(), nn.Linear(4 * width, classes),
    )
"""
    ),
}
WRONG = {
    "nothing": (
        """
    class Nothing(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :classes]
    return Nothing()
""",
        "nothing of it can be trained",
    ),
    "all_frozen": (
        "    return mlp(channels, image_size, classes, width).requires_grad_(False)\n",
        "unfreeze a layer",
    ),
    "always_drops": (
        """
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(channels, image_size, classes, width)
        def forward(self, x):
            return self.net(F.dropout(x, 0.5))
    return Drops()
""",
        "each time that it is evaluated",
    ),
    "forgets": (
        """
    class Projects(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("random", torch.randn(flat(channels, image_size), width), persistent=False)
            self.out = nn.Linear(width, classes)
        def forward(self, x):
            return self.out(torch.relu(x.flatten(1) @ self.random))
    return Projects()
""",
        "persistent buffers",
    ),
}
EXPORTED = ("one_relu", "hooked")
HEADER = "\n\ndef {name}(channels, image_size, classes, width):"


@pytest.fixture
def own(case: Case) -> Iterator[Case]:
    """A folder with all of these networks in nets.py."""
    bodies = {**NETS, **{name: body for name, (body, _) in WRONG.items()}}
    source = HEAD + "".join(
        f"{HEADER.format(name=name)}\n{body.strip(chr(10))}\n" for name, body in bodies.items()
    )
    case.network(source, '{architecture: "nets:each_relu", options: {width: 8}}')
    sys.modules.pop("nets", None)
    yield case
    sys.modules.pop("nets", None)


def trained(case: Case, net: str, *more: str) -> tuple[str, float]:
    """Run ID and printed validation accuracy of `kdexp train` with this network."""
    architecture = f"student.architecture=nets:{net}"
    done = case.kd("train", "tiny.yaml", "--set", architecture, "--set", "training.epochs=3", *more)
    assert done.returncode == 0, done.stderr
    return re.search(r"^Run ID: *(\w+)", done.stdout, re.M)[1], float(
        re.search(r"val accuracy +([\d.]+) ?%", done.stdout)[1]
    )


@pytest.mark.parametrize(
    "nets", [list(NETS)[:6], list(NETS)[6:]], ids=["27 and 56: shared", "25 and 29: changed"]
)
def test_the_recorded_accuracy_is_that_of_the_network_itself_and_of_the_exported_file(
    own, nets
) -> None:
    for net in nets:
        run, accuracy = trained(own, net)
        module = getattr(importlib.import_module("nets"), net)(1, (8, 8), 10, 8)
        (file,) = own.folder.glob(f"mlruns/artifacts/*/{run}/artifacts/weights.safetensors")
        module.load_state_dict(load_file(file))
        alone = evaluate(
            module, load_splits(load(own.folder / "tiny.yaml").data).validation
        ).accuracy
        assert 100 * alone == pytest.approx(accuracy, abs=0.005), net
        if net in EXPORTED:  # which takes seconds
            done = own.kd("export", run)
            assert done.returncode == 0, done.stderr
            assert float(re.search(r"val accuracy +([\d.]+) ?%", done.stdout)[1]) == pytest.approx(
                accuracy, abs=0.3
            ), net


@pytest.mark.parametrize("net", sorted(WRONG))
def test_what_cannot_be_trained_or_stored_is_said_in_one_line_before_the_teacher_is_trained(
    own, net
) -> None:
    done = own.kd("train", "tiny.yaml", "--set", f"student.architecture=nets:{net}")
    one_line(done, f"nets:{net}", WRONG[net][1])
    assert not list(own.folder.glob("mlruns/teachers/*/*.safetensors"))


def test_a_whole_sweep_of_a_network_with_one_relu_selects_what_test_confirms(own) -> None:
    """81.9 % on validation and 17.0 % on test, once."""
    done = own.kd(
        "sweep",
        "tiny.yaml",
        "--set",
        "student.architecture=nets:one_relu",
        "--set",
        "training.epochs=5",
    )
    assert done.returncode == 0, done.stderr
    accuracies = [
        float(found) for found in re.findall(r"(?:val|test) accuracy +([\d.]+) ?%", done.stdout)
    ]
    assert len(accuracies) >= 2, done.stdout
    assert max(accuracies) - min(accuracies) < 15, done.stdout


@pytest.mark.parametrize(
    "how",
    [
        "distillation.loss=standardized",
        'search={"distillation.loss": {"choices": ["kl", "standardized"]}}',
    ],
)
def test_a_loss_that_can_teach_nothing_of_two_classes_is_refused_before_the_teacher_is_trained(
    case, how
) -> None:
    shutil.rmtree(case.pictures() / "digit 7")
    case.own()
    done = case.kd("sweep", "own.yaml", "--set", "study.objective=accuracy", "--set", how)
    one_line(
        done,
        "standardized teaches nothing of 2 classes (digit 0, digit 1)",
        "allowed here: kl, decoupled, correlation",
    )
    assert not list(case.folder.glob("mlruns/teachers/*/*.safetensors"))


def test_a_network_that_learns_outside_of_its_weights_ends_without_a_result(case) -> None:
    source = """
        from torch import nn


        class Remembers(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
                self.seen = 0

            def forward(self, x):
                self.seen += self.training
                return self.net(x) if self.seen < 2 else self.net(x).roll(1, -1)


        def net(channels, image_size, classes, width):
            return Remembers(width)
    """
    sys.modules.pop("nets", None)
    case.network(textwrap.dedent(source), '{architecture: "nets:net", options: {width: 16}}')
    line = one_line(
        case.kd("train", "tiny.yaml", "--set", "training.epochs=5"),
        "what was trained is not the network itself",
    )
    assert len(re.findall(r"\d+\.\d\d%", line)) == 2
    sys.modules.pop("nets", None)
    with sqlite3.connect(case.folder / "mlruns" / "mlflow.db") as database:
        query = (
            "select status, run_uuid from runs join tags using (run_uuid) where tags.key ="
            " 'kdexp.kind' and value = 'train'"
        )
        ((status, run),) = database.execute(query)
        recorded = database.execute(
            "select key from metrics where run_uuid = ? and key = 'val_accuracy'", (run,)
        ).fetchall()
    assert (status, recorded) == ("FAILED", [])
