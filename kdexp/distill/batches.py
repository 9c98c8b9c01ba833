"""Mini-batches: views of images, and pixels as a network takes them; a batch is one gather.

An augmented *view* of an image is a (flip, down, right) triple out of a finite list, so that a
teacher's logits can be cached for every (view, sample). View 0 is the image itself.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kdexp.config import Augment
from kdexp.distill.datasets import Split

__all__ = ["pixels", "rectangles", "views"]


def views(augment: Augment) -> Int64[Tensor, "views 3"]:
    """Every (flip, down, right) of `augment`; the first is the image itself."""
    shifts = sorted(range(-augment.shift, augment.shift + 1), key=abs)
    triples = [
        (flip, down, right)
        for flip in range(1 + augment.flip)
        for down in shifts
        for right in shifts
    ]
    return torch.tensor(triples, dtype=torch.int64)


def pixels(
    split: Split,
    samples: Int64[Tensor, " batch"],
    chosen: Int64[Tensor, "batch 3"] | None = None,
    erased: Int64[Tensor, "batch 4"] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """One batch as normalised floats, each sample in its chosen view; pixels shifted in are black.

    A view moves the image `down` and `right` pixels, then flips it left to right. One gather,
    channels last. Of the result, the rectangle `erased` (top, bottom, left, right; none where it is
    empty) becomes 0: grey by `split.mean`.
    """
    if chosen is None:
        batch = split.images[samples].permute(0, 2, 3, 1)
    else:
        height, width = split.image_size
        flip, down, right = (column[:, None] for column in chosen.unbind(1))
        rows = torch.arange(height, device=samples.device) - down
        columns = torch.arange(width, device=samples.device).expand(len(samples), width)
        columns = torch.where(flip.bool(), width - 1 - columns, columns) - right
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
            :, None, :
        ]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        batch = (
            split.images[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]]
            * inside[..., None]
        )
    floats = (batch.float() / 255 - split.mean) / split.std
    if erased is not None:
        floats = floats * ~_inside(erased, split.image_size)[..., None]
    if split.channels > floats.shape[-1]:
        floats = floats.expand(-1, -1, -1, split.channels).contiguous()
    return floats.permute(0, 3, 1, 2)


def rectangles(
    share: float, samples: int, image_size: tuple[int, int], generator: torch.Generator
) -> Int64[Tensor, "samples 4"]:
    """What random erasing (arXiv:1708.04896, algorithm 1) takes of each sample: top, bottom, left,
    right.

    A `share` of the samples loses 2 to 40 % of its area at an aspect ratio of 0.3 to 3.3, cut to
    the image; the others nothing.
    """
    height, width = image_size
    drawn = torch.rand(5, samples, generator=generator, dtype=torch.float64)
    area = (0.02 + 0.38 * drawn[0]) * height * width
    ratio = torch.exp((2 * drawn[1] - 1) * math.log(1 / 0.3))
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top, left = (drawn[2] * (height - tall + 1)).floor(), (drawn[3] * (width - wide + 1)).floor()
    chosen = drawn[4] < share
    return (torch.stack([top, top + tall, left, left + wide], 1) * chosen[:, None]).long()


def _inside(
    rectangles: Int64[Tensor, "batch 4"], image_size: tuple[int, int]
) -> Bool[Tensor, "batch height width"]:
    (rows, columns) = [torch.arange(side, device=rectangles.device) for side in image_size]
    (top, bottom, left, right) = rectangles[:, :, None].unbind(1)
    return ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[
        :, None, :
    ]
