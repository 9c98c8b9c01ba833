"""K networks as one: equal to K apart, to rounding; independent of each other, to the bit."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from kdexp.config import Augment, Data, Distillation, Student, Training
from kdexp.distill.batches import pixels, views
from kdexp.distill.datasets import Splits
from kdexp.distill.evaluate import evaluate
from kdexp.distill.losses import distillation_loss
from kdexp.distill.models import build
from kdexp.distill.optimizers import Optimizer
from kdexp.distill.packs import (
    Drawn,
    Execution,
    Lane,
    Separate,
    Source,
    Stacked,
    gather,
    pack_of,
    plan_for,
)
from kdexp.distill.randomness import dropout_mask, uniform_bits
from kdexp.distill.stacked import convolve
from kdexp.distill.train import train

LOWERINGS = ["grouped", "unfold", "vmap", "separate"]
STEPS = 50
DATA = Data(dataset="digits", channels=1, augment=Augment(flip=False, shift=1))


def lane(
    place: int = 0, optimizer: str = "adam", seed: int | None = None, dropout: float | None = None
) -> Lane:
    """Lanes that differ in all that may differ."""
    return Lane(
        Student(channels=(4, 6), hidden=12, dropout=0.1 * place if dropout is None else dropout),
        Training(
            optimizer=optimizer,
            learning_rate=0.01 / (1 + place),
            weight_decay=1e-3 * place,
            seed=place if seed is None else seed,
        ),
        Distillation(alpha=0.1 + 0.3 * place, temperature=1.0 + place),
    )


def lane_of(network: dict, place: int = 0, **training) -> Lane:
    """A lane of another kind of network."""
    settings = {"learning_rate": 0.01 / (1 + place), "seed": place, **training}
    return Lane(Student(**network), Training(**settings), Distillation(alpha=0.1 + 0.3 * place))


NETWORKS = {
    "residual": {"architecture": "residual", "channels": (4, 6), "dropout": 0.1},
    "residual, deep and strided": {
        "architecture": "residual",
        "channels": (4, 4),
        "blocks": 2,
        "stride": 2,
    },
    "separable": {"architecture": "separable", "channels": (4, 6)},
    "cnn, pooled globally": {"channels": (4, 6), "blocks": 2, "hidden": 0},
    "one of a user's own": {"architecture": "user_nets:mlp", "options": {"width": 12}},
}


@pytest.fixture(autouse=True)
def user_nets(tmp_path, monkeypatch):
    """A file of a user's own networks."""
    (tmp_path / "user_nets.py").write_text(
        "from torch import nn\n"
        "def mlp(channels, image_size, classes, width):\n"
        "    pixels = channels * image_size[0] * image_size[1]\n"
        "    hidden = nn.Linear(pixels, width), nn.ReLU(), nn.Dropout(0.2)\n"
        "    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self, pixels, classes):\n"
        "        super().__init__()\n"
        "        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))\n"
        "    def forward(self, x):\n"
        "        return self.inner(x).sigmoid()\n"
        "def odd(channels, image_size, classes):\n"
        "    return Odd(channels * image_size[0] * image_size[1], classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("user_nets", None)


def source(splits: Splits) -> Source:
    generator = torch.Generator().manual_seed(3)
    at = views(DATA.augment)
    return Source(
        splits.train, at, torch.randn(len(at), len(splits.train), 10, generator=generator)
    )


def draws(
    splits: Splits, lanes: int | None, count: int = STEPS
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Samples and views of some batches of 16, each lane its own or all the same."""
    generator = torch.Generator().manual_seed(4)
    shape = (16,) if lanes is None else (lanes, 16)
    return [
        tuple(torch.randint(limit, shape, generator=generator) for limit in (len(splits.train), 9))
        for _ in range(count)
    ]


def steps_of(
    pack: Stacked | Separate, data: list[tuple[torch.Tensor, torch.Tensor]], rates: list[float]
) -> torch.Tensor:
    """Train on these batches; the losses, [steps, 3, lanes]."""
    rate = torch.tensor(rates, dtype=torch.float64)
    return torch.stack(
        [
            torch.stack(pack.step(Drawn(*batch), rate, torch.full((len(rates),), step)))
            for step, batch in enumerate(data)
        ]
    )


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_fused_equals_separate_to_1e_10_after_50_steps(digits, optimizer, lowering, shared) -> None:
    lanes = [lane(place, optimizer) for place in range(3)]
    data = draws(digits, None if shared else 3)
    fused = Stacked(lanes, source(digits), Execution(3, shared, lowering=lowering), torch.float64)
    losses = steps_of(fused, data, [one.training.learning_rate for one in lanes])
    for place, one in enumerate(lanes):
        alone = Stacked([one], source(digits), Execution(), torch.float64)
        own = data if shared else [(samples[place], chosen[place]) for samples, chosen in data]
        lost = steps_of(alone, own, [one.training.learning_rate])
        assert difference(losses[:, :, place], lost[:, :, 0]) <= 1e-10
        weights, expected = fused.state(place), alone.state(0)
        assert weights.keys() == expected.keys()
        for name in weights:
            assert difference(weights[name].double(), expected[name].double()) <= 1e-10
        images = pixels(digits.validation, torch.arange(50))
        logits = [pack.logits(images) for pack in (fused, alone)]
        assert difference(logits[0][place], logits[1][0]) <= 1e-10


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_of_plain_layers_is_fused_and_equals_its_modules(
    digits, name, shared
) -> None:
    """Also where it is a user's own; dropout off, since a module's own draws its masks
    otherwise.
    """
    network = NETWORKS[name] | ({} if "own" in name else {"dropout": 0.0})
    lanes = [lane_of(network, place, ema=0.9, label_smoothing=0.1) for place in range(3)]
    rates = [one.training.learning_rate for one in lanes]
    data = draws(digits, None if shared else 3)
    packs = [
        kind(lanes, source(digits), Execution(3, shared), torch.float64)
        for kind in (Stacked, Separate)
    ]
    if "own" in name:
        for pack in packs[1:]:
            for module in pack.modules:
                module[3].p = 0.0
        packs[0].drop.zero_()
    fused, apart = (steps_of(pack, data, rates) for pack in packs)
    assert difference(fused, apart) <= 1e-9
    images = pixels(digits.validation, torch.arange(50))
    assert difference(packs[0].logits(images), packs[1].logits(images)) <= 1e-9
    # whose biases before BatchNorm are held here, and drift in a module
    for place in range(3 if "cnn" not in name else 0):
        one, other = (pack.state(place) for pack in packs)
        assert one.keys() == other.keys()
        assert all(
            difference(one[name].double(), other[name].double()) <= 1e-9
            for name in one
            if other[name].double().norm()
        )


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_other_networks_too_are_the_same_fused_and_alone(digits, name, lowering) -> None:
    lanes = [lane_of(NETWORKS[name], place) for place in range(2)]
    rates, data = [one.training.learning_rate for one in lanes], draws(digits, None, 10)
    fused = steps_of(
        Stacked(lanes, source(digits), Execution(2, lowering=lowering), torch.float64), data, rates
    )
    for place, one in enumerate(lanes):
        alone = steps_of(
            Stacked([one], source(digits), Execution(), torch.float64),
            data,
            rates[place : place + 1],
        )
        assert difference(fused[:, :, place], alone[:, :, 0]) <= 1e-10


def test_what_has_no_stacked_form_steps_side_by_side(digits) -> None:
    odd = lane_of({"architecture": "user_nets:odd"})
    plain = lane_of({"architecture": "user_nets:mlp", "options": {"width": 4}})
    assert isinstance(pack_of([odd], source(digits), Execution()), Separate)
    assert isinstance(pack_of([plain], source(digits), Execution()), Stacked)
    assert plan_for(odd, digits.train) is None


@pytest.mark.parametrize("kind", [Stacked, Separate])
def test_the_moving_average_is_what_is_kept_evaluated_and_resumed(digits, kind) -> None:
    """Against its own definition, step by step; from a snapshot it goes on as if unbroken."""
    one, data = lane_of(NETWORKS["residual"], ema=0.99), draws(digits, None, 30)
    pack = kind([one], source(digits), Execution(), torch.float64)
    plain = kind([lane_of(NETWORKS["residual"])], source(digits), Execution(), torch.float64)
    expected = {name: tensor.double() for name, tensor in plain.state(0).items()}
    rate = torch.tensor([0.01], dtype=torch.float64)
    for step, batch in enumerate(data):
        for each in (pack, plain):
            each.step(Drawn(*batch), rate, torch.tensor([step]))
        decay = min(0.99, (2 + step) / (11 + step))
        live = plain.state(0)
        expected = {
            name: decay * tensor + (1 - decay) * live[name] for name, tensor in expected.items()
        }
        if step == 15:
            half = pack.save(0)
    found = pack.state(0)
    floats = [name for name, tensor in found.items() if tensor.is_floating_point()]
    assert len(floats) > 10
    for name in floats:
        assert difference(found[name], expected[name]) <= 1e-10
    module = build(one.network, digits.train).double()
    module.load_state_dict(found)
    images = pixels(digits.validation, torch.arange(50)).double()
    assert difference(pack.logits(images)[0], module.eval()(images)) <= 1e-10
    again = kind([one], source(digits), Execution(), torch.float64)
    again.load(0, half)
    for step, batch in list(enumerate(data))[16:]:
        again.step(Drawn(*batch), rate, torch.tensor([step]))
    assert all(torch.equal(again.state(0)[name], found[name]) for name in found)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_one_lane_equals_the_plain_module_under_torchs_own_optimizer(digits, optimizer) -> None:
    one, data = lane(1, optimizer, dropout=0.0), draws(digits, None)
    pack = Stacked([one], source(digits), Execution(), torch.float64)
    losses = steps_of(pack, data, [one.training.learning_rate])
    torch.manual_seed(one.training.seed)
    module = build(one.network, digits.train).double()
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    extra = {"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {}
    reference = kinds[optimizer](
        module.parameters(),
        lr=one.training.learning_rate,
        weight_decay=one.training.weight_decay,
        **extra,
    )
    for step, drawn in enumerate(data):
        how, batch = one.distillation, gather(source(digits), Drawn(*drawn), torch.float64)
        loss = distillation_loss(
            module(batch.images), batch.soft, batch.labels, how.alpha, how.temperature
        )
        assert losses[step, 0, 0].item() == pytest.approx(loss.total.item(), rel=1e-10)
        reference.zero_grad()
        loss.total.backward()
        reference.step()
    module.load_state_dict(pack.state(0))  # the names, shapes and counts are the module's own
    assert int(module[1].num_batches_tracked) == STEPS


def test_modules_side_by_side_train_as_the_stacked_ones_do(digits) -> None:
    lanes, data = [lane(place, dropout=0.0) for place in range(2)], draws(digits, 2, 20)
    rates = [one.training.learning_rate for one in lanes]
    one, other = (
        kind(lanes, source(digits), Execution(2, False), torch.float64)
        for kind in (Stacked, Separate)
    )
    assert difference(steps_of(one, data, rates), steps_of(other, data, rates)) <= 1e-9


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_neighbour_that_turns_nan_changes_no_bit(digits, lowering) -> None:
    lanes, data = [lane(place) for place in range(3)], draws(digits, 3, 10)
    how = Execution(3, False, lowering=lowering)
    calm, mad = (Stacked(lanes, source(digits), how, torch.float64) for _ in range(2))
    rates = [one.training.learning_rate for one in lanes]
    expected = steps_of(calm, data, rates)
    found = steps_of(mad, data, [rates[0], float("nan"), rates[2]])
    assert not found[-1, 0, 1].isfinite()
    for place in (0, 2):
        assert torch.equal(expected[:, :, place], found[:, :, place])
        assert all(
            torch.equal(calm.state(place)[name], mad.state(place)[name])
            for name in calm.state(place)
        )


@pytest.mark.parametrize("kind", [Stacked, Separate])
def test_bf16_stays_near_fp32_and_away_from_parameters_losses_and_evaluation(digits, kind) -> None:
    lanes, data = [lane(place, dropout=0.0) for place in range(2)], draws(digits, None)
    rates = [one.training.learning_rate for one in lanes]
    images = pixels(digits.validation, torch.arange(50))
    wide, narrow = (
        kind(lanes, source(digits), Execution(2, precision=p)) for p in ("fp32", "bf16")
    )
    assert torch.equal(wide.logits(images), narrow.logits(images)), (
        "evaluation is in fp32, whatever the training"
    )
    expected, found = (steps_of(pack, data, rates).float() for pack in (wide, narrow))
    assert 1e-6 < difference(found[:5], expected[:5]) < 1e-2
    assert difference(found, expected) < 0.1
    assert found.dtype == torch.float32
    state = narrow.state(0)
    assert all(tensor.dtype != torch.bfloat16 for tensor in state.values())
    assert any(
        (tensor.bfloat16().float() != tensor).any()
        for name, tensor in state.items()
        if name.endswith("weight")
    )


def test_the_trained_weights_score_the_same_in_the_plain_module(digits) -> None:
    one = dataclasses.replace(lane(1), training=Training(epochs=2, learning_rate=0.01, keep="last"))
    (report,) = list(train([one], digits, DATA))[-1]
    module = build(one.network, digits.train)
    module.load_state_dict(report.weights)
    assert evaluate(module, digits.validation).correct == report.val_correct


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_lowering_is_the_same_convolution(lowering) -> None:
    x = torch.randn(2, 6, 7, 5).double()
    weight = torch.randn(3, 4, 2, 3, 3).double()
    bias = torch.randn(3, 4).double()
    expected = torch.cat(
        [
            torch.nn.functional.conv2d(x[:, 2 * k : 2 * k + 2], weight[k], bias[k], padding=1)
            for k in range(3)
        ],
        1,
    )
    assert torch.allclose(convolve(x, weight, bias, lowering), expected, rtol=1e-12, atol=1e-12)


def test_dropout_keeps_its_share_scales_it_and_repeats_itself() -> None:
    p, keys, steps = torch.tensor([0.2, 0.5]), torch.tensor([11, 12]), torch.tensor([4, 4])
    one = dropout_mask(200, 100, p, keys, steps)
    assert torch.equal(one, dropout_mask(200, 100, p, keys, steps))
    for lane in range(2):
        kept = (one[lane] != 0).double().mean().item()
        assert kept == pytest.approx(1 - p[lane].item(), abs=4 * 0.5 / 20_000**0.5)
        assert one[lane].max().item() == pytest.approx(1 / (1 - p[lane].item()), rel=1e-6)
    assert torch.equal(dropout_mask(200, 100, torch.zeros(2), keys, steps), torch.ones(2, 200, 100))


def test_masks_of_other_keys_and_draws_are_independent() -> None:
    def mask(key: int, draw: int) -> torch.Tensor:
        drawn = dropout_mask(
            128, 576, torch.tensor([0.5]), torch.tensor([key]), torch.tensor([draw])
        )
        return (drawn != 0).double().flatten() - 0.5

    masks = [
        mask(*each) for each in ((1, 0), (2, 0), (1, 1), (1, 2), (1, 4), (2**32 - 1, 2 * 10**6 + 1))
    ]
    for number, one in enumerate(masks):
        for other in masks[:number]:
            assert abs(float((one * other).mean()) * 4) < 5 / len(one) ** 0.5
        assert abs(float((one[1:] * one[:-1]).mean()) * 4) < 5 / len(one) ** 0.5


def test_the_integer_hash_fills_its_32_bits_evenly() -> None:
    bits = uniform_bits(
        torch.arange(1 << 16, dtype=torch.int32), torch.tensor(12345, dtype=torch.int32)
    )
    assert len(bits.unique()) == 1 << 16  # a bijection
    for bit in range(32):
        assert ((bits.long() >> bit) & 1).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_lane_whose_place_is_taken_leaves_nothing_behind(digits) -> None:
    data = draws(digits, 2, 6)
    how = Execution(2, False)
    reused, fresh = (
        Stacked([lane(0), lane(1)], source(digits), how, torch.float64) for _ in range(2)
    )
    steps_of(reused, data, [0.01, 0.02])
    reused.put(0, lane(2))
    fresh.put(0, lane(2))
    assert torch.equal(
        steps_of(reused, data, [0.01, 0.0])[:, :, 0], steps_of(fresh, data, [0.01, 0.02])[:, :, 0]
    )


def test_an_optimizer_keeps_lanes_apart() -> None:
    together = Optimizer(
        "adam", torch.ones(2, 5, dtype=torch.float64), torch.tensor([0.0, 0.1], dtype=torch.float64)
    )
    for _ in range(3):
        together.step(
            torch.ones(2, 5, dtype=torch.float64),
            torch.tensor([0.1, float("nan")], dtype=torch.float64),
        )
    assert together.parameters[0].isfinite().all()
    assert together.parameters[1].isnan().all()
