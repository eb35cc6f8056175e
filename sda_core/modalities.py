"""The modalities of an item, by name, and what goes through a backbone in one sequence."""

from __future__ import annotations

from typing import Literal

Modality = Literal["image", "text"]

MODALITIES: tuple[Modality, Modality] = ("image", "text")
"""In the order of their passes, of an adapter's modality embeddings and of the blocks of an export."""

Pass = Literal[Modality, "joint"]
"""What a sequence holds: an item's image, its text, or both (``joint``)."""

JOINT: tuple[Pass, ...] = ("joint",)
