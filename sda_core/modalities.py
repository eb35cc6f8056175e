"""The modalities of an item, by name."""

from __future__ import annotations

from typing import Literal

Modality = Literal["image", "text"]

MODALITIES: tuple[Modality, Modality] = ("image", "text")
"""In the order of their passes, of an adapter's modality embeddings and of the blocks of an export."""
