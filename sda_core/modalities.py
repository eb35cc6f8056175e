"""The names of the modalities of an item, and of the kinds of passes through a backbone."""

from __future__ import annotations

from typing import Literal

Modality = Literal["image", "text"]

MODALITIES: tuple[Modality, Modality] = ("image", "text")
"""The modalities in the order of their passes, of an adapter's modality embeddings and of the blocks of an export."""

Pass = Literal[Modality, "joint"]
"""The content of a sequence: an item's image, its text, or both (``joint``)."""

JOINT: tuple[Pass, ...] = ("joint",)
