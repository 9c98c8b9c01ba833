"""Random networks as people build them: nn.Sequential of torch's layers, with whatever may be done
to such a layer.

`build` is what a sweep file would name (`faults.networks:build`): its structure follows from
`number` alone, its weights from torch's generator, as with any network of a user's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from kdexp.distill.models import Residual

ATTEMPTS = 40


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


class Backwards(nn.Sequential):
    """A subclass that runs its layers from the last to the first."""

    def forward(self, x):
        for layer in reversed(self):
            x = layer(x)
        return x


class Loud(nn.ReLU):
    """A subclass of a plain layer."""

    def forward(self, x):
        return 1.5 * super().forward(x)


def build(channels: int, image_size: tuple[int, int], classes: int, number: int) -> nn.Sequential:
    """Network `number`."""
    draw = random.Random(number)
    x = torch.rand(3, channels, *image_size)
    plain = draw.random() < 0.65
    layers: list[nn.Module] = []
    for _ in range(draw.randint(0, 5)):
        x = grow(layers, x, draw, plain)
    layers.append(nn.Flatten())
    x = x.flatten(1)
    for _ in range(draw.randint(0, 3)):
        x = grow(layers, x, draw, plain)
    layers.append(nn.Linear(x.shape[1], classes))
    if draw.random() < 0.3:  # nested
        cut = draw.randint(0, len(layers) - 1)
        layers = [nn.Sequential(*layers[:cut]), *layers[cut:]]
    module = nn.Sequential(*layers)
    if not plain or draw.random() < 0.2:
        for _ in range(draw.randint(1, 2)):
            draw.choice(CHANGES)(module, draw)
    return module


def grow(
    layers: list[nn.Module], x: torch.Tensor, draw: random.Random, plain: bool
) -> torch.Tensor:
    """One layer more, new or one that is already there, if it fits what comes before; what it makes
    of x.
    """
    for _ in range(ATTEMPTS):
        again = layers and draw.random() < 0.15
        layer = draw.choice(layers) if again else new_layer(x, draw, plain)
        try:
            with torch.no_grad():
                y = layer.eval()(x.clone())
        except Exception:  # it does not fit here
            continue
        if y.ndim == x.ndim and len(y) == len(x) and 0 < y[0].numel() <= 600:
            layers.append(layer)
            return y
    return x


def new_layer(x: torch.Tensor, draw: random.Random, plain: bool) -> nn.Module:
    """A layer with random arguments for such an x."""
    wide = x.shape[1]
    if x.ndim == 2:
        some: list[Callable[[], nn.Module]] = [
            partial(nn.Linear, wide, draw.choice([4, 6])),
            nn.ReLU,
            partial(nn.Dropout, draw.choice([0.0, 0.0, 0.3])),
            lambda: summed([nn.Linear(wide, 4), nn.ReLU(True), nn.Linear(4, wide)]),
        ]
        more: list[Callable[[], nn.Module]] = [
            partial(nn.Linear, wide, 5, bias=False),
            partial(nn.BatchNorm1d, wide),
            partial(nn.LayerNorm, wide),
            nn.Tanh,
            Loud,
            nn.Flatten,
        ]
        return draw.choice(some if plain else some + more)()
    out = draw.choice([2, 4, wide])
    some = [
        partial(nn.Conv2d, wide, out, 3, padding=1, bias=draw.random() < 0.5),
        partial(
            nn.Conv2d,
            wide,
            out,
            draw.choice([1, 3, 5]),
            draw.choice([1, 2]),
            draw.choice([0, 1, 2]),
        ),
        partial(nn.Conv2d, wide, wide, 3, padding=1, groups=wide),
        partial(nn.BatchNorm2d, wide),
        partial(nn.BatchNorm2d, wide),
        partial(nn.ReLU, draw.random() < 0.3),
        nn.ReLU,
        partial(nn.AvgPool2d, 2),
        partial(nn.AdaptiveAvgPool2d, 1),
        partial(nn.Dropout, draw.choice([0.0, 0.0, 0.3])),
        nn.Identity,
        lambda: summed([nn.Conv2d(wide, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU(True)]),
        lambda: summed(
            [nn.ReLU(), nn.Conv2d(wide, out, 1)], nn.Conv2d(wide, out, 1), nn.BatchNorm2d(out)
        ),
    ]
    more = [
        partial(
            nn.Conv2d, wide, out, 3, padding=1, padding_mode=draw.choice(["reflect", "circular"])
        ),
        partial(
            nn.Conv2d,
            wide,
            out,
            3,
            padding=draw.choice([1, 2, "same", (1, 2)]),
            dilation=draw.choice([1, 2]),
        ),
        partial(nn.Conv2d, wide, out, (3, 1), draw.choice([1, (2, 1)])),
        partial(
            nn.BatchNorm2d,
            wide,
            eps=draw.choice([1e-5, 1e-2]),
            momentum=draw.choice([0.1, 0.3, None]),
        ),
        partial(
            nn.BatchNorm2d,
            wide,
            affine=draw.random() < 0.5,
            track_running_stats=draw.random() < 0.5,
        ),
        partial(
            nn.AvgPool2d,
            draw.choice([2, 3]),
            ceil_mode=draw.random() < 0.5,
            divisor_override=draw.choice([None, 3]),
        ),
        partial(nn.AvgPool2d, 3, 1, 1, count_include_pad=draw.random() < 0.5),
        partial(nn.MaxPool2d, 2),
        partial(nn.AdaptiveAvgPool2d, 2),
        partial(nn.GroupNorm, 1, wide),
        partial(nn.InstanceNorm2d, wide, affine=True),
        partial(nn.Dropout2d, 0.3),
        partial(nn.Dropout, 1.0),
        nn.LeakyReLU,
        nn.GELU,
        Loud,
        lambda: summed([nn.ReLU(True), nn.Conv2d(wide, wide, 1)]),
        lambda: summed([nn.Conv2d(wide, 1, 1)]),
        lambda: Backwards(nn.ReLU(), nn.Conv2d(wide, wide, 1)),
    ]
    return draw.choice(some if plain else some + more)()


def summed(body: list[nn.Module], *shortcut: nn.Module) -> Residual:
    return Residual(nn.Sequential(*body), nn.Sequential(*shortcut) if shortcut else nn.Identity())


# --- what may be done to a layer ---


def weighted(module: nn.Module) -> list[nn.Module]:
    """Its layers with a weight, as long as nothing was done to them."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and "weight" in layer._parameters
    ]


def some_layer(module: nn.Module, draw: random.Random) -> nn.Module:
    return draw.choice([layer for layer in module.modules() if not layer._modules])


def frozen(module: nn.Module, draw: random.Random) -> None:
    parameters = list(module.parameters())[:-1]  # the last bias learns
    for parameter in draw.sample(parameters, min(len(parameters), 2)):
        parameter.requires_grad_(False)


def hooked(module: nn.Module, draw: random.Random) -> None:
    def of_output(_, __, out):
        return 0.5 * out

    def of_input(_, inputs):
        return (inputs[0] + 0.1,)

    def of_gradient(_, gradients, __):
        return (None if gradients[0] is None else 2 * gradients[0],)

    if not weighted(module):
        return
    layer = draw.choice(weighted(module))
    kinds = [
        partial(layer.register_forward_hook, of_output),
        partial(layer.register_forward_pre_hook, of_input),
        partial(layer.register_full_backward_hook, of_gradient),
        partial(module.register_forward_hook, of_output),
        partial(next(layer.parameters()).register_hook, lambda gradient: 3 * gradient),
    ]
    if next(layer.parameters()).requires_grad:
        draw.choice(kinds)()


def parametrized(module: nn.Module, draw: random.Random) -> None:
    if not weighted(module):
        return
    draw.choice(
        [
            parametrizations.weight_norm,
            parametrizations.spectral_norm,
            weight_norm,
            lambda layer: torch.nn.utils.parametrize.register_parametrization(
                layer, "weight", Doubled()
            ),
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        ]
    )(draw.choice(weighted(module)))


def with_a_forward_of_its_own(module: nn.Module, draw: random.Random) -> None:
    layer = some_layer(module, draw)
    before = layer.forward
    layer.forward = lambda x: 0.7 * before(x)


def tied(module: nn.Module, draw: random.Random) -> None:
    layers = weighted(module)
    pairs = [
        (a, b) for a in layers for b in layers if a is not b and a.weight.shape == b.weight.shape
    ]
    if pairs:
        one, other = draw.choice(pairs)
        one.weight = other.weight


def replaced(module: nn.Module, draw: random.Random) -> None:
    """By a subclass that runs something else."""
    module.__class__ = type(
        "Quiet", (nn.Sequential,), {"forward": lambda self, x: 0.9 * nn.Sequential.forward(self, x)}
    )


def with_a_buffer_more(module: nn.Module, draw: random.Random) -> None:
    some_layer(module, draw).register_buffer("more", torch.ones(1))


CHANGES = (
    frozen,
    frozen,
    hooked,
    hooked,
    parametrized,
    with_a_forward_of_its_own,
    tied,
    replaced,
    with_a_buffer_more,
)
