"""Makes PEFT know MoDA as soon as both PEFT and this package are imported, in either order.

``import sda_core`` has to stay free of torch, so PEFT cannot be imported here.  Where it is imported already, the
method is registered at once; else a finder on ``sys.meta_path`` waits for ``import peft`` and registers right after.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register() -> None:
    importlib.import_module("sda_core.adapters")  # by name: the kernel depends on no higher package


class _RegisteringLoader(Loader):
    """Runs the module's own loader, then registers."""

    def __init__(self, loader: Loader, finder: _PeftFinder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # whoever asks later finds the module's own loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register()


class _PeftFinder(MetaPathFinder):
    """Finds ``peft`` with the other finders and wraps its loader; anything else is none of its business."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 (the finder's interface)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname != "peft" or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


def install() -> None:
    """Register MoDA now, or when PEFT is imported; calling it again does nothing more."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())
