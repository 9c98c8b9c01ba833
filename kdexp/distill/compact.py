"""Smaller without retraining and without loss: what inference does not need is folded into what it
does.

BatchNorm after a convolution scales and shifts its channels, w' = w g / s and b' = (b - m) g / s +
h, with running mean m, s = √(running variance + ε), gain g and shift h. A convolution over a grey
image replicated to equal channels is one over the grey image itself, its weights summed over their
input channels. Dropout does nothing after training.

Only layers that are provably plain (plain.py) are folded, and what is folded is compared with what
it was.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdexp.distill.batches import pixels
from kdexp.distill.datasets import Split
from kdexp.distill.plain import is_plain, runs_in_order

__all__ = ["Replicated", "as_stored", "compact", "fold", "fold_grey"]

EXAMPLES = 8  # images that a folded network is compared on
CLOSE = 1e-3  # of the largest logit, in single precision: folding rounds anew
DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


class Replicated(nn.Module):
    """A network that takes one channel, and sees it as `channels` equal ones."""

    def __init__(self, module: nn.Module, channels: int) -> None:
        super().__init__()
        self.module, self.channels = module, channels

    def forward(
        self, images: Float[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of a batch."""
        return self.module(images.expand(-1, self.channels, -1, -1))


def compact(module: nn.Module, like: Split) -> nn.Module:
    """A folded copy that takes the channels in which images like these are stored.

    A network may use its parts in ways that its structure does not show: where folding changes what
    it computes, it stays.
    """
    whole = copy.deepcopy(module).eval()
    folded = _first_alike([fold(module), whole], whole, like, like)
    if like.channels == as_stored(like).channels:
        return folded
    return _first_alike(
        [fold_grey(folded, like.channels), Replicated(folded, like.channels)],
        whole,
        like,
        as_stored(like),
    )


def as_stored(like: Split) -> Split:
    """The same images without replicated channels: what a compact network takes."""
    return replace(like, channels=like.images.shape[1])


@torch.no_grad()
def _first_alike(forms: list[nn.Module], module: nn.Module, like: Split, seen: Split) -> nn.Module:
    """The first of these forms, which take images as `seen`, that gives the module's logits; the
    last without being asked.
    """
    samples = torch.arange(EXAMPLES, device=like.labels.device) * len(like) // EXAMPLES
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    expected, images = module(pixels(like, samples).to(device)), pixels(seen, samples).to(device)
    for form in forms[:-1]:
        with suppress(Exception):  # a network of one's own may not run with a layer less
            found, close = form(images.clone()), CLOSE * float(expected.abs().max())
            if found.shape == expected.shape and torch.allclose(
                found, expected, rtol=0, atol=close, equal_nan=True
            ):
                return form
    return forms[-1]


def fold(module: nn.Module) -> nn.Module:
    """A copy for inference: in every Sequential, each BatchNorm2d right after a Conv2d is folded
    into it.

    Dropout is gone. What does not match stays as it is.
    """
    return _folded(copy.deepcopy(module).eval())


def fold_grey(module: nn.Module, channels: int) -> nn.Module:
    """A copy that takes one channel where `module` takes `channels` equal ones.

    A convolution that a Sequential begins with is summed over its input; elsewhere the channel is
    replicated.
    """
    first = _first(module)
    if not (type(first) is nn.Conv2d and is_plain(first)):
        return Replicated(copy.deepcopy(module), channels)
    return copy.deepcopy(module, {id(first): _summed(first)})


def _folded(module: nn.Module) -> nn.Module:
    for name, child in module._modules.items():  # named_children leaves out what stands there twice
        if child is not None:
            module._modules[name] = (
                nn.Identity() if type(child) in DROPOUTS and is_plain(child) else _folded(child)
            )
    if runs_in_order(module):
        _fold_norms(module._modules)
    return module


def _fold_norms(layers: dict[str, nn.Module | None]) -> None:
    """Identities take the place of what is folded: whoever knows a layer by its place finds it
    there.
    """
    for one, other in pairwise(
        [name for name, layer in layers.items() if type(layer) is not nn.Identity]
    ):
        conv, norm = layers[one], layers[other]
        if not (
            type(conv) is nn.Conv2d
            and type(norm) is nn.BatchNorm2d
            and is_plain(conv)
            and is_plain(norm)
        ):
            continue
        if norm.running_mean is not None:
            layers[one], layers[other] = fuse_conv_bn_eval(conv, norm), nn.Identity()


def _first(module: nn.Module) -> nn.Module:
    """The layer that sees the images."""
    while runs_in_order(module):
        layers = [layer for layer in module.children() if type(layer) is not nn.Identity]
        if not layers:
            break
        module = layers[0]
    return module


def _summed(conv: nn.Conv2d) -> nn.Conv2d:
    """The same for one channel instead of equal ones, in groups or not: each output sees the same
    image in all its inputs.
    """
    one = copy.deepcopy(conv)
    one.in_channels = one.groups = 1
    one.weight = nn.Parameter(conv.weight.detach().sum(1, keepdim=True))
    return one
