"""How much memory a network's activations need at once, for one image: what decides whether it runs
on a microcontroller.

    peak = max over steps of  Σ bytes of the tensors that are live in that step

A tensor is live from the step that makes it to the last one that needs it; the image lives from the
start, the logits to the end. So it is the greatest sum of a step's input and output, and of what a
later step still waits for, such as a residual block's shortcut: the peak memory of MCUNet (Lin et
al. 2020, arXiv:2007.10319).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdexp.distill.datasets import Split

__all__ = ["activation_bytes"]

IN_PLACE = frozenset({"native_batch_norm", "_native_batch_norm_legit_no_training", "clone"})
"""Each value of the output hangs on one value of the input; besides what torch calls pointwise."""


def activation_bytes(module: nn.Module, like: Split) -> int:
    """The most bytes that a network's activations take at once for one image like those of a split,
    dropout off, in float32 (in 8 bits: a quarter).

    It follows from shapes alone: one pass of a black image is looked at, step by step (a step is
    one of torch's operations). Counted are the image, as the network takes it, and all that is made
    of it; views share the memory of what they view. A step that works value by value (ReLU, a
    BatchNorm in evaluation, a residual's sum) writes over an input of its size that nothing needs
    afterwards. Not counted are weights and what hangs on weights alone, what nothing needs, and
    what a library takes within a step (im2col).
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    image = torch.zeros(1, like.channels, *like.image_size, device=device)
    training = module.training
    trace = _Trace(image)
    try:
        with torch.no_grad(), trace:
            logits = module.eval()(image)
    finally:
        module.train(training)
    return trace.peak(logits)


@dataclass(frozen=True)
class _Step:
    """What one operation reads and makes, by the place of the memory."""

    reads: frozenset[int]
    makes: frozenset[int]
    by_value: bool


@dataclass
class _Lives:
    """From which step to which a piece of memory is needed, and how much it is."""

    bytes: int
    born: int
    last: int = -1


@dataclass(eq=False)
class _Trace(TorchDispatchMode):
    """Every operation of a pass that works on what is made of the image."""

    image: Tensor
    steps: list[_Step] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    """Nothing is freed meanwhile: a place stands for one tensor."""

    def __post_init__(self) -> None:
        super().__init__()
        self._know([self.image])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note it."""
        given = list(_tensors([args, kwargs]))
        out = func(*args, **(kwargs or {}))
        self.kept += [*given, *_tensors(out)]
        reads = frozenset(map(_place, given)).intersection(self.sizes)
        if reads:
            makes = self._know(_tensors(out))
            name = func.overloadpacket.__name__
            by_value = torch.Tag.pointwise in func.tags or name in IN_PLACE
            self.steps.append(_Step(reads, frozenset(makes), by_value))
        return out

    def peak(self, logits: Any) -> int:
        """The greatest sum of what is live in a step."""
        lives = self._lives(map(_place, _tensors(logits)))
        steps = enumerate(self.steps)
        return max(
            [self.sizes[_place(self.image)], *(_live(step, at, lives) for at, step in steps)]
        )

    def _know(self, tensors: Iterable[Tensor]) -> list[int]:
        """The places that are new among these."""
        new = {
            _place(tensor): tensor.untyped_storage().nbytes()
            for tensor in tensors
            if _place(tensor) not in self.sizes
        }
        self.sizes |= new
        return list(new)

    def _lives(self, ends: Iterable[int]) -> Mapping[int, _Lives]:
        lives = {_place(self.image): _Lives(self.sizes[_place(self.image)], 0)}
        for at, step in enumerate(self.steps):
            for place in step.reads:
                lives[place].last = at
            lives |= {place: _Lives(self.sizes[place], at) for place in step.makes}
        for place in ends:
            if place in lives:
                lives[place].last = len(self.steps)
        return lives


def _live(step: _Step, at: int, lives: Mapping[int, _Lives]) -> int:
    """Bytes that are live in a step; what it writes over counts once."""
    live = sum(each.bytes for each in lives.values() if each.born <= at <= each.last)
    return live - (_overwritten(step, at, lives) if step.by_value else 0)


def _overwritten(step: _Step, at: int, lives: Mapping[int, _Lives]) -> int:
    """Bytes of an input that nothing needs afterwards, where the output fits in just there."""
    free = {lives[place].bytes for place in step.reads if lives[place].last == at}
    made = [lives[place] for place in step.makes if lives[place].last > at]
    return next((each.bytes for each in made if each.bytes in free), 0)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _place(tensor: Tensor) -> int:
    """Where its memory is; views of it have the same."""
    return tensor.untyped_storage()._cdata
