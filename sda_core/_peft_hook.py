"""Register MoDA with PEFT as soon as both PEFT and this package are imported, in either order.

PEFT 0.21 has no entry points for third-party methods, and ``import sda_core`` must not load torch, so it cannot import PEFT.
If PEFT is imported already, MoDA is registered at once; otherwise right after the first ``import peft``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _PeftFinder:
    """Finder that delegates the search for ``peft`` to the other finders and makes their loader register MoDA afterwards."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                install()

            spec.loader.exec_module = run_and_register  # on this loader object only; a search without an import gets another one
        return spec


def install() -> None:
    """Register MoDA now, or when PEFT is imported; further calls have no effect."""
    if "peft" in sys.modules:
        importlib.import_module("sda_core.adapters")  # by name: the kernel depends on no higher package
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())
