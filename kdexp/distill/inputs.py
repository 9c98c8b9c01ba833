"""Images from anywhere as a network takes them: read, scaled and made grey just as those that it
was trained on.

    file → pixels 0 to 255 (images.py) → x = (pixel / 255 - mean) / std (batches.py) → logits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdexp.config import Data
from kdexp.distill.datasets import Split, made_grey
from kdexp.distill.evaluate import logits_of
from kdexp.distill.images import Picture, read

__all__ = ["Input", "blank", "open_image", "probabilities"]


@dataclass(frozen=True)
class Input:
    """What a network takes and answers: images as they are stored, and its classes by logit."""

    channels: int
    """As stored: 1 for grey, whatever `data.channels` makes of it."""
    height: int
    width: int
    classes: tuple[str, ...]

    @classmethod
    def of(cls, split: Split) -> Input:
        """Of the images of a split."""
        return cls(split.images.shape[1], *split.image_size, split.classes)


def blank(given: Input, data: Data) -> Split:
    """Two black images of that form, normalised as `data` says: what a network is built for."""
    images = torch.zeros(2, given.channels, given.height, given.width, dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.int64)
    return Split(images, labels, given.classes, data.channels, data.mean, data.std)


def open_image(file: Path, data: Data, like: Split) -> Picture:
    """An image file, of any size and mode, as `data` would have read it. Raises Unreadable."""
    stored, (height, width) = like.images.shape[1], like.image_size
    assert height == width, "every dataset's images are squares"
    if data.dataset == "image_folder" or stored == 3:
        return read(file, height, stored)
    coloured = read(file, height, 3)  # its images are made grey by kdexp, not by Pillow
    return replace(coloured, pixels=made_grey(coloured.pixels[None])[0])


def probabilities(
    module: nn.Module, pictures: Sequence[Picture], like: Split
) -> Float[Tensor, "images classes"]:
    """The probability of each class for each image, on the CPU: softmax of the logits at
    temperature 1.
    """
    images = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    labels = torch.zeros(len(pictures), dtype=torch.int64)
    split = replace(like, images=images, labels=labels).to(like.labels.device)
    return logits_of(module, split).double().softmax(1).float().cpu()
