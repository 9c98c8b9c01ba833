"""Activation memory: as counted by hand, as measured, and the same however a network is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import Interpreter, Node
from torch.profiler import ProfilerActivity, profile, record_function

from kdexp.config import Student
from kdexp.distill.compact import as_stored, compact
from kdexp.distill.datasets import Split
from kdexp.distill.footprint import activation_bytes
from kdexp.distill.models import Residual, build, measure

STUDENTS = {
    "cnn": Student(),
    "residual": Student(architecture="residual", channels=(8, 16), blocks=1),
    "separable": Student(architecture="separable", channels=(24, 32), blocks=2),
}


def images(channels: int = 3, side: int = 28) -> Split:
    pixels = torch.zeros(16, channels, side, side, dtype=torch.uint8)
    return Split(
        pixels, torch.zeros(16, dtype=torch.int64), tuple("0123456789"), channels, 0.5, 0.5
    )


def floats(*shape: int) -> int:
    return 4 * torch.Size(shape).numel()


def test_the_documented_student_needs_what_is_counted_by_hand() -> None:
    """Its greatest step is the first pooling, 16x28x28 to 16x14x14: the convolution before it needs
    its image and its output, BatchNorm and ReLU write over that.
    """
    pooling = floats(16, 28, 28) + floats(16, 14, 14)
    assert pooling > floats(3, 28, 28) + floats(16, 28, 28)
    module = build(Student(), images())
    assert activation_bytes(module, images()) == pooling == 62_720
    assert measure(module, images()).activation_bytes == 62_720


def test_a_shortcut_is_live_until_it_is_added() -> None:
    def convolution() -> nn.Conv2d:
        return nn.Conv2d(8, 8, 3, padding=1)

    body = nn.Sequential(convolution(), nn.ReLU(), convolution())
    plain = activation_bytes(body, images(8, 8))
    assert plain == 2 * floats(8, 8, 8)
    assert activation_bytes(Residual(body, nn.Identity()), images(8, 8)) == 3 * floats(8, 8, 8)


def test_what_is_folded_or_nested_otherwise_needs_the_same() -> None:
    torch.manual_seed(0)
    like = images()
    module = build(STUDENTS["residual"], like).eval()
    expected = activation_bytes(module, like)
    assert activation_bytes(nn.Sequential(nn.Sequential(module)), like) == expected
    assert activation_bytes(compact(module, like), as_stored(like)) == expected
    inplace = build(STUDENTS["residual"], like)
    for layer in inplace.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = True
    assert activation_bytes(inplace, like) == expected


def test_what_nothing_needs_and_what_hangs_on_weights_alone_is_not_counted() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(1000, 64))

        def forward(self, x):
            x.repeat(1, 50, 1, 1)  # of no use
            weight = self.table * 2 + 1  # of weights alone
            padded = torch.zeros(x.shape[0], 64)
            padded += x.flatten(1)
            return (padded @ weight.T)[:, :10]

    like = images(1, 8)
    # the image, and the numbers that it is added to; then these and the product
    assert activation_bytes(Odd(), like) == floats(64) + floats(1000)


def test_training_mode_and_torchs_generator_stay_as_they_were() -> None:
    module = build(Student(), images()).train()
    state = torch.get_rng_state()
    activation_bytes(module, images())
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_that_cannot_be_looked_at_has_no_such_size_and_all_others() -> None:
    class Shy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x):
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("not while you look")
            return self.layer(x.flatten(1))

    size = measure(Shy(), images(1, 8))
    assert (size.parameters, size.activation_bytes) == (650, None)


@pytest.mark.parametrize("name", sorted(STUDENTS))
def test_it_is_the_peak_that_is_measured(name: str) -> None:
    """torch's allocator, asked at the end of each step of the folded network, each value freed after
    its last use and ReLU in place. A residual's sum takes new memory there, which is no more than
    the convolution before it needs.
    """
    torch.manual_seed(0)
    like = images()
    module = compact(build(STUDENTS[name], like), like)
    for layer in module.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = True
    assert measured(module, like) == activation_bytes(module, like)


class Stepwise(Interpreter):
    """Marks each step for the profiler."""

    def run_node(self, node: Node) -> object:
        with record_function("step"):
            return super().run_node(node)


def measured(module: nn.Module, like: Split) -> int:
    """Bytes that torch holds for one image, at most, between steps."""
    image = torch.zeros(1, like.channels, *like.image_size)
    program = torch.export.export(module.eval(), (image,)).module()
    with torch.no_grad():
        Stepwise(program).boxed_run([image.clone()])  # what is made once
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            Stepwise(program).boxed_run([image.clone()])
    happened = profiled.profiler.kineto_results.events()
    changes = [(each.start_ns(), each.nbytes()) for each in happened if each.name() == "[memory]"]
    ends = [each.start_ns() + each.duration_ns() for each in happened if each.name() == "step"]
    assert len(changes) > 10
    assert len(ends) > 10
    return max(sum(size for at, size in changes if at <= end) for end in ends)
