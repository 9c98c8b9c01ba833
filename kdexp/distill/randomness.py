"""Randomness without state: what is drawn follows from a seed and a purpose, not from what was
drawn before.

So a lane's masks depend neither on its neighbours nor on K, and any epoch can be entered without a
saved state.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

__all__ = ["drawing", "dropout_mask", "seed_of", "uniform_bits"]

BITS = 2**32 - 1
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: consecutive numbers become far apart


_generator = threading.RLock()


@contextmanager
def drawing(seed: int | None = None, devices: Sequence[int] = ()) -> Iterator[None]:
    """In here torch's one generator is this thread's own, seeded if asked; after it, as it was
    before.

    A training draws from it beside a thread that builds networks to look at their size.
    """
    with _generator, torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def seed_of(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, by SHA-256 (Python's own hash differs from process to
    process).
    """
    text = repr((seed, *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def dropout_mask(
    batch: int,
    features: int,
    probability: Float[Tensor, " lanes"],
    keys: Int64[Tensor, " lanes"],
    draws: Int64[Tensor, " lanes"],
) -> Float[Tensor, "lanes batch features"]:
    """What dropout (arXiv:1207.0580, inverted) multiplies with: 0, or 1 / (1 - probability).

    A function of (key, number of the draw, position) alone.
    """
    stream = _mix(_wrapped(keys + draws * GOLDEN))[:, None]
    threshold = (probability.double() * 2**32 - 2**31).to(torch.int32)[:, None]
    # Compiled, the positions are mixed on the way: cheaper than to read them, and a cache cannot be
    # compiled.
    positions = _positions if torch.compiler.is_compiling() else _cached_positions
    kept = uniform_bits(positions(batch * features, keys.device), stream) >= threshold
    return (kept.to(probability.dtype) / (1 - probability)[:, None]).unflatten(1, (batch, features))


def uniform_bits(mixed: Int32[Tensor, ...], stream: Int32[Tensor, ...]) -> Int32[Tensor, ...]:
    """32 random bits for each (mixed) position of a stream: an integer hash before and after the
    stream's key.
    """
    return _mix(mixed ^ stream)


def _positions(count: int, device: torch.device) -> Int32[Tensor, " count"]:
    return _mix(torch.arange(count, dtype=torch.int32, device=device))


_cached_positions = cache(_positions)


def _mix(x: Int32[Tensor, ...]) -> Int32[Tensor, ...]:
    """A bijection of 32-bit numbers, in arithmetic that wraps around: eight at once where 64 bits
    would be slow.
    """
    x = ((x >> 16 & 0xFFFF) ^ x) * 0x45D9F3B
    x = ((x >> 16 & 0xFFFF) ^ x) * 0x45D9F3B
    return (x >> 16 & 0xFFFF) ^ x


def _wrapped(x: Int64[Tensor, ...]) -> Int32[Tensor, ...]:
    return ((x + 2**31 & BITS) - 2**31).to(torch.int32)
