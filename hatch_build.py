"""Adds the stages and the project template to the wheel; an editable install reads both from the repository."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILES = {
    "stages": "sda_core/stages",  # no package of its own in site-packages: a project's folder `stages` would hide it
    "conf": "sda_core/template/conf",
    "dvc.yaml": "sda_core/template/dvc.yaml",
    "params.yaml": "sda_core/template/params.yaml",
    ".dvcignore": "sda_core/template/.dvcignore",
    ".dvc/config": "sda_core/template/.dvc/config",
    ".dvc/plots": "sda_core/template/.dvc/plots",
}
"""What the wheel holds elsewhere than the repository; ``sda_core/template`` is what ``sda init`` copies."""


class WheelFiles(BuildHookInterface):
    """In ``pyproject.toml`` the same table would also copy the files at an editable install, where they would grow old."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the files, for a wheel that is built to be installed elsewhere."""
        if version == "standard":
            build_data["force_include"].update(FILES)
