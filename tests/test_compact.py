"""Folding: lossless for whatever network, and counted to the number."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import images
from torch import nn

from kdexp.config import Network, Student
from kdexp.distill.compact import Replicated, as_stored, compact, fold, fold_grey
from kdexp.distill.models import Residual, build, measure


def settled(module: nn.Module, seed: int) -> nn.Module:
    """In double precision, with weights and running statistics as if it had been trained."""
    torch.manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.1, 3)
    return module


@st.composite
def convolutions(draw, depth: int, out: int, stride: int = 1) -> list[nn.Module]:
    """A convolution, perhaps in groups, and what may follow it."""
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if depth % g == out % g == 0]))
    size, bias = draw(st.sampled_from([1, 3, 5])), draw(st.booleans())
    mode = draw(st.sampled_from(["zeros", "reflect"]))
    conv = nn.Conv2d(
        depth, out, size, stride, size // 2, groups=groups, bias=bias, padding_mode=mode
    )
    between = draw(st.sampled_from([[], [nn.Dropout(0.5)], [nn.ReLU()]]))
    norm = draw(st.sampled_from([[], [nn.BatchNorm2d(out)], [nn.BatchNorm2d(out, affine=False)]]))
    return [conv, *between, *norm]


@st.composite
def networks(draw, depth: int) -> nn.Module:
    """A few blocks of convolutions, plain, nested or residual, and a linear layer."""
    layers, width, relu = [], depth, nn.ReLU()  # one ReLU in many places, as people write it
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([4, 6]))
        block = nn.Sequential(*draw(convolutions(width, out)), relu, *draw(convolutions(out, out)))
        shortcut = nn.Sequential(*draw(convolutions(width, out))) if width != out else nn.Identity()
        kind = draw(st.sampled_from(["plain", "nested", "residual"]))
        layers += {"plain": [*block], "nested": [block], "residual": [Residual(block, shortcut)]}[
            kind
        ]
        layers.append(relu)
        width = out
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * width, 5)
    )


def norms(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.detach().abs().max()))


@settings(deadline=None, max_examples=60)
@given(networks(3), st.integers(0, 2**32))
def test_a_folded_network_computes_the_same_and_leaves_the_original_alone(module, seed) -> None:
    settled(module, seed)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    expected = module(x)
    folded = fold(module.train())
    assert same(folded(x), expected)
    assert not any(isinstance(layer, nn.Dropout) for layer in folded.modules())
    assert norms(folded) <= norms(module)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


@settings(deadline=None, max_examples=60)
@given(networks(3), st.integers(0, 2**32))
def test_one_channel_in_place_of_equal_ones_computes_the_same(module, seed) -> None:
    settled(module, seed)
    grey = torch.randn(3, 1, 9, 9, dtype=torch.float64)
    assert same(fold_grey(fold(module), 3)(grey), module(grey.expand(-1, 3, -1, -1)))


def test_every_norm_right_after_a_convolution_is_gone() -> None:
    for network in (
        Student(),
        Student(architecture="residual", channels=(4, 8), blocks=2),
        Student(architecture="separable", channels=(4, 8, 8), blocks=1),
    ):
        module = settled(build(network, images()), 0)
        folded = fold(module)
        x = torch.randn(2, 3, 28, 28, dtype=torch.float64)
        assert norms(module) > 0 == norms(folded)
        assert same(folded(x), module(x))


def test_a_norm_that_does_not_follow_its_convolution_stays() -> None:
    class Late(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x).relu())

    for module in (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.ConvTranspose2d(3, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        Late(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)]),
    ):
        assert norms(fold(module)) == 1


def test_a_convolution_shared_by_two_places_is_folded_in_each_by_itself() -> None:
    conv = nn.Conv2d(3, 3, 1)
    module = settled(
        nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.ReLU(), conv, nn.BatchNorm2d(3)), 1
    )
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert same(fold(module)(x), module(x))


def test_a_network_that_does_not_begin_with_a_convolution_sees_the_channel_replicated() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4, 2))
    one = fold_grey(module, 3)
    grey = torch.randn(2, 1, 2, 2)
    assert isinstance(one, Replicated)
    assert torch.equal(one(grey), module(grey.expand(-1, 3, -1, -1)))


def test_the_documented_student_folded_is_counted_to_the_number() -> None:
    like = images()
    size = measure(compact(build(Student(), like), like), as_stored(like))
    assert size.parameters == 98_954 - 2 * (16 + 32 + 64) - 2 * 16 * 9 == 98_442
    assert size.bytes == 4 * 98_442
    norms, grey = 2 * (16 + 32 + 64), 2 * 16 * 9 * 28 * 28
    assert size.multiply_adds == 2_242_346 - norms - grey


def test_images_that_are_stored_in_colour_keep_their_channels() -> None:
    like = images()
    coloured = type(like)(like.images.expand(-1, 3, -1, -1), like.labels, like.classes, 3, 0.5, 0.5)
    folded = compact(build(Student(), coloured), coloured)
    assert as_stored(coloured).channels == 3
    assert measure(folded, coloured).parameters == 98_954 - 2 * (16 + 32 + 64)


def test_a_network_of_torchvision_takes_one_channel_too() -> None:
    like = images()
    module = settled(build(Network(architecture="squeezenet1_1"), images(size=64)), 0).float()
    grey = torch.randn(2, 1, 64, 64)
    assert torch.allclose(
        compact(module, like)(grey), module(grey.expand(-1, 3, -1, -1)), atol=1e-4
    )
