"""Hydra plugin that registers the resolver ``${sda_local_file:...}``, used in conf/config.yaml.

Hydra finds and imports this file by its location.  DVC adds the project folder to Python's path while Hydra searches for
plugins, so no setting is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sda_core.local_files import watched


def _project() -> Path:
    """The project folder: the nearest folder with a ``dvc.yaml``, from the current one upwards."""
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
