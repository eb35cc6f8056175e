"""Random numbers independent of history: every draw is seeded by its purpose.

A resumed run needs no stored generator state: step 17 draws the same numbers whether or not the same process made step 16.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(42, "batches", epoch)``.

    It is a SHA-256 of the seed and the purpose, so neighbouring seeds give unrelated streams.
    """
    text = "\x1f".join([str(seed), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose; see :func:`derive`."""
    return np.random.default_rng(derive(seed, *purpose))
