"""From raw review files to tables: readers, filter, split, prompts, and the built-in shop.

Nothing here imports torch.  The exported names are imported lazily, so that using one module of the package does not import
the others (or make a stage depend on them): ``from sda_core.data.amazon import read_reviews``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sda_core.data.kcore import k_core

__all__ = ["k_core"]


def __getattr__(name: str) -> object:
    if name == "k_core":
        from sda_core.data.kcore import k_core

        return k_core
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
