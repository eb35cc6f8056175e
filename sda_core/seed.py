"""Randomness that does not depend on history: every draw is seeded by what it is for.

A resumed run needs no stored generator state then: step 17 draws the same numbers whether or not the process
that made step 16 is the one that makes step 17.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(42, "batches", epoch)``.

    SHA-256 of the seed and the purpose, so that neighbouring seeds give unrelated streams.
    """
    text = "\x1f".join([str(seed), *(str(part) for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose; see :func:`derive`."""
    return np.random.default_rng(derive(seed, *purpose))
