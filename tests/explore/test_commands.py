"""`sda search` and `sda explore`: what they print, and what they cannot do, in one line."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sda_core.cli import explore as explore_module
from sda_core.cli.app import app
from sda_core.explore.finished_run import FinishedRun


def sda(*arguments: str) -> tuple[int, list[str], str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout.splitlines(), done.stderr


def test_search(shop: Path) -> None:
    run = FinishedRun(shop)
    words = run.items[4].title.split()
    code, lines, _ = sda("search", *words, "--variant", "zero_shot", "-k", "3", "--root", str(shop))
    assert code == 0
    found = run.near_text(run.items[4].title, "zero_shot", "text", 3)
    assert lines == [f"{value:7.4f}  {run.items[item].raw_item_id}  {run.items[item].title}" for item, value in found]
    assert lines[0].startswith(" 1.0000")
    against = sda("search", *words, "--against", "image", "--root", str(shop))[1]
    assert len(against) == 10
    assert against != lines


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("search", " "), "sda search: error: TEXT: is empty; type what to look for"),
        (
            ("search", "mug\udcff"),
            "sda search: error: TEXT: 'mug\\udcff' is not UTF-8 text; type it in a terminal that uses UTF-8",
        ),
        (("search", "mug", "--variant", "best"), "'best' is not among the variants of params.yaml"),
        (("search", "mug", "--variant", "id"), "has no item vectors; name another variant"),
        (("search", "mug", "--variant", "random"), "no model of this project made the vectors of 'random'"),
    ],
)
def test_a_mistake_is_one_line(shop: Path, arguments: tuple[str, ...], problem: str) -> None:
    code, lines, error = sda(*arguments, "--root", str(shop))
    assert (code, lines, len(error.splitlines())) == (1, [], 1)
    assert problem in error


def test_explore_without_its_extra(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore_module, "find_spec", lambda _: None)
    code, _, error = sda("explore", "--root", str(shop))
    assert code == 1
    assert len(error.splitlines()) == 1
    assert error.startswith("sda explore: error: explore: needs the package streamlit, which is not installed; run `pip install")


def test_explore_before_the_first_run(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore_module, "find_spec", lambda _: True)
    shutil.copy(shop / "params.yaml", tmp_path)
    assert "items table is missing; run `dvc repro` to make it" in sda("explore", "--root", str(tmp_path))[2]
    shutil.copytree(shop / "data", tmp_path / "data")
    assert "has no item vectors; run `dvc repro` to make them" in sda("explore", "--root", str(tmp_path))[2]


def test_a_port_that_is_taken(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore_module, "find_spec", lambda _: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, error = sda("explore", "--port", str(port), "--root", str(shop))
    assert code == 1
    assert f"--port: {port} is in use or not allowed; name another one, for example 8502" in error


def test_explore_hands_over_to_streamlit(shop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    handed: list[list[str]] = []
    monkeypatch.setattr(explore_module, "find_spec", lambda _: True)
    monkeypatch.setattr(explore_module.os, "execv", lambda program, words: handed.append(words))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    explore_module.explore(port, shop)
    assert capsys.readouterr().out == f"http://127.0.0.1:{port} shows the page; press Ctrl-C to stop\n"
    (words,) = handed
    assert {"--server.address=127.0.0.1", "--browser.gatherUsageStats=false", f"--server.port={port}"} <= set(words)
    assert words[-2:] == ["--", str(shop.resolve())]
    with pytest.raises(typer.Exit):
        explore_module.explore(port, shop / "nowhere")
