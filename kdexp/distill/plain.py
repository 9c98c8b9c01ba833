"""Whether a layer is just one of torch's, as torch makes it: its exact type, and every attribute
accounted for.

It is compared with a fresh one of the same arguments. A hook, a parametrization, a `forward` or
`train` of its own, a buffer more, a tensor of another kind: whatever a fresh one does not have, or
has otherwise, makes it *not plain*, and nobody may then say what it computes but itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["is_plain", "is_plain_sequence", "is_plainly_trained", "resembles", "runs_in_order"]

# what of a Sequential decides how it runs its layers
RUNNING = ("__call__", "_call_impl", "forward", "__iter__")
NOT_COMPARED = {"training", "_modules"}  # what holds layers is looked at layer by layer


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer of torch.nn computes what a fresh one of the same arguments would with its
    numbers.
    """
    kind = type(layer)
    if getattr(nn, kind.__name__, None) is not kind or layer._modules:
        return False
    try:
        return resembles(layer, _fresh(layer))
    except Exception:  # an argument that it does not remember, or not as it was
        return False


def is_plain_sequence(module: nn.Module) -> bool:
    """Whether it runs what it holds one after another, and nothing besides."""
    return type(module) is nn.Sequential and resembles(module, nn.Sequential())


def runs_in_order(module: nn.Module) -> bool:
    """Whether it is an nn.Sequential, or a subclass that leaves the running to it, without hooks or
    tensors of its own.
    """
    kind, plain = type(module), nn.Sequential
    if not isinstance(module, plain) or any(
        getattr(kind, name) is not getattr(plain, name) for name in RUNNING
    ):
        return False
    ours, theirs = _compared(module), _compared(plain())
    more = ours.keys() - theirs.keys()  # what a subclass remembers, if it hides no method
    return not any(hasattr(kind, name) for name in more) and all(
        name in ours and _same(ours[name], theirs[name]) for name in theirs
    )


def is_plainly_trained(layer: nn.Module) -> bool:
    """Whether all its parameters are numbers of its own in single precision, trained by their
    gradients as they come.
    """
    parameters = [parameter for parameter in layer._parameters.values() if parameter is not None]
    tensors = [*parameters, *(buffer for buffer in layer._buffers.values() if buffer is not None)]
    own = all(
        t.untyped_storage().nbytes() == t.nbytes and t.dtype in (torch.float32, torch.int64)
        for t in tensors
    )
    return own and all(
        parameter.requires_grad and not _hooked(parameter) for parameter in parameters
    )


def resembles(module: nn.Module, fresh: nn.Module) -> bool:
    """Whether a module has what a fresh one of its kind has, and the same but for the numbers in
    its tensors.
    """
    ours, theirs = _compared(module), _compared(fresh)
    return ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in ours)


def _compared(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in NOT_COMPARED}


def _fresh(layer: nn.Module) -> nn.Module:
    arguments = {}
    for name in inspect.signature(type(layer).__init__).parameters:
        if name not in ("self", "args", "kwargs", "device", "dtype"):
            value = getattr(layer, name)
            arguments[name] = value is not None if name == "bias" else value
    with torch.device("meta"):  # no memory, and nothing drawn from torch's generator
        return type(layer)(**arguments)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return (one.shape, one.layout, one.is_floating_point()) == (
            other.shape,
            other.layout,
            other.is_floating_point(),
        )
    return bool(one == other)


def _hooked(parameter: Tensor) -> bool:
    return bool(
        parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    )
