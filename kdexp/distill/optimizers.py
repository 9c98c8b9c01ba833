"""Adam, AdamW and SGD for K networks at once: every lane its own learning rate, weight decay and
step count. And EMA.

torch.optim takes one learning rate for a whole tensor. Here the parameters of a pack are one
[lanes, parameters] tensor, so a step is a few operations on it whatever K is. The formulas and
constants are torch.optim's (Adam: arXiv:1412.6980, algorithm 1; AdamW: arXiv:1711.05101, algorithm
2; SGD: Nesterov momentum 0.9).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Real
from torch import Tensor

__all__ = ["Average", "Optimizer"]

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
MOMENTUM = 0.9

Kind = Literal["adam", "adamw", "sgd"]


class Optimizer:
    """The state of one optimiser over a pack's parameters, which it changes in place."""

    def __init__(
        self,
        kind: Kind,
        parameters: Float[Tensor, "lanes parameters"],
        weight_decay: Float[Tensor, " lanes"],
    ) -> None:
        self.kind = kind
        self.parameters = parameters
        self.weight_decay = weight_decay[:, None].clone()
        self.first = torch.zeros_like(parameters)
        self.second = torch.zeros_like(parameters) if kind != "sgd" else None
        self.steps = torch.zeros_like(self.weight_decay, dtype=torch.float64)

    def reset(self, lane: int, weight_decay: float) -> None:
        """A lane's place goes to a new network: nothing of the old one stays."""
        self.weight_decay[lane] = weight_decay
        for state in (self.first, self.second, self.steps):
            if state is not None:
                state[lane] = 0

    def state(self, lane: int) -> dict[str, Tensor]:
        """A lane's state by name; the tensors are this optimiser's own."""
        states = {"first": self.first, "second": self.second, "steps": self.steps}
        return {name: state[lane] for name, state in states.items() if state is not None}

    @torch.no_grad()
    def step(
        self, gradient: Float[Tensor, "lanes parameters"], learning_rate: Float[Tensor, " lanes"]
    ) -> None:
        """One step of every lane."""
        rate = learning_rate[:, None]
        self.steps += 1
        if self.kind == "adamw":
            self.parameters.mul_(1 - rate * self.weight_decay)
        else:
            gradient = gradient + self.weight_decay * self.parameters
        if self.second is None:
            self.first.mul_(MOMENTUM).add_(gradient)
            self.parameters.sub_(rate * (gradient + MOMENTUM * self.first))
            return
        self.first.lerp_(gradient, 1 - BETA1)
        self.second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        # Bias corrections in double precision: 1 - 0.999^1 would lose four digits in single.
        size = (rate / (1 - BETA1**self.steps)).to(rate.dtype)
        root = (1 - BETA2**self.steps).sqrt().to(rate.dtype)
        self.parameters.sub_(size * self.first / (self.second.sqrt().div_(root).add_(EPS)))


class Average:
    """The exponential moving average of some tensors over training steps (EMA).

    After step t its decay is min(decay, (1 + t) / (10 + t)): what was drawn at the start is soon
    forgotten.
    """

    def __init__(self, decay: float, like: Sequence[Tensor]) -> None:
        self.decay, self.tensors = decay, [tensor.detach().clone() for tensor in like]

    @torch.no_grad()
    def update(self, tensors: Sequence[Tensor], steps: Real[Tensor, "*lanes"]) -> None:
        """Take in what the tensors are after so many steps, of each lane where they have a lanes
        axis.
        """
        passed = steps.double()
        weight = 1 - ((1 + passed) / (10 + passed)).clamp(max=self.decay)
        for average, tensor in zip(self.tensors, tensors, strict=True):
            own = weight.to(tensor.dtype)
            average.lerp_(
                tensor.detach(), own.view(-1, *[1] * (tensor.ndim - 1)) if own.ndim else own
            )
