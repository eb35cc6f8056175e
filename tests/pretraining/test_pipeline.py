"""pretraining/dvc.yaml: every dependency is in git or made by a stage, every key of params is there, every command starts."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML

from pretraining.common import HERE, settings
from sda_core.cli.scripts import script, scripts

STAGES: dict[str, Any] = YAML(typ="safe", pure=True).load((HERE / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
NANO2 = ("seen", "busy_scenes", "seen_teachers", "train_nano2", "export_nano2")


def paths(entries: list[Any]) -> list[str]:
    """Outputs stand there as a path, or as a path with flags."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def resolved(path: str) -> str:
    """A path with the params that DVC fills in."""

    def value(found: re.Match[str]) -> str:
        section: Any = settings()
        for part in found[1].split("."):
            section = section[part]
        return section

    return re.sub(r"\$\{(.+?)\}", value, path)


def command_of(stage: str) -> tuple[str, list[str]]:
    """The script of a stage and its arguments."""
    opening = "cd .. && python -m pretraining "
    assert STAGES[stage]["cmd"].startswith(opening)
    name, *arguments = shlex.split(STAGES[stage]["cmd"].removeprefix(opening))
    return name, arguments


OUTPUTS = [path for stage in STAGES.values() for path in paths(stage["outs"])]


def test_each_output_is_made_by_one_stage_and_is_not_in_git():
    assert len(set(OUTPUTS)) == len(OUTPUTS)
    assert all(path.startswith("work/") for path in OUTPUTS)


@pytest.mark.parametrize("stage", STAGES)
def test_each_dependency_is_in_git_or_made_by_another_stage(stage, repository):
    made = set(OUTPUTS) - set(paths(STAGES[stage]["outs"]))
    for path in map(resolved, STAGES[stage]["deps"]):
        if path in made:
            continue
        assert not path.startswith("work/"), path
        assert (HERE / path).exists(), path
        if (repository / ".git").exists():
            asked = ["git", "ls-files", "--error-unmatch", str((HERE / path).resolve())]
            assert subprocess.run(asked, cwd=repository, capture_output=True, check=False).returncode == 0, path


@pytest.mark.parametrize("stage", STAGES)
def test_each_key_of_params_is_in_the_settings(stage):
    for key in STAGES[stage]["params"]:
        section = settings()
        for part in key.split("."):
            assert part in section, key
            section = section[part]


def test_each_setting_is_a_parameter_of_some_stage():
    """A setting that no stage lists could change without a run."""
    listed = {key for stage in STAGES.values() for key in stage["params"]}
    wanted = {*settings(), *(f"nano2.{key}" for key in settings()["nano2"])} - {"nano2"}
    assert {key for key in wanted if key not in listed} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_each_command_starts(stage):
    name, arguments = command_of(stage)
    assert name in dict(scripts("pretraining"))
    assert f"{name}.py" in STAGES[stage]["deps"]
    typer.main.get_command(script("pretraining", name)).make_context(name, arguments)  # parses them, runs nothing


@pytest.mark.parametrize("stage", NANO2)
def test_the_stages_of_nano2_list_the_modules_that_their_script_imports(stage):
    name, _ = command_of(stage)
    tree = ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules = {f"{module.partition('.')[2]}.py" for module in imported if module.startswith("pretraining.")} - {"common.py"}
    assert modules <= set(STAGES[stage]["deps"])


def test_the_graph_has_no_cycle():
    makers = {path: name for name, stage in STAGES.items() for path in paths(stage["outs"])}
    done: set[str] = set()
    left = dict(STAGES)
    while left:
        ready = [name for name, stage in left.items() if all(makers.get(path, name) in done | {name} for path in stage["deps"])]
        assert ready, sorted(left)
        done |= set(ready)
        left = {name: stage for name, stage in left.items() if name not in done}
