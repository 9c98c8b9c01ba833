"""The forward pass of K networks of one plan as one network.

A *plan* is what a network is made of, layer by layer, without its numbers: `plan_of` reads it off a
module that is built of nn.Sequential, `models.Residual` and the layers named below, whoever wrote
it. It takes only what is provably plain (plain.py): all else steps as the module it is. Activations
are [batch, lanes * channels, height, width], so that ReLU, pooling and BatchNorm are the ordinary
ones, a convolution has its groups once for each lane, and a linear layer is one batched matrix
product. With one lane it is the plain network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kdexp.distill.models import Residual
from kdexp.distill.plain import is_plain, is_plain_sequence, is_plainly_trained, resembles

__all__ = [
    "Form",
    "Lowering",
    "Plan",
    "Stack",
    "convolve",
    "dropouts",
    "forward",
    "inner_convolutions",
    "plan_of",
    "strayed",
]

BN_MOMENTUM, BN_EPS = 0.1, 1e-5  # nn.BatchNorm2d's
# standard deviations; at that distance one pass in single precision has a variance to 3 digits
FAR = 100.0

Lowering = Literal["grouped", "unfold", "vmap", "separate"]


class Convolution(NamedTuple):
    """`held_bias`: BatchNorm follows. It subtracts what a bias adds: the gradient is 0 but for
    rounding, which Adam would turn into full steps.
    """

    name: str
    stride: int
    padding: int
    groups: int
    held_bias: bool
    shape: tuple[int, ...]
    """Of the weight: out, in of a group, height, width."""
    side: tuple[int, ...]
    """Height and width of its input."""


class Norm(NamedTuple):
    """`by_windows`: ReLU and 2x2 pooling follow."""

    name: str
    by_windows: bool


class Relu(NamedTuple):
    """max(x, 0)."""


class Halve(NamedTuple):
    """Average pooling over 2x2 pixels."""


class Mean(NamedTuple):
    """Global average pooling."""


class Dropout(NamedTuple):
    """The network's dropout of that number, over so many values of an image."""

    name: str
    number: int
    width: int


class Flatten(NamedTuple):
    """From here on [lanes, batch, features]."""


class Linear(NamedTuple):
    """`last`: gives the logits, which are not rounded."""

    name: str
    last: bool


class Sum(NamedTuple):
    """Of a body and its shortcut."""

    body: Plan
    shortcut: Plan


Layer = Convolution | Norm | Relu | Halve | Mean | Dropout | Flatten | Linear | Sum
Plan = tuple[Layer, ...]


class Form(NamedTuple):
    """What is the same for all lanes, and compiled in."""

    plan: Plan
    lowering: Lowering
    dtype: torch.dtype
    narrow: torch.dtype
    """Of activations and products in training."""


@dataclass(frozen=True)
class Stack:
    """K networks: parameters and running statistics by name, each with a lanes axis in front."""

    leaves: dict[str, Tensor]
    running: dict[str, Tensor]

    @property
    def lanes(self) -> int:
        """K."""
        return len(next(iter(self.leaves.values())))


LIFTED = (
    Residual,
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.Dropout,
    nn.Linear,
    nn.ReLU,
    nn.Flatten,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
"""What a plan may be read off, besides nn.Sequential and nn.Identity."""
SPATIAL = (nn.Conv2d, nn.BatchNorm2d, nn.Flatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
"""Of these, what here takes images: torch has a meaning for some of them on vectors too."""


class _NoForm(Exception):
    """The network holds something that has no stacked form."""


# --- a network's plan ---


def plan_of(module: nn.Module, shape: tuple[int, int, int]) -> Plan | None:
    """What a network for images of `shape` (channels, height, width) is made of; None where it has
    no stacked form.
    """
    training = module.training
    try:
        _prove(module, set())
        with torch.no_grad():
            plan, _ = _plan(list(_flat("", module.eval())), torch.zeros(1, *shape), count())
    except _NoForm:
        return None
    finally:
        module.train(training)
    last = plan[-1] if plan else None
    return (*plan[:-1], last._replace(last=True)) if isinstance(last, Linear) else None


def dropouts(plan: Plan) -> list[Dropout]:
    """Every dropout, in order."""
    return [layer for layer in _all(plan) if isinstance(layer, Dropout)]


def inner_convolutions(plan: Plan) -> list[Convolution]:
    """Those whose lowering can be chosen: 3x3, stride 1, without groups, not the first."""
    found = [layer for layer in _all(plan) if isinstance(layer, Convolution)][1:]
    return [layer for layer in found if _plain(layer)]


def _all(plan: Plan) -> Iterator[Layer]:
    for layer in plan:
        yield layer
        if isinstance(layer, Sum):
            yield from _all(layer.body)
            yield from _all(layer.shortcut)


def _plain(layer: Convolution) -> bool:
    return (layer.stride, layer.padding, layer.groups, *layer.shape[2:]) == (1, 1, 1, 3, 3)


def _prove(module: nn.Module | None, owned: set[int]) -> None:
    """That the module and all in it are plain, and no weight stands in two places. Raises _NoForm.

    Of a layer without weights each place is a layer. `owned` is the memory of the weights met so
    far.
    """
    if module is None or not _is_known(module):
        raise _NoForm
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and tensor.numel():
            memory = tensor.untyped_storage().data_ptr()
            if memory in owned:
                raise _NoForm
            owned.add(memory)
    for child in module._modules.values():  # children() leaves out what stands there twice
        _prove(child, owned)


def _is_known(module: nn.Module) -> bool:
    """Whether it does what its type says, and no more."""
    if isinstance(module, nn.Sequential):
        return is_plain_sequence(module)
    if isinstance(module, Residual):
        fresh = Residual(nn.Sequential(), nn.Identity())
        return (
            type(module) is Residual
            and resembles(module, fresh)
            and module._modules.keys() == fresh._modules.keys()
        )
    return is_plain(module) and is_plainly_trained(module)


def _flat(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of nested nn.Sequentials, by name; what does nothing is left out."""
    if type(module) is nn.Sequential:
        for key, child in module._modules.items():
            assert child is not None
            yield from _flat(f"{name}.{key}" if name else key, child)
    elif type(module) is not nn.Identity:
        yield name, module


def _plan(
    layers: list[tuple[str, nn.Module]], x: Tensor, numbers: Iterator[int]
) -> tuple[Plan, Tensor]:
    plan: list[Layer] = []
    for at, (name, module) in enumerate(layers):
        following = [type(module) for _, module in layers[at + 1 : at + 3]]
        plan.append(_layer(name, module, x, following, numbers))
        x = module(x)
    return tuple(plan), x


def _layer(
    name: str, module: nn.Module, x: Tensor, following: list[type], numbers: Iterator[int]
) -> Layer:
    # a subclass may do anything
    if type(module) not in LIFTED or (x.ndim != 4 and isinstance(module, SPATIAL)):
        raise _NoForm
    match module:
        case Residual():
            return _sum(name, module, x, numbers)
        case nn.Conv2d():
            return _convolution(name, module, x, following[:1] == [nn.BatchNorm2d])
        case nn.BatchNorm2d():
            return _norm(name, module, following == [nn.ReLU, nn.AvgPool2d])
        case nn.Dropout() if module.p < 1:
            return Dropout(name, next(numbers), x[0].numel())
        case nn.Linear() if x.ndim == 2 and module.bias is not None:
            return Linear(name, last=False)
        case nn.ReLU():
            return Relu()
        case nn.Flatten(start_dim=1, end_dim=-1):
            return Flatten()
        case nn.AvgPool2d() if resembles(
            module, nn.AvgPool2d(2, count_include_pad=module.count_include_pad)
        ):
            return Halve()
        case nn.AdaptiveAvgPool2d(output_size=1 | (1, 1)):
            return Mean()
    raise _NoForm


def _sum(name: str, module: Residual, x: Tensor, numbers: Iterator[int]) -> Sum:
    parts = [
        list(_flat(f"{name}.{part}", child))
        for part, child in module._modules.items()
        if child is not None
    ]
    if any(_writes_into_its_input(part) for part in parts):  # which the other part, too, is given
        raise _NoForm
    (body, one), (shortcut, other) = (_plan(part, x, numbers) for part in parts)
    if one.shape != other.shape:
        raise _NoForm
    return Sum(body, shortcut)


def _writes_into_its_input(layers: list[tuple[str, nn.Module]]) -> bool:
    """Whether a layer works in place before any has made a new tensor."""
    for _, layer in layers:
        if getattr(layer, "inplace", False):
            return True
        if not isinstance(layer, nn.Flatten | nn.Dropout):
            return False
    return False


def _convolution(name: str, module: nn.Conv2d, x: Tensor, held_bias: bool) -> Convolution:
    stride, padding = module.stride[0], module.padding[0]
    same = (module.stride, module.padding, module.dilation) == (
        (stride, stride),
        (padding, padding),
        (1, 1),
    )
    if not same or isinstance(padding, str) or module.padding_mode != "zeros":
        raise _NoForm
    return Convolution(
        name,
        stride,
        padding,
        module.groups,
        held_bias,
        tuple(module.weight.shape),
        tuple(x.shape[2:]),
    )


def _norm(name: str, module: nn.BatchNorm2d, by_windows: bool) -> Norm:
    found = (
        module.eps,
        module.momentum,
        module.affine,
        module.track_running_stats,
        module.bias is None,
    )
    if found != (BN_EPS, BN_MOMENTUM, True, True, False):
        raise _NoForm
    return Norm(name, by_windows)


# --- its forward pass ---


def forward(
    stack: Stack,
    images: Float[Tensor, "*lanes batch channels height width"],
    form: Form,
    masks: list[Tensor] | None,
) -> tuple[Float[Tensor, "lanes batch classes"], dict[str, Tensor]]:
    """The logits of every lane and the running statistics after it; in training where the dropouts'
    masks are given.

    Images have a lanes axis where lanes see different ones.
    """
    first = form.plan[0]
    if images.ndim == 5:  # lanes with images of their own: side by side, as channels
        images = images.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    elif not (isinstance(first, Convolution) and first.groups == 1):
        # which takes shared images as they are
        images = images.repeat(1, stack.lanes, 1, 1)
    walk = _Walk(stack, form, masks, {})
    return walk.run(form.plan, images), walk.after


@dataclass(frozen=True)
class _Walk:
    """One pass through a plan."""

    stack: Stack
    form: Form
    masks: list[Tensor] | None
    after: dict[str, Tensor]

    @property
    def narrow(self) -> torch.dtype:
        return self.form.dtype if self.masks is None else self.form.narrow

    def run(self, plan: Plan, x: Tensor) -> Tensor:
        for layer in plan:
            x = self.layer(layer, x)
        return x

    def layer(self, layer: Layer, x: Tensor) -> Tensor:
        match layer:
            case Convolution():
                return self.convolution(layer, x)
            case Norm():
                return self.norm(layer, x)
            case Relu():
                return F.relu(x.to(self.narrow))
            case Halve():
                return _halve(x)
            case Mean():
                return x.mean((2, 3), keepdim=True)
            case Dropout():
                return x if self.masks is None else _dropped(x, self.masks[layer.number])
            case Flatten():
                return x.reshape(len(x), self.stack.lanes, -1).transpose(0, 1)
            case Linear():
                return self.linear(layer, x)
            case Sum():
                return self.run(layer.body, x) + self.run(layer.shortcut, x)

    def convolution(self, layer: Convolution, x: Tensor) -> Tensor:
        weight, bias = (
            self.stack.leaves.get(f"{layer.name}.{name}") for name in ("weight", "bias")
        )
        assert weight is not None
        if bias is not None:
            bias = (bias.detach() if layer.held_bias else bias).to(self.narrow)
        x, weight = x.to(self.narrow), weight.to(self.narrow)
        if _plain(layer):
            return convolve(x, weight, bias, self.form.lowering)
        groups = layer.groups * (x.shape[1] // (weight.shape[2] * layer.groups))
        flat = None if bias is None else bias.flatten()
        return F.conv2d(x, weight.flatten(0, 1), flat, layer.stride, layer.padding, groups=groups)

    def norm(self, layer: Norm, x: Tensor) -> Tensor:
        leaves, running = self.stack.leaves, self.stack.running
        scale, shift = leaves[f"{layer.name}.weight"], leaves[f"{layer.name}.bias"]
        mean, var = f"{layer.name}.running_mean", f"{layer.name}.running_var"
        if self.masks is None:
            known = running[mean].flatten(), running[var].flatten()
            return F.batch_norm(x, *known, scale.flatten(), shift.flatten(), eps=BN_EPS)
        x = (_windows(x) if layer.by_windows else x).to(self.form.dtype)
        x, self.after[mean], self.after[var] = normalise(
            x, scale, shift, running[mean], running[var]
        )
        return x

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        dtype = self.form.dtype if layer.last else self.narrow
        bias, weight = (
            self.stack.leaves[f"{layer.name}.{name}"].to(dtype) for name in ("bias", "weight")
        )
        return torch.baddbmm(bias[:, None], x.to(dtype), weight.transpose(1, 2))


def _dropped(x: Tensor, mask: Float[Tensor, "lanes batch values"]) -> Tensor:
    if x.ndim == 3:
        return x * mask
    # before the values change their order: the mask's is that of channels last
    batch, _, height, width = x.shape
    mask = mask.view(len(mask), batch, height, width, -1).permute(1, 0, 4, 2, 3)
    return (x.unflatten(1, (mask.shape[1], -1)) * mask).flatten(1, 2)


def convolve(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "lanes out in 3 3"],
    bias: Float[Tensor, "lanes out"] | None,
    lowering: Lowering,
) -> Float[Tensor, "batch lanes*out height width"]:
    """A 3x3 convolution in every lane. Images that all lanes share take one ordinary
    convolution.
    """
    lanes, out, inner = weight.shape[:3]
    if x.shape[1] == inner or lowering == "grouped":
        groups = x.shape[1] // inner
        return F.conv2d(
            x,
            weight.flatten(0, 1),
            None if bias is None else bias.flatten(),
            padding=1,
            groups=groups,
        )
    bias = weight.new_zeros(lanes, out) if bias is None else bias
    apart = x.unflatten(1, (lanes, inner))
    if lowering == "separate":
        return torch.cat(
            [
                F.conv2d(apart[:, lane], weight[lane], bias[lane], padding=1)
                for lane in range(lanes)
            ],
            1,
        )
    if lowering == "vmap":
        each = torch.vmap(
            lambda x, w, b: F.conv2d(x, w, b, padding=1), in_dims=(1, 0, 0), out_dims=1
        )
        return each(apart, weight, bias).flatten(1, 2)
    batch, _, height, width = x.shape
    # [lanes, batch, height + 2, width + 2, in]
    padded = F.pad(apart.permute(1, 0, 3, 4, 2), (0, 0, 1, 1, 1, 1))
    nine = [
        padded[:, :, down : down + height, right : right + width]
        for down in range(3)
        for right in range(3)
    ]
    patches = torch.cat(nine, -1).flatten(1, 3)  # [lanes, batch * height * width, 9 * in]
    columns = weight.permute(0, 3, 4, 2, 1).reshape(lanes, 9 * inner, out)
    product = torch.baddbmm(bias[:, None], patches, columns)
    return product.view(lanes, batch, height, width, out).permute(1, 0, 4, 2, 3).flatten(1, 2)


def _windows(x: Float[Tensor, "batch channels height width"]) -> Tensor:
    """Pixels by their 2x2 windows: [batch, channels, height / 2, 2, width / 2, 2]; compiled, and
    where all are whole.

    Viewing pixels as 2 x 2 windows avoids index divisions in the compiled kernel, mainly in the
    backward pass.
    """
    height, width = x.shape[2:]
    if not torch.compiler.is_compiling() or height % 2 or width % 2:
        return x
    return x.unflatten(3, (width // 2, 2)).unflatten(2, (height // 2, 2))


def _halve(x: Tensor) -> Float[Tensor, "batch channels half_height half_width"]:
    """Average pooling over 2x2 pixels. Compiled, as a mean over views: the compiler's own pooling
    is not vectorised.
    """
    if not torch.compiler.is_compiling():
        return F.avg_pool2d(x, 2)
    if x.ndim == 4:
        x = _windows(x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2])
    return x.sum((3, 5)) * 0.25


def normalise(
    x: Float[Tensor, "batch stacked *pixels"],
    scale: Float[Tensor, "lanes channels"],
    shift: Float[Tensor, "lanes channels"],
    mean: Float[Tensor, "lanes channels"],
    var: Float[Tensor, "lanes channels"],
) -> tuple[
    Float[Tensor, "batch stacked *pixels"],
    Float[Tensor, "lanes channels"],
    Float[Tensor, "lanes channels"],
]:
    """BatchNorm in training (arXiv:1502.03167, algorithm 1) and its new running statistics.

    Compiled, mean and variance come out of one pass over values shifted by the running mean,
    without which E[x^2] - E[x]^2 would cancel: 33 ms a step of the documented student, 42 ms by the
    compiler's own (Welford). It still cancels where the batch's mean is far from the running one:
    see `strayed`.
    """
    if not torch.compiler.is_compiling():
        new_mean, new_var = mean.flatten().clone(), var.flatten().clone()
        y = F.batch_norm(
            x, new_mean, new_var, scale.flatten(), shift.flatten(), True, BN_MOMENTUM, BN_EPS
        )
        return y, new_mean.view_as(mean), new_var.view_as(var)
    count, inner = x.numel() // x.shape[1], tuple(range(2, x.ndim))

    # so that backward, too, sums within each image first
    def in_each_image(values: Tensor) -> Tensor:
        return values.flatten().expand(len(x), -1).unflatten(1, (-1, *[1] * len(inner)))

    shifted = x - in_each_image(mean)
    # Products in place of quotients, which backward would repeat for every pixel.
    offset = shifted.sum(inner).sum(0) * (1 / count)
    variance = (shifted * shifted).sum(inner).sum(0) * (1 / count) - offset * offset
    factor = torch.rsqrt(variance + BN_EPS) * scale.flatten()
    y = shifted * in_each_image(factor) + in_each_image(shift.flatten() - offset * factor)
    with torch.no_grad():
        new_mean = mean + BN_MOMENTUM * offset.view_as(mean)
        new_var = var + BN_MOMENTUM * (variance.view_as(var) * (count / max(count - 1, 1)) - var)
    return y, new_mean, new_var


def strayed(before: dict[str, Tensor], after: dict[str, Tensor]) -> Bool[Tensor, " lanes"]:
    """Lanes in which some channel's mean is so far from its running mean that one pass over it
    cannot be trusted.

    Read off the running statistics that such a step began and ended with, so that nothing is added
    to it.
    """
    means, variances = (
        [name for name in after if name.endswith(end)] for end in ("running_mean", "running_var")
    )
    moved = torch.cat([after[name] - before[name] for name in means], 1) / BN_MOMENTUM
    spread = (
        torch.cat([after[name] - (1 - BN_MOMENTUM) * before[name] for name in variances], 1)
        / BN_MOMENTUM
    )
    near = moved * moved <= FAR**2 * (spread + BN_EPS)
    return ~near.all(1)  # also what is not a number
