"""`sda upgrade` moves the seed that each recommender had to the list that all have."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sda_core.cli.app import app
from sda_core.errors import ConfigError
from sda_core.params import load_params


@pytest.fixture
def old(repository: Path, tmp_path: Path) -> Path:
    """Settings from before there were several seeds, with a comment."""
    text = (repository / "params.yaml").read_text(encoding="utf-8")
    text = text.replace("  seeds:\n  - 1\n  - 2\n  - 3\n", "").replace("  sasrec:\n", "  sasrec:  # mine\n    seed: 42\n")
    text = text.replace("  vbpr:\n", "  vbpr:\n    seed: 7\n").replace("  bert4rec:\n", "  bert4rec:\n    seed: 42\n")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    return tmp_path


def test_old_settings_are_refused_in_one_line_and_moved(old: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_params(old / "params.yaml")
    assert "train_recommender.seeds: missing" in str(caught.value)
    assert "train_recommender.sasrec.seed: is now the list train_recommender.seeds; `sda upgrade` moves it (got 42)" in str(
        caught.value
    )
    done = CliRunner().invoke(app, ["upgrade", "--root", str(old)])
    assert done.exit_code == 0, done.output
    assert "params.yaml: the seed of each recommender was moved to the list train_recommender.seeds" in done.stdout
    assert load_params(old / "params.yaml").train_recommender.seeds == (42, 7)
    assert "sasrec:  # mine\n" in (old / "params.yaml").read_text(encoding="utf-8")
    again = CliRunner().invoke(app, ["upgrade", "--root", str(old)])
    assert again.exit_code == 1
    assert "nothing to upgrade" in again.stderr
