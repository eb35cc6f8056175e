"""A small project in a temporary folder: the real code, the real dvc.yaml, DVC and Git, a shop of a few dozen items."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

SMALL = [
    "backbone=tiny",
    "dataset.num_users=120",
    "dataset.num_items=60",
    "dataset.image_side=32",
    "fetch_images.shard_rows=16",
    "train_adapter.training.num_steps=6",
    "train_adapter.training.batch_size=8",
    "train_adapter.training.warmup_steps=2",
    "train_adapter.training.checkpoint_every=2",
    "backbone.hidden_size=32",
    "backbone.num_heads=2",
    "backbone.vision_depth=1",
    "export_embeddings.shard_rows=8",
    "export_embeddings.batch_size=8",
    "export_embeddings.fused_dim=16",
    "build_index.num_queries=20",
    "train_recommender.seeds=[1,2]",
    "train_recommender.vbpr.max_epochs=4",
    "train_recommender.sasrec.max_epochs=4",
    "train_recommender.bert4rec.max_epochs=4",
    "train_recommender.sasrec.hidden_size=16",
    "train_recommender.bert4rec.hidden_size=16",
    "evaluate.bootstrap_samples=50",
    "report.num_example_items=2",
    "report.num_neighbors=3",
    "runtime.device=cpu",
    "runtime.num_threads=1",
    "control_embeddings.variants=[]",
    "variants=[id,zero_shot,sda]",
    "train_recommender.variants=[zero_shot,sda]",
    "recommenders=[pop,sasrec,vbpr]",
    "~train_adapter.variants.lora",
]


@dataclass(frozen=True)
class Project:
    """A checkout of the pipeline in a folder of its own."""

    root: Path

    def environment(self) -> dict[str, str]:
        """The virtual environment first on PATH, as after `activate`."""
        environment = dict(os.environ)
        environment["PATH"] = str(Path(sys.executable).parent) + os.pathsep + environment["PATH"]
        environment.update(PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(self.root), GIT_CONFIG_GLOBAL=os.devnull, NO_COLOR="1")
        for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"):
            environment[name] = "Test"
        for name in ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
            environment[name] = "test@example.invalid"
        return environment

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the project folder."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def dvc(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run DVC."""
        return self.run(sys.executable, "-m", "dvc", *arguments, check=check)

    def stages_run(self, *arguments: str) -> set[str]:
        """Run DVC, and name the stages that it ran."""
        output = self.dvc(*arguments).stdout
        return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}

    def outputs(self) -> dict[str, str]:
        """Path and hash of every output in dvc.lock."""
        lock = YAML(typ="safe").load((self.root / "dvc.lock").read_text(encoding="utf-8"))
        return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage.get("outs", [])}

    def set_params(self, *overrides: str) -> None:
        """Compose params.yaml as `dvc exp run -S` does, without running anything."""
        code = (
            "import sys; from dvc.utils.hydra import compose_and_dump;"
            "compose_and_dump('params.yaml', sys.argv[1], None, 'config', '', sys.argv[2:])"
        )
        self.run(sys.executable, "-c", code, str(self.root / "conf"), *overrides)

    def copy(self, target: Path) -> Project:
        """The whole project with its cache, elsewhere."""
        shutil.copytree(self.root, target, symlinks=True)
        return Project(target)


@pytest.fixture(scope="session")
def small_settings() -> list[str]:
    """What makes the project small: `dvc exp run` composes params.yaml from conf/, so an experiment names these again."""
    return SMALL


@pytest.fixture(scope="session")
def new_project(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """Make an empty project with the small settings."""

    def make(name: str) -> Project:
        root = tmp_path_factory.mktemp(name) / "project"
        root.mkdir()
        skipped = shutil.ignore_patterns("__pycache__")
        for folder in ("sda_core", "stages", "conf", "hydra_plugins"):
            shutil.copytree(repository / folder, root / folder, ignore=skipped)
        for file in ("dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
            shutil.copy(repository / file, root / file)
        project = Project(root)
        project.run("git", "init", "-q", "-b", "main")
        project.dvc("init", "-q")
        project.dvc("config", "hydra.enabled", "true")
        project.dvc("config", "core.analytics", "false")
        # The presets are the project's own files: a change of them is a change of the defaults, not an experiment.
        project.set_params(*SMALL)
        project.run("git", "add", ".")
        project.run("git", "commit", "-q", "-m", "small project")
        return project

    return make


@pytest.fixture(scope="session")
def finished(new_project: Callable[[str], Project]) -> Project:
    """A project whose pipeline has run once; tests that change it take a copy."""
    project = new_project("finished")
    project.dvc("repro")
    project.run("git", "add", ".")
    project.run("git", "commit", "-q", "-m", "results")
    return project
