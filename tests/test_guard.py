"""What is trained is the module that is stored: only the provably plain is stacked, and all else is
noticed.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from kdexp.config import Augment, Data, Distillation, Network, Student, Teacher, Training
from kdexp.distill.batches import pixels
from kdexp.distill.compact import as_stored, compact
from kdexp.distill.datasets import Splits
from kdexp.distill.guard import check_network, check_plan, stored_correct
from kdexp.distill.models import ModelError, Residual, measure, outline
from kdexp.distill.packs import Drawn, Execution, Lane, Source, pack_of
from kdexp.distill.stacked import plan_of
from kdexp.distill.teacher import prepare_teacher
from kdexp.distill.train import train

DATA = Data(dataset="digits", channels=1, augment=Augment(flip=False, shift=0))
SHAPE = (1, 8, 8)


def plain() -> nn.Sequential:
    """Every kind of layer that can be stacked."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        Residual(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU()), nn.Identity()
        ),
        nn.Sequential(nn.Dropout(0.0), nn.AdaptiveAvgPool2d(1)),
        nn.Flatten(),
        nn.Linear(4, 4),
        nn.ReLU(),
        nn.Linear(4, 10),
    )


class Loud(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class Own(nn.Parameter):
    """A tensor of another kind, that may mean anything."""


def set_to(module: nn.Module, place: str, layer: nn.Module) -> None:
    module.register_module(place, layer)


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a forward hook": lambda m: m[7].register_forward_hook(lambda _, __, out: 2 * out),
    "a hook on the whole": lambda m: m.register_forward_hook(lambda _, __, out: 2 * out),
    "a hook that is told of keywords": (
        lambda m: m[2].register_forward_hook(lambda _, __, ___, out: out + 1, with_kwargs=True)
    ),
    "a hook before": lambda m: m[8].register_forward_pre_hook(lambda _, x: (x[0] + 1,)),
    "a hook on what does nothing": (
        lambda m: m[4].shortcut.register_forward_hook(lambda _, __, out: 2 * out)
    ),
    "a hook in backward": lambda m: m[9].register_full_backward_hook(lambda _, g, __: (2 * g[0],)),
    "a hook before backward": (
        lambda m: m[9].register_full_backward_pre_hook(lambda _, g: (2 * g[0],))
    ),
    "a hook on a parameter": lambda m: m[7].weight.register_hook(lambda gradient: 2 * gradient),
    "a hook on what a gradient becomes": (
        lambda m: m[7].weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))
    ),
    "a forward of its own": lambda m: setattr(m[2], "forward", lambda x: 2 * x),
    "a forward of the whole's own": lambda m: setattr(
        m, "forward", lambda x: 2 * nn.Sequential.forward(m, x)
    ),
    "a residual with a forward of its own": lambda m: setattr(
        m[4], "forward", lambda x: m[4].body(x)
    ),
    "a train of its own": lambda m: setattr(m[1], "train", lambda mode=True: m[1]),
    "a frozen weight": lambda m: m[7].weight.requires_grad_(False),
    "a frozen norm": lambda m: m[1].requires_grad_(False),
    "a buffer more": lambda m: m[7].register_buffer("more", torch.ones(1)),
    "an attribute more": lambda m: setattr(m[7], "scale", 2.0),
    "a parameter of the whole": lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1))),
    "weight_norm": lambda m: weight_norm(m[7]),
    "a parametrized weight": lambda m: parametrizations.weight_norm(m[7]),
    "spectral_norm": lambda m: spectral_norm(m[0]),
    "pruned": lambda m: prune.l1_unstructured(m[7], "weight", 0.5),
    "a tied weight": lambda m: setattr(
        m[9], "weight", nn.Parameter(m[7].weight.detach().repeat(3, 1)[:10])
    ),
    "a weight in another's memory": lambda m: setattr(
        m[7], "weight", nn.Parameter(m[9].weight.data[:4])
    ),
    "a tied statistic": lambda m: set_to(m, "1", tied_norms()),
    "a tensor of another kind": lambda m: setattr(m[7], "weight", Own(m[7].weight.data)),
    "in double precision": lambda m: m[7].double(),
    "a subclass of a layer": lambda m: set_to(m, "2", Loud()),
    "a subclass of Sequential": lambda m: set_to(m, "5", Twice(*m[5])),
    "a linear layer twice": lambda m: set_to(m, "9", nn.Sequential(m[7], nn.Linear(4, 10))),
    "a convolution twice": lambda m: m[4].body.append(m[4].body[0]),
    "a norm twice": lambda m: m[4].body.append(nn.Sequential(b := nn.BatchNorm2d(4), nn.ReLU(), b)),
    "a pool that rounds up": lambda m: set_to(m, "3", nn.AvgPool2d(2, ceil_mode=True)),
    "a pool that divides by one": lambda m: set_to(m, "3", nn.AvgPool2d(2, divisor_override=1)),
    "a pool with padding": lambda m: set_to(m, "3", nn.AvgPool2d(2, padding=1)),
    "a pool to two": lambda m: set_to(m, "3", nn.AdaptiveAvgPool2d((1, 2))),
    "padding by reflection": lambda m: set_to(
        m, "0", nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")
    ),
    "a dilated convolution": lambda m: set_to(m, "0", nn.Conv2d(1, 4, 3, padding=2, dilation=2)),
    "a convolution of two strides": lambda m: set_to(m, "0", nn.Conv2d(1, 4, 3, (1, 2), padding=1)),
    "a norm with another eps": lambda m: set_to(m, "1", nn.BatchNorm2d(4, eps=1e-3)),
    "a norm by a plain mean": lambda m: set_to(m, "1", nn.BatchNorm2d(4, momentum=None)),
    "a norm without statistics": lambda m: set_to(
        m, "1", nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "a norm without a bias": lambda m: set_to(m, "1", nn.BatchNorm2d(4, bias=False)),
    "a linear layer without a bias": lambda m: set_to(m, "7", nn.Linear(4, 4, bias=False)),
    "a dropout that takes all": lambda m: set_to(
        m, "5", nn.Sequential(nn.Dropout(1.0), nn.AdaptiveAvgPool2d(1))
    ),
    "a flattening that keeps an axis": lambda m: set_to(m, "6", nn.Flatten(0, 1)),
    "work in place on what is added": lambda m: set_to(m[4].body, "0", nn.ReLU(inplace=True)),
    "a sum that spreads": lambda m: set_to(m[4].body, "0", nn.Conv2d(4, 1, 1)),
}


def tied_norms() -> nn.Sequential:
    one, other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    other.running_mean = one.running_mean
    return nn.Sequential(one, other)


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_what_is_not_provably_plain_has_no_plan(what) -> None:
    module = plain()
    assert plan_of(module, SHAPE) is not None, "this test must be able to fail"
    CHANGES[what](module)
    assert plan_of(module, SHAPE) is None


def test_a_layer_without_weights_used_in_many_places_stands_in_each_of_them() -> None:
    relu, pool, drop = nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.3)
    once = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.3), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Dropout(0.3), nn.Flatten(), nn.Linear(4, 10),
    )  # fmt: skip
    many = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        relu,
        pool,
        drop,
        nn.Conv2d(4, 4, 1),
        relu,
        pool,
        drop,
        nn.Flatten(),
        nn.Linear(4, 10),
    )
    assert plan_of(many, SHAPE) == plan_of(once, SHAPE) is not None


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(
    "what",
    ["a forward hook", "a frozen weight", "a hook on a parameter", "a norm with another eps"],
)
def test_a_plan_that_is_not_the_modules_is_refused_with_both_numbers(digits, what, lanes) -> None:
    modules = [plain() for _ in range(lanes)]
    plan = plan_of(modules[0], SHAPE)
    check_plan(modules, plan, "grouped", digits.train, "nets:mine")
    CHANGES[what](modules[-1])
    with pytest.raises(
        ModelError,
        match=(
            r"nets:mine: what would be trained is not the network itself: .* are [\d.e-]+ at most"
        ),
    ):
        check_plan(modules, plan, "grouped", digits.train, "nets:mine")


@pytest.mark.parametrize(
    "network", [Student(), Student(architecture="residual", channels=(4, 8)), Student(hidden=0)]
)
def test_the_families_pass_the_guard_by_every_lowering(digits, network) -> None:
    plan = plan_of(outline(network, digits.train), SHAPE)
    check_network(network, digits.train)
    for lowering in ("grouped", "unfold", "vmap", "separate"):
        check_plan(
            [outline(network, digits.train) for _ in range(2)],
            plan,
            lowering,
            digits.train,
            "family",
        )


def test_weights_that_are_not_those_that_were_measured_are_refused_with_both_numbers(
    digits,
) -> None:
    training = Training(epochs=2, learning_rate=0.01, keep="last", ema=0.9)
    lane = Lane(Student(channels=(4, 6), hidden=12), training, Distillation())
    (report,) = list(train([lane], digits, DATA))[-1]
    assert (
        stored_correct(lane.network, report.weights, report.val_correct, digits.validation)
        == report.val_correct
    )
    zeroed = {name: torch.zeros_like(tensor) for name, tensor in report.weights.items()}
    with pytest.raises(
        ModelError,
        match=rf"was {report.val_accuracy:.2%} in training, and is [\d.]+% with the weights",
    ) as error:
        stored_correct(lane.network, zeroed, report.val_correct, digits.validation)
    assert "\n" not in str(error.value)


# --- networks of one's own ---


@pytest.fixture
def own(monkeypatch) -> Callable[[Callable[[], nn.Module]], str]:
    """Put a way to make a network where a recipe finds it; its architecture."""
    module = types.ModuleType("own_nets")
    monkeypatch.setitem(sys.modules, "own_nets", module)

    def put(make: Callable[[], nn.Module]) -> str:
        module.net = lambda channels, image_size, classes: make()
        return "own_nets:net"

    return put


def lane_of(architecture: str, **training) -> Lane:
    settings = {"learning_rate": 0.01, "epochs": 1, "batch_size": 64} | training
    return Lane(Student(architecture=architecture), Training(**settings), Distillation())


def few(digits: Splits) -> Splits:
    return Splits(digits.train.take(torch.arange(128)), digits.validation.take(torch.arange(100)))


def mlp(*, width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_what_is_frozen_stays_as_it_is_under_every_optimiser_and_average(
    digits, own, optimizer
) -> None:
    def half_frozen() -> nn.Module:
        module = mlp()
        module[1].requires_grad_(False)
        return module

    lane = lane_of(own(half_frozen), optimizer=optimizer, weight_decay=0.1, ema=0.5)
    (report,) = next(train([lane], few(digits), DATA))
    torch.manual_seed(lane.training.seed)
    begun = half_frozen().state_dict()
    assert torch.equal(report.weights["1.weight"], begun["1.weight"])
    assert not torch.equal(report.weights["3.weight"], begun["3.weight"])


def test_a_moving_average_of_tied_weights_is_one_and_resumes(digits, own) -> None:
    def tied() -> nn.Module:
        module = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10)
        )
        module[3].weight = module[1].weight
        return module

    lane = lane_of(own(tied), ema=0.9, epochs=2, keep="last")
    _, last = (report for (report,) in [*train([lane], few(digits), DATA)])
    assert torch.equal(last.weights["1.weight"], last.weights["3.weight"])
    stored_correct(lane.network, last.weights, last.val_correct, few(digits).validation)
    reports = train([lane], few(digits), DATA)
    snapshot = next(reports)[0].snapshot()
    reports.close()
    (again,) = next(train([lane], few(digits), DATA, resumed=[snapshot]))
    assert all(torch.equal(again.weights[name], last.weights[name]) for name in last.weights)


class Counting(nn.Module):
    """Remembers how many batches it has seen, in a buffer that its state_dict leaves out; its
    logits do not depend on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.net(x) * (1 + self.seen if self.training else 1)


def test_a_buffer_that_the_state_dict_leaves_out_is_resumed_as_well(digits, own) -> None:
    lane = lane_of(own(Counting), epochs=2, keep="last")
    unbroken = [*train([lane], few(digits), DATA)][-1][0]
    reports = train([lane], few(digits), DATA)
    snapshot = next(reports)[0].snapshot()
    reports.close()
    (again,) = next(train([lane], few(digits), DATA, resumed=[snapshot]))
    assert all(
        torch.equal(again.weights[name], unbroken.weights[name]) for name in unbroken.weights
    )


def test_a_network_that_works_in_place_on_its_images_leaves_its_neighbours_theirs(
    digits, own
) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x.mul_(0.5))

    lane, split = lane_of(own(InPlace)), few(digits).train
    source = Source(split, torch.zeros(1, 3, dtype=torch.int64), None)
    alone, pair = (pack_of([lane] * lanes, source, Execution(lanes)) for lanes in (1, 2))
    drawn = Drawn(torch.arange(64), torch.zeros(64, dtype=torch.int64))
    one, two = (
        pack.step(drawn, torch.full((n,), 0.01), torch.zeros(n).long())
        for n, pack in ((1, alone), (2, pair))
    )
    assert torch.equal(one.total.expand(2), two.total)
    images = pixels(split, torch.arange(20))
    assert torch.equal(alone.logits(images.clone())[0].expand(2, -1, -1), pair.logits(images))


class Remembers(nn.Module):
    """Keeps what it learns where no state_dict sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = mlp(), 0

    def forward(self, x):
        self.seen += self.training
        return self.net(x) if self.seen < 2 else self.net(x).roll(1, -1)


def test_what_learns_outside_of_its_state_dict_is_no_result(digits, own) -> None:
    architecture = own(Remembers)
    check_network(Network(architecture=architecture), digits.train)  # one step shows nothing
    lane = lane_of(architecture, epochs=3, keep="last")
    (report,) = [*train([lane], few(digits), DATA)][-1]
    with pytest.raises(ModelError, match="what was trained is not the network itself"):
        stored_correct(lane.network, report.weights, report.val_correct, few(digits).validation)


def test_a_teacher_that_learns_outside_of_its_state_dict_is_refused_and_not_kept(
    digits, own, tmp_path
) -> None:
    teacher = Teacher(
        architecture=own(Remembers), epochs=3, batch_size=64, learning_rate=0.01, keep="last"
    )
    with pytest.raises(ModelError, match="in training, and is"):
        list(prepare_teacher(teacher, DATA, few(digits), tmp_path))
    assert not list(tmp_path.glob("*/weights.safetensors"))


def test_a_state_dict_with_more_than_tensors_cannot_be_stored(digits, own) -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x)

        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ModelError, match="_extra_state, which is no tensor"):
        check_network(Network(architecture=own(Extra)), digits.train)


def test_the_multiply_adds_of_a_layer_used_twice_count_twice_and_its_parameters_once(
    digits, own
) -> None:
    def shared() -> nn.Module:
        block = nn.Linear(8, 8)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), block, nn.ReLU(), block, nn.Linear(8, 10)
        )

    def apart() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 8),
            nn.ReLU(),
            nn.Linear(8, 8),
            nn.ReLU(),
            nn.Linear(8, 8),
            nn.Linear(8, 10),
        )

    one, other = measure(shared(), digits.train), measure(apart(), digits.train)
    assert one.parameters == other.parameters - 72
    assert one.multiply_adds == other.multiply_adds


# --- folded ---


class PartByPart(nn.Module):
    """Uses what it holds in a Sequential in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.out = nn.Linear(8, 10)

    def forward(self, x):
        before = self.parts[0](x)
        both = torch.cat([before, self.parts[1](before)], 1)
        return self.out(both.mean((2, 3)))


COLOURS = torch.tensor([1, 2, 3.0])[:, None, None]


def conv_first(change: Callable[[nn.Sequential], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 10),
        )
        change(module)
        return module

    return make


@pytest.mark.parametrize(
    "make",
    [
        PartByPart,
        conv_first(lambda m: m[0].register_forward_hook(lambda _, __, out: out.clamp(-0.1, 0.1))),
        conv_first(lambda m: m[0].register_forward_pre_hook(lambda _, x: (x[0] * COLOURS,))),
        conv_first(lambda m: m[1].register_forward_hook(lambda _, __, out: 3 * out)),
        conv_first(lambda m: m[2].register_forward_hook(lambda _, __, out: 3 * out)),
        conv_first(lambda m: setattr(m[1], "forward", lambda x: x.relu())),
        conv_first(
            lambda m: setattr(
                m,
                "forward",
                lambda x: m[3:](m[0](x.flip(1) * torch.tensor([1, 2, 3.0])[:, None, None])),
            )
        ),
        conv_first(lambda m: parametrizations.weight_norm(m[0])),
        conv_first(
            lambda m: set_to(
                m, "1", nn.Sequential(nn.Conv2d(4, 3, 1), m[0], m[0].__class__(4, 4, 1))
            )
        ),
    ],
)
def test_what_is_folded_computes_what_it_did_whatever_was_done_to_its_layers(digits, make) -> None:
    torch.manual_seed(0)
    module, grey = make(), digits.train
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.1, 3)
    like = type(grey)(grey.images, grey.labels, grey.classes, 3, grey.mean, grey.std)
    folded = compact(module, like)
    samples = torch.arange(50)
    with torch.no_grad():
        expected = module.eval()(pixels(like, samples))
        found = folded(pixels(as_stored(like), samples))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
