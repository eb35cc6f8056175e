"""The built wheel in environments of its own: the library with the base packages alone, the command line with all of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel, and packages of the environment that runs the tests."""

    folder: Path

    def run(self, *command: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, which sees nothing of this repository."""
        environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        environment["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{environment['PATH']}"
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "GIT_CONFIG_GLOBAL": os.devnull, "NO_COLOR": "1", "COLUMNS": "200"}
        program = self.folder / "bin" / command[0]
        done = subprocess.run(
            [str(program) if program.exists() else command[0], *command[1:]],
            cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    @property
    def packages(self) -> Path:
        return next((self.folder / "lib").glob("python*")) / "site-packages"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the build backend hatchling is not installed (extra dev)")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def environment(folder: Path, wheel: Path, packages: Sequence[Path]) -> Environment:
    """A new environment: the wheel itself, and the packages of some folders."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    made = Environment(folder)
    (made.packages / "packages.pth").write_text("".join(f"{path}\n" for path in packages), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


def site_packages() -> list[Path]:
    """Where the packages of this environment are; not the repository, which an editable install puts on the path."""
    found = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    return sorted(found | {Path(entry) for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}})


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With all packages that are installed here."""
    return environment(tmp_path_factory.mktemp("full") / "venv", wheel, site_packages())


def needed_by(wheel: Path) -> list[Distribution]:
    """The packages that ``pip install`` of the wheel brings, without any extra."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    todo = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.+)$", text, re.M)]
    found = dict[str, Distribution]()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # none that is used here: a build of torch without CUDA's packages, for one
            continue
        todo += [Requirement(text) for text in found[name].requires or ()]
    return list(found.values())


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With the packages of a plain ``pip install`` alone, as links to those installed here."""
    folder = tmp_path_factory.mktemp("base")
    links = folder / "packages"
    links.mkdir()
    for package in needed_by(wheel):
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(Path(str(package.locate_file(top))))
    return environment(folder / "venv", wheel, [links])


# ------------------------------------------------------------------------------------------------- the library
WEIGHTS = {f"sda_core/backbones/{kind}/model.safetensors" for kind in ("nano", "nano2")}


def test_the_wheel_has_no_top_level_name_but_its_own(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"sda_core", "hydra_plugins", "sda_rec"}
    assert {f"sda_core/stages/{path.name}" for path in (ROOT / "stages").glob("*.py")} <= names
    conf = [path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*") if path.is_file()]
    assert {f"sda_core/template/{name}" for name in (*conf, "dvc.yaml", "params.yaml", ".dvcignore")} <= names
    assert {"sda_core/py.typed", *WEIGHTS, "sda_core/report/style.css"} <= names
    assert not [name for name in names if "__pycache__" in name]


LIBRARY = ("adapters", "losses", "evaluation", "exchange", "diagnostics", "recommenders", "artifacts", "params", "item_vectors")

TINY = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(8, 8), nn.Linear(8, 8)

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.language_model = nn.ModuleList([Layer(), Layer()])
    def forward(self, hidden):
        for layer in self.language_model:
            hidden = layer.up_proj(torch.relu(layer.q_proj(hidden)))
        return hidden

base, inputs = Base(), {"hidden": torch.randn(3, 5, 8)}
"""
CHECKS = """
assert model.peft_config["default"].peft_type.value == "MODA"
assert hidden.shape == (3, 5, 8)
assert any("moda_A" in name for name, _ in model.named_parameters())
image, text = torch.randn(4, 8), torch.randn(4, 8)
assert float(cmsa(image, text, temperature=0.05)) > 0
import numpy as np
positions = np.array([1, 3, 12])
assert abs(hit(positions, 10) - 2 / 3) < 1e-9
assert abs(ndcg(positions, 10) - (1 + 0.5) / 3) < 1e-9
"""


def test_the_readme_s_lines_run_with_the_base_packages_alone(base: Environment, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = (found for found in re.findall(r"```python\n(.+?)```", readme, re.S) if "get_peft_model" in found)
    base.run("python", "-W", "error::ImportWarning", "-c", TINY + block + CHECKS, cwd=tmp_path)


def test_every_module_of_the_library_is_imported_with_the_base_packages_alone(base: Environment, tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, sys, sda_core\n"
        f"for name in {LIBRARY!r}:\n"
        "    module = importlib.import_module(f'sda_core.{name}')\n"
        "    for found in pkgutil.walk_packages(getattr(module, '__path__', []), module.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
        "print(len([name for name in sys.modules if name.startswith('sda_core.')]), sda_core.__file__)"
    )
    number, file = base.run("python", "-c", code, cwd=tmp_path).stdout.split()
    assert int(number) > 50
    assert Path(file).is_relative_to(base.folder)
    assert base.run("python", "-c", "import stages", cwd=tmp_path, check=False).stderr.endswith("No module named 'stages'\n")


def test_the_command_says_what_it_lacks(base: Environment, tmp_path: Path) -> None:
    done = base.run("sda", "init", "shop", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("sda: error: not installed: dvc, ")
    assert done.stderr.endswith('; run `pip install "sda-rec[cpu]"` or, with CUDA, "sda-rec[gpu]"\n')
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- the command line
def ran(done: subprocess.CompletedProcess[str]) -> set[str]:
    return {line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")}


def test_a_project_of_one_s_own(full: Environment, tmp_path: Path) -> None:
    """A folder with a space in its name, inside a Git repository; two stages, then an upgrade that changed one of them."""
    assert re.fullmatch(r"sda \d+\.\d+\.\d+\n", full.run("sda", "--version", cwd=tmp_path).stdout)
    full.run("git", "init", "-q", ".", cwd=tmp_path)
    assert "ready" in full.run("sda", "init", "my shop", cwd=tmp_path).stdout
    shop = tmp_path / "my shop"
    assert not (shop / ".git").exists()
    stages = set(full.run("python", "-m", "dvc", "stage", "list", "--name-only", cwd=shop).stdout.split())
    assert {"download", "train_adapter@sda", "evaluate@sda", "report"} <= stages
    # without an adapter no stage makes the folder adapters, and DVC stops at a dependency that is missing
    deps = YAML(typ="safe").load((shop / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["report"]["deps"]
    folders = {dep for dep in deps if "/" not in dep and "." not in dep} - {"metrics"}
    assert folders == {path.parent.name for path in shop.glob("*/.gitkeep")}

    assert ran(full.run("python", "-m", "dvc", "repro", "filter", cwd=shop)) == {"download", "filter"}
    assert (shop / "data" / "filtered" / "interactions.parquet").is_file()
    assert ran(full.run("python", "-m", "dvc", "repro", "filter", cwd=shop)) == set()

    again = full.run("sda", "init", "my shop", cwd=tmp_path, check=False)
    assert again.returncode == 1
    assert again.stderr == "sda init: error: my shop: is not empty (.dvc); name a new folder\n"

    # another version, in which the code of the filter has changed, and one stage's file; another file was edited here
    code = full.packages / "sda_core" / "data" / "kcore.py"
    code.write_text(code.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    package = YAML(typ="safe").load((shop / "package.yaml").read_text(encoding="utf-8"))
    text = (shop / "package.yaml").read_text(encoding="utf-8").replace(f"version: {package['version']}", "version: 0.0.9")
    (shop / "package.yaml").write_text(text, encoding="utf-8")
    refused = full.run("python", "-m", "stages.filter", cwd=shop, check=False)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert f"made with sda-rec 0.0.9, and {package['version']} is installed; run `sda upgrade`" in refused.stderr
    (shop / "conf" / "dataset" / "demo.yaml").write_text("edited: true\n", encoding="utf-8")
    stage = full.packages / "sda_core" / "stages" / "report.py"
    stage.write_text(stage.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    told = full.run("sda", "upgrade", cwd=shop).stdout
    assert told.splitlines() == [
        f"from 0.0.9 to {package['version']}: 1 files written",
        "edited by you and kept: conf/dataset/demo.yaml",
    ]
    assert (shop / "stages" / "report.py").read_text(encoding="utf-8").endswith("# changed\n")
    assert ran(full.run("python", "-m", "dvc", "repro", "filter", cwd=shop)) == {"filter"}


def test_a_project_where_git_is_missing(full: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(full.folder / "bin"))
    full.run("sda", "init", "shop", cwd=tmp_path)
    assert "no_scm" in (tmp_path / "shop" / ".dvc" / "config").read_text(encoding="utf-8")
    assert "download" in full.run("python", "-m", "dvc", "stage", "list", "--name-only", cwd=tmp_path / "shop").stdout
