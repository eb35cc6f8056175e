"""Hydra finds and imports this file by its place: it makes ``${sda_local_file:...}`` known, which conf/config.yaml uses.

DVC adds the project folder to Python's path while Hydra looks for plugins, so no setting is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sda_core.local_files import watched


def _project() -> Path:
    """The project folder: the current one, or the nearest above it with a ``dvc.yaml``."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), here)


def _section(root: DictConfig, name: str) -> dict[str, Any]:
    section = root.get(name)
    found = OmegaConf.to_container(section, resolve=True) if isinstance(section, DictConfig) else {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _local_file(use: str, *, _root_: DictConfig) -> str:
    """The path that DVC watches for one use of local files."""
    return watched(_section(_root_, "dataset"), _section(_root_, "backbone"), _project())[use]


OmegaConf.register_new_resolver("sda_local_file", _local_file, replace=True)
