"""The runner of the packages of scripts: what it lists, how options are read, what a user's mistake looks like."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from experiments.options import folder_name
from sda_core.cli.scripts import run_script, script, scripts

COMMAND = re.compile(r"python -m (bench|experiments|pretraining) ([a-z0-9_]+)([^`]*?)(?=`|\n\w|\n\n|\n-|#)")
SCRIPTS = [(package, name) for package in ("bench", "experiments", "pretraining") for name, _ in scripts(package)]


@pytest.mark.parametrize(("package", "name"), SCRIPTS, ids=lambda part: part)
def test_every_script_explains_itself(package: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(package, name, ["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: python -m {package} {name} [OPTIONS]")
    assert "--help" in out


@pytest.mark.parametrize("package", sorted({package for package, _ in SCRIPTS}))
def test_a_package_lists_its_scripts_in_one_line_each(package: str, repository: Path) -> None:
    command = [sys.executable, "-m", package, "--help"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True, env={"COLUMNS": "100"})
    listed = done.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == [name for name, _ in scripts(package)]
    assert all(sentence and not sentence.endswith((".", ":")) for _, sentence in scripts(package))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "pop,nosuch"], "--models: expected some of pop, pop_leaking"),
        (["--seeds", "1 2"], "--seeds: expected whole numbers with commas between them (got '1 2'); see `{program} --help`"),
        (["--models", "pop,"], "--models: expected names with commas between them (got 'pop,'); see `{program} --help`"),
        (["--models", "pop,pop"], "--models: expected each name once (got 'pop,pop'); see `{program} --help`"),
        (["--seeds", "1,1"], "--seeds: expected each number once, none below 0 (got '1,1'); see `{program} --help`"),
        (["--seeds=-1"], "--seeds: expected each number once, none below 0 (got '-1'); see `{program} --help`"),
        (["--seeds"], "--seeds: has no value, expected: seeds of the trainings; see `{program} --help`"),
        (["--sees=1"], "--sees: is not an option of this command (similar are --seeds); see `{program} --help`"),
        (["1"], "'1' is not expected; this command takes options only; see `{program} --help`"),
        (["--root", "nowhere"], "--root: expected a project folder"),
    ],
    ids=["name", "number", "comma", "name-twice", "number-twice", "negative", "no-value", "option", "word", "root"],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    program = "python -m experiments published"
    with pytest.raises(SystemExit) as ended:
        run_script("experiments", "published", arguments)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{program}: error: {message.format(program=program)}")


@pytest.mark.parametrize("package", sorted({package for package, _ in SCRIPTS}))
def test_an_unknown_script_is_one_line(package: str, repository: Path) -> None:
    done = subprocess.run([sys.executable, "-m", package, "nosuch"], cwd=repository, capture_output=True, text=True, check=False)
    program = f"python -m {package}"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{program}: error: COMMAND: 'nosuch' is not a command; see `{program} --help`\n"


def test_commands_in_the_docs_have_options_that_exist(repository: Path) -> None:
    pages = [*repository.glob("*.md"), *repository.glob("docs/*.md"), *repository.glob("*/README.md")]
    checked = 0
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for package, name, rest in COMMAND.findall(text):
            known = {option for parameter in typer.main.get_command(script(package, name)).params for option in parameter.opts}
            used = set(re.findall(r"--[a-z][a-z0-9-]*", rest))
            assert used <= known | {"--help"}, f"{page.name}: python -m {package} {name}{rest}"
            checked += len(used)
    assert checked > 60


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", ".hidden", "-x", "a b"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(typer.BadParameter, match="which become a folder's name"):
        folder_name(name)
    assert folder_name("hm-2.nano2+x_1") == "hm-2.nano2+x_1"
