"""Randomness without state: what is drawn follows from a seed and a purpose, not from what was drawn before.

So a lane's masks depend neither on its neighbours nor on K, and any epoch can be entered without a saved state.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["dropout", "seed_of", "uniform_bits"]

BITS = 2**32 - 1
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: consecutive numbers become far apart


def seed_of(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, by SHA-256 (Python's own hash differs from process to process)."""
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def dropout(
    x: Float[Tensor, "lanes batch features"],
    probability: Float[Tensor, " lanes"],
    keys: Int64[Tensor, " lanes"],
    steps: Int64[Tensor, " lanes"],
    layer: int,
) -> Float[Tensor, "lanes batch features"]:
    """Dropout (arXiv:1207.0580, inverted) whose mask is a function of (key, step, layer, position) alone."""
    stream = _mix((keys + (steps * 2 + layer) * GOLDEN) & BITS)[:, None, None]
    position = torch.arange(x[0].numel(), device=x.device).view(1, *x.shape[1:])
    kept = uniform_bits(position, stream) >= (probability.double() * 2**32).to(torch.int64)[:, None, None]
    return torch.where(kept, x / (1 - probability)[:, None, None], 0.0)


def uniform_bits(position: Int64[Tensor, ...], stream: Int64[Tensor, ...]) -> Int64[Tensor, ...]:
    """32 random bits for each position of a stream: two rounds of an integer hash around the stream's key."""
    return _mix(_mix(position) ^ stream)


def _mix(x: Int64[Tensor, ...]) -> Int64[Tensor, ...]:
    """A bijection of 32-bit numbers; the multiplier is below 2^31, so that no product leaves 63 bits."""
    x = ((x >> 16) ^ x) * 0x45D9F3B & BITS
    x = ((x >> 16) ^ x) * 0x45D9F3B & BITS
    return (x >> 16) ^ x
