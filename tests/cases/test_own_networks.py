"""Networks people bring: one that works alone works here; what cannot be trained is one line at the
start, with their line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cases.conftest import Case, one_line
from kdexp.config import Data, Distillation, Network, Recipe, Student, Teacher, Training
from kdexp.distill.datasets import Split, Splits
from kdexp.distill.execution import choose
from kdexp.distill.guard import check_network
from kdexp.distill.models import ModelError, build, layout_of, measure, weights_hash
from kdexp.distill.packs import Lane
from kdexp.distill.train import train
from kdexp.environment import record

VIEW = """
import torch.nn.functional as F
from torch import nn


class Small(nn.Module):
    def __init__(self, channels, image_size, classes, width):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.out = nn.Linear(width * (image_size[0] // 2) * (image_size[1] // 2), classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.out(x.view(x.size(0), -1))


small = Small
"""
NETS = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm as new_weight_norm


def features(channels, image_size):
    return channels * image_size[0] * image_size[1]


def mlp(first, width, classes):
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(width, classes))


def old_weight_norm(channels, image_size, classes, width):
    return mlp(weight_norm(nn.Linear(features(channels, image_size), width)), width, classes)


def weightnorm(channels, image_size, classes, width):
    return mlp(new_weight_norm(nn.Linear(features(channels, image_size), width)), width, classes)


def spectral(channels, image_size, classes, width):
    return mlp(spectral_norm(nn.Linear(features(channels, image_size), width)), width, classes)


def lazy(channels, image_size, classes, width):
    return nn.Sequential(nn.LazyConv2d(width, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes))


def plain(channels, image_size, classes, width):
    return mlp(nn.Linear(features(channels, image_size), width), width, classes)


def frozen(channels, image_size, classes, width):
    net = plain(channels, image_size, classes, width)
    net[1].requires_grad_(False)
    return net


class Net(nn.Module):
    def __init__(self, channels, image_size, classes, width):
        super().__init__()
        self.classes, self.out = classes, nn.Linear(features(channels, image_size), classes)

    def forward(self, x):
        return self.out(x.flatten(1))


class Buffers(Net):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register_buffer("mask", torch.ones(self.out.in_features, dtype=torch.bool))
        self.register_buffer("hidden", torch.ones(1), persistent=False)
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("none", None)
        self.register_buffer("wide", torch.ones(2, dtype=torch.float64))
        self.scale, self.unused = nn.Parameter(torch.tensor(1.0)), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(x.flatten(1) * self.mask * self.hidden) * self.scale


class Tied(Net):
    def __init__(self, channels, image_size, classes, width):
        super().__init__(channels, image_size, classes, width)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(self.b(F.relu(self.a(x.flatten(1)))))


class Transposed(Net):
    def forward(self, x):
        return self.out(x.permute(0, 2, 3, 1).reshape(x.shape[0], -1))


class Nothing(Net):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        del self.out

    def forward(self, x):
        return x.flatten(1)[:, : self.classes]


class AllFrozen(Net):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.requires_grad_(False)


class Tuple(Net):
    def forward(self, x):
        return super().forward(x), x


class TupleInTraining(Net):
    def forward(self, x):
        return (super().forward(x), x) if self.training else super().forward(x)


class Dict(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


class TooMany(Net):
    def forward(self, x):
        return torch.cat([super().forward(x)] * 2, 1)


class Images(Net):
    def forward(self, x):
        return x


class NaN(Net):
    def forward(self, x):
        return super().forward(x) / 0.0


class Raises(Net):
    def forward(self, x):
        if self.training:
            raise RuntimeError("it does not like training")
        return super().forward(x)


class Detached(Net):
    def forward(self, x):
        return super().forward(x).detach()


class Inplace(Net):
    def forward(self, x):
        y = torch.sigmoid(self.out(x.flatten(1)))
        y += 1
        return y


class Extra(Net):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def fails(**arguments):
    raise ValueError("no such network today")
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nets.py, where kdexp is run."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "views.py").write_text(VIEW)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [
        name
        for name in sys.modules
        if name in ("nets", "views", "helpers") or name.startswith(("kdexp_own", "pack"))
    ]:
        del sys.modules[name]


def student(name: str, place: str = "nets") -> Student:
    return Student(architecture=f"{place}:{name}", options={"width": 8})


def trained(network: Network, digits: Splits) -> nn.Module:
    """A network after two steps of kdexp's training, with the weights that would be stored."""
    check_network(network, digits.train)
    lane = Lane(
        network,
        Training(batch_size=64, epochs=1, max_steps=2, learning_rate=0.01),
        Distillation(alpha=0.0),
    )
    reports = train(
        [lane], digits, Data(dataset="digits", channels=1), how=choose([lane], digits.train)
    )
    (report,) = next(iter(reports))
    module = build(network, digits.train)
    before = weights_hash(module.state_dict())
    module.load_state_dict(report.weights)
    assert weights_hash(module.state_dict()) != before
    assert measure(module, digits.train).parameters == sum(p.numel() for p in module.parameters())
    return module


WORKING = ["weightnorm", "spectral", "lazy", "plain", "frozen", "Buffers", "Tied", "Transposed"]


@pytest.mark.parametrize("name", WORKING)
def test_a_network_that_works_alone_is_trained(nets: Path, digits: Splits, name: str) -> None:
    assert layout_of(trained(student(name), digits)) == torch.channels_last, "as it always was"


def test_a_network_that_wants_images_in_the_plain_layout_gets_them(
    nets: Path, digits: Splits
) -> None:
    module = trained(student("small", "views"), digits)
    assert layout_of(module) == torch.contiguous_format
    alone = sys.modules["views"].Small(1, (8, 8), 10, 8)
    alone.load_state_dict(module.state_dict())
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(module(images.to(memory_format=torch.channels_last)), alone(images))


REFUSED = {
    "Nothing": "nothing of it can be trained",
    "AllFrozen": "nothing of it can be trained",
    "Tuple": "gives tuple for 2 images, expected logits of shape (2, 10)",
    "TupleInTraining": "gives a tuple for 8 images in training, expected logits",
    "Dict": "gives dict for 2 images",
    "TooMany": "gives (2, 20) for 2 images",
    "Images": "gives (2, 1, 8, 8) for 2 images",
    "NaN": "gives NaN or infinity",
    "Raises": "it does not like training (nets.py, line 129: raise RuntimeError(",
    "Detached": "nothing of it can be trained",
    "Inplace": "modified by an inplace operation",
    "Extra": "its state_dict holds _extra_state",
    "fails": "cannot be built for (1, 8, 8) images: no such network today (nets.py, line",
    "missing": "cannot import 'nets:missing'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_cannot_be_trained_is_one_line_before_any_training(
    nets: Path, digits: Splits, name: str
) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ModelError) as error:
        check_network(student(name), digits.train)
    assert REFUSED[name] in str(error.value)
    assert "\n" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), before), "trying it draws nothing"


def test_googlenet_is_trained_without_its_auxiliary_outputs(digits: Splits) -> None:
    like = Split(
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        digits.train.labels[:2],
        digits.train.classes,
        3,
        0.5,
        0.5,
    )
    check_network(Student(architecture="googlenet"), like)
    assert not [
        name
        for name in build(Student(architecture="googlenet"), like).state_dict()
        if name.startswith("aux")
    ]
    given = build(Teacher(architecture="googlenet", weights="x.pt"), like)
    assert [name for name in given.state_dict() if name.startswith("aux")], (
        "a checkpoint may hold them"
    )


def test_inception_is_refused_for_images_that_are_too_small_for_it(digits: Splits) -> None:
    like = Split(digits.train.images, digits.train.labels, digits.train.classes, 3, 0.5, 0.5)
    with pytest.raises(ModelError, match="inception_v3: cannot be built for"):
        check_network(Student(architecture="inception_v3"), like)


# --- where a network's file is ---

MLP = """
from torch import nn


def mlp(channels, image_size, classes, width):
    first = nn.Linear(channels * image_size[0] * image_size[1], width)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(width, classes))
"""


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("test.py", "test"),
        ("code.py", "code"),
        ("token.py", "token"),
        ("resource.py", "resource"),
        ("functorch.py", "functorch"),
        ("torch.py", "torch"),
        ("nets.py", "nets.py"),
        ("my-nets.py", "my-nets"),
        ("my-nets.py", "my-nets.py"),
        ("my nets.v2.py", "my nets.v2"),
        ("pack/nets.py", "pack.nets"),
        ("pack/nets.py", "pack/nets.py"),
        ("pack/nets.py", "pack/nets"),
        ("pack/__init__.py", "pack"),
        ("code/nets.py", "code.nets"),
        ("deep/er/nets.py", "{folder}/deep/er/nets.py"),
        ("nets.py", "~/nets.py"),
    ],
)
def test_the_users_file_is_found_and_goes_before_pythons_module_of_that_name(
    nets: Path, digits: Splits, monkeypatch, file: str, place: str
) -> None:
    import code
    import token

    monkeypatch.setenv("HOME", str(nets))
    (nets / file).parent.mkdir(parents=True, exist_ok=True)
    (nets / file).write_text(MLP)
    network = Student(architecture=f"{place.format(folder=nets)}:mlp", options={"width": 8})
    assert (
        measure(build(network, digits.train), digits.train).parameters == 64 * 8 + 8 + 8 * 10 + 10
    )
    assert "student source" in record("cpu", Recipe(student=network), 1)
    assert hasattr(code, "InteractiveConsole"), "Python's own stays whole"
    assert sys.modules["token"] is token
    assert hasattr(token, "NAME")


def test_a_file_elsewhere_may_import_what_lies_beside_it(nets: Path, digits: Splits) -> None:
    (nets / "elsewhere").mkdir()
    (nets / "elsewhere" / "helpers.py").write_text("width = 8\n")
    (nets / "elsewhere" / "code.py").write_text(f"from helpers import width as _\n{MLP}")
    check_network(Student(architecture="elsewhere/code.py:mlp", options={"width": 8}), digits.train)


def test_a_library_s_module_is_imported_as_before(nets: Path, digits: Splits) -> None:
    with pytest.raises(ModelError, match="gives"):
        build(Student(architecture="torch.nn:Identity"), digits.train)
    with pytest.raises(
        ModelError,
        match="cannot import 'no_such_place:mlp'.* looked for in the working folder and the sweep",
    ):
        build(Student(architecture="no_such_place:mlp"), digits.train)


def test_a_view_of_its_own_goes_through_a_whole_study_from_another_folder(
    case: Case, tmp_path: Path
) -> None:
    """Two workers, the sweep file and its networks in a folder of their own, the file called
    code.py.
    """
    case.network(
        VIEW,
        '{architecture: "code:small", options: {width: 8}}',
        "student.options.width: {low: 4, high: 16}",
    )
    (tmp_path / "there").mkdir()
    for old, new in (("tiny.yaml", "there/tiny.yaml"), ("nets.py", "there/code.py")):
        (tmp_path / old).rename(tmp_path / new)
    done = case.alone("sweep", "there/tiny.yaml", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "Selected: trial" in done.stdout
    assert "not registered" not in done.stdout


def test_a_network_that_fails_in_training_is_said_before_the_teacher_is_trained(
    case: Case, tmp_path: Path
) -> None:
    case.network(NETS, '{architecture: "nets:Raises", options: {width: 8}}')
    line = one_line(
        case.kd("sweep", "tiny.yaml"),
        "nets:Raises: fails in training: it does not like training (nets.py, line",
    )
    assert "correct it and start again" in line
    assert not list((tmp_path / "mlruns").glob("teachers/*/weights.safetensors"))


def test_a_failure_that_all_trials_share_ends_the_study_at_its_first_and_costs_no_retry(
    case: Case, tmp_path: Path
) -> None:
    breaks = VIEW.replace(
        "        x = F",
        "        assert not self.training or len(x) != 64, 'no batch of 64'\n        x = F",
    )
    case.network(breaks, '{architecture: "nets:small", options: {width: 8}}')
    for _ in range(2):
        done = case.kd("sweep", "tiny.yaml")
        one_line(
            done,
            "Every trial would fail as this one: AssertionError: no batch of 64 (nets.py, line 13:",
            "same command",
        )
        assert "failed:" not in done.stdout
    (tmp_path / "nets.py").write_text(VIEW)
    again = case.alone("sweep", "tiny.yaml")  # a process that has not read the file yet
    assert again.returncode == 0, again.stderr
    assert "Selected: trial" in again.stdout
    assert "given up" not in again.stdout
