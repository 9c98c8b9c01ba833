"""That what is trained is the network that is stored: shown before the first step, measured at the
end.

Before: a network's state_dict carries all that its logits depend on, evaluation repeats itself,
something can be trained, and the plan by which it is stacked (stacked.py) computes what the module
computes, in training and in evaluation, with the same gradients, on images of the training split in
double precision. At the end: the weights that are stored, in a network built afresh, are what is
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdexp.config import Network
from kdexp.distill.batches import pixels
from kdexp.distill.datasets import Split
from kdexp.distill.evaluate import logits_of
from kdexp.distill.models import ModelError, build, layout_of, what_and_where
from kdexp.distill.randomness import drawing
from kdexp.distill.stacked import Form, Lowering, Plan, Stack, dropouts, forward

__all__ = ["check_network", "check_plan", "stored_correct"]

EXAMPLES = 8  # images of the training split
# of the largest value, in double precision: a thousand times what rounding does to deep networks
CLOSE = 1e-6
SAME = 1e-4  # the same in single precision
# by which two forms of one forward pass differ in evaluation; a GPU's has TF32
ROUNDING = {"cpu": 1e-5, "cuda": 2e-3}
AS_IT_IS = "wrap it in an nn.Module with a forward of its own, which is then trained as it is"


def check_network(network: Network, like: Split) -> None:
    """That a network can be trained, evaluated and stored. Raises ModelError, which says what is in
    the way.
    """
    name, images = network.architecture, _examples(like)
    with drawing(), torch.enable_grad():
        one, other = _built(network, like, 1), _built(network, like, 2)
        with _failing_as(f"{name}: fails in training"):
            one.to(memory_format=layout_of(one))
            logits = one.train()(images.to(memory_format=torch.channels_last))
        expected = len(images), len(like.classes)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = (
                tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            )
            raise ModelError(
                f"{name}: gives {got} for {len(images)} images in training, expected logits of"
                f" shape {expected}; let it return them alone"
            )
        if not logits.isfinite().all():
            raise ModelError(
                f"{name}: gives NaN or infinity for training images before it is trained at all;"
                " correct it"
            )
        if not logits.requires_grad:
            raise ModelError(
                f"{name}: nothing of it can be trained: its logits depend on no parameter that"
                " requires a gradient; unfreeze a layer, or choose another network"
            )
        with _failing_as(f"{name}: fails in backward"):
            _probe(logits).backward()
        found, again = (_evaluated(one, images, name) for _ in range(2))
        if not _same(found, again, SAME):
            raise ModelError(
                f"{name}: gives other logits for the same images each time that it is evaluated, by"
                f" up to {_apart(found, again):.3g}: no accuracy of it holds; let it draw, or"
                " change its state, in training only"
            )
        _load(other, one.state_dict(), name)
        loaded = _evaluated(other, images, name)
    if not _same(found, loaded, SAME):
        raise ModelError(
            f"{name}: its state_dict does not hold all that its logits depend on: a second one with"
            f" the same state differs by up to {_apart(found, loaded):.3g}; keep what it draws or"
            " learns in parameters or persistent buffers"
        )


def check_plan(
    modules: Sequence[nn.Module], plan: Plan, lowering: Lowering, like: Split, name: str
) -> None:
    """That fresh networks of one plan compute the same as one: logits, gradients and running
    statistics. Raises ModelError.

    They are used up: a copy would have lost its hooks.
    """
    for module in modules:
        _without_dropout(module).double()
    images = _examples(like).double()
    leaves = _stacked(modules, lambda module: dict(module.named_parameters()))
    running = _stacked(
        modules, lambda module: {n: b for n, b in module.named_buffers() if b.is_floating_point()}
    )
    form = Form(plan, lowering, torch.float64, torch.float64)
    masks = [
        torch.ones(len(modules), len(images), layer.width, dtype=torch.float64)
        for layer in dropouts(plan)
    ]
    for leaf in leaves.values():
        leaf.requires_grad_()
    logits, after = forward(Stack(leaves, running), images, form, masks)
    gradients = torch.autograd.grad(_probe(logits), list(leaves.values()), materialize_grads=True)
    with torch.no_grad():
        evaluated, _ = forward(Stack(leaves, {**running, **after}), images, form, None)
    for place, module in enumerate(modules):
        own = module.train()(images.clone())
        _probe(own).backward()
        pairs = [
            ("logits in training", logits[place], own),
            ("logits in evaluation", evaluated[place], _evaluated(module, images, name)),
            (
                "gradients",
                _flat(gradients, place),
                _flat([_gradient(p) for p in module.parameters()]),
            ),
            (
                "running statistics",
                _flat(after.values(), place),
                _flat([module.get_buffer(n) for n in after]),
            ),
        ]
        for what, ours, theirs in pairs:
            if not _same(ours, theirs, CLOSE):
                raise ModelError(
                    f"{name}: what would be trained is not the network itself: on {len(images)}"
                    f" training images {what} are {_largest(ours):.6g} at most where its own are"
                    f" {_largest(theirs):.6g} (apart by up to {_apart(ours, theirs):.3g});"
                    f" {AS_IT_IS}, and please report it"
                )


def stored_correct(
    network: Network, weights: Mapping[str, Tensor], counted: int, validation: Split
) -> int:
    """How many validation images the network has right with the weights that are stored: built
    afresh, and evaluated.

    Raises ModelError where that is not what was `counted` in training, but for images that rounding
    may decide.
    """
    name = network.architecture
    with drawing():
        module = _built(network, validation, 3)
    _load(module, weights, name)
    with _failing_as(f"{name}: fails on validation images"):
        logits = logits_of(module.to(validation.labels.device), validation)
    best = logits.topk(min(2, logits.shape[1])).values
    close = ROUNDING.get(logits.device.type, ROUNDING["cuda"]) * logits.abs().max()
    correct = int((logits.argmax(1) == validation.labels).sum())
    undecided = int((best[:, 0] - best[:, -1] < close).sum())
    total = len(validation)
    # no more: logits that are all alike decide nothing
    if abs(correct - counted) > min(undecided, 1 + total // 100):
        raise ModelError(
            f"{name}: what was trained is not the network itself: validation accuracy was"
            f" {counted / total:.2%} in training, and is {correct / total:.2%} with the weights"
            " that would be stored. No result is recorded. Does it keep something that its"
            f" state_dict does not hold? If not, {AS_IT_IS}, and please report it"
        )
    return correct


def _examples(like: Split) -> Float[Tensor, "batch channels height width"]:
    """Images from all over a split, on the CPU; of fewer than that, some twice."""
    chosen = torch.arange(EXAMPLES, device=like.labels.device) * len(like) // EXAMPLES
    return pixels(like, chosen).cpu().contiguous()


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Whatever the user's own network raises in here, in one line."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{what}: {what_and_where(error)}; correct it and start again") from error


def _built(network: Network, like: Split, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(network, like)


def _load(module: nn.Module, state: Mapping[str, object], name: str) -> None:
    odd = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ModelError(
            f"{name}: its state_dict holds {odd}, which is no tensor and cannot be stored; keep it"
            " in a buffer"
        )
    with _failing_as(f"{name}: its own state_dict does not fit a second one built alike"):
        module.load_state_dict(state)


@torch.no_grad()
def _evaluated(module: nn.Module, images: Tensor, name: str) -> Tensor:
    with _failing_as(f"{name}: fails on training images"):
        return module.eval()(images.clone())


def _without_dropout(module: nn.Module) -> nn.Module:
    """The same module."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return module


def _stacked(
    modules: Sequence[nn.Module], named: Callable[[nn.Module], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    each = [named(module) for module in modules]
    return {name: torch.stack([tensors[name].detach() for tensors in each]) for name in each[0]}


def _probe(logits: Tensor) -> Tensor:
    """A number that every logit moves in its own way."""
    weights = torch.arange(
        logits[..., :, :].numel() // (len(logits) if logits.ndim == 3 else 1), dtype=logits.dtype
    ).cos()
    return (logits.flatten(-2) * weights).sum()


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _flat(tensors: object, place: int | None = None) -> Tensor:
    parts = [(tensor if place is None else tensor[place]).detach().flatten() for tensor in tensors]  # type: ignore[attr-defined]
    return torch.cat(parts) if parts else torch.zeros(0)


def _same(one: Tensor, other: Tensor, close: float) -> bool:
    return torch.allclose(one, other, rtol=close, atol=close * _largest(other), equal_nan=True)


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().nan_to_num(torch.inf).max())
