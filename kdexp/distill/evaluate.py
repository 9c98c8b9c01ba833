"""How good a network is on a split: accuracy with its Wilson interval, and cross-entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kdexp.distill.batches import pixels
from kdexp.distill.datasets import Split
from kdexp.intervals import wilson_interval

__all__ = ["Evaluation", "evaluate", "logits_of", "wilson_interval"]

# small enough to stay in cache (500: 1.4 s for 6,000 images, 200: 0.8 s), large enough to keep
# cores busy
BATCH = 200


@dataclass(frozen=True)
class Evaluation:
    """Counts of one pass over a split, and its mean cross-entropy."""

    correct: int
    samples: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, 0 to 1."""
        return self.correct / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.samples)


def evaluate(module: nn.Module, split: Split, mirrored: bool = False) -> Evaluation:
    """Accuracy and loss on the images as they are, dropout off, running statistics in BatchNorm.

    `mirrored`: of the mean of the probabilities for an image and for its mirror image, the flip
    test-time augmentation (Krizhevsky et al. 2012, section 4.1, without the crops).
    """
    logits = logits_of(module, split)
    if mirrored:
        flipped = logits_of(module, split, torch.tensor([[1, 0, 0]]).expand(len(split), 3))
        logits = torch.stack([logits, flipped]).log_softmax(-1).logsumexp(0) - math.log(2)
    correct = (logits.argmax(1) == split.labels).sum()
    return Evaluation(int(correct), len(split), float(F.cross_entropy(logits, split.labels)))


@torch.no_grad()
def logits_of(
    module: nn.Module,
    split: Split,
    chosen: Int64[Tensor, "samples 3"] | None = None,
    erased: Int64[Tensor, "samples 4"] | None = None,
) -> Float[Tensor, "samples classes"]:
    """The logits of every sample, each in its chosen view, with what is erased of it."""
    training = module.training
    module.eval()
    batches = torch.arange(len(split), device=split.labels.device).split(BATCH)
    drawn = [None if part is None else part.to(split.labels.device) for part in (chosen, erased)]
    parts = ([None if part is None else part[batch] for part in drawn] for batch in batches)
    logits = torch.cat(
        [module(pixels(split, batch, *own)) for batch, own in zip(batches, parts, strict=True)]
    )
    module.train(training)
    return logits
