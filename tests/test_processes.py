"""What the processes of a launch tell each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sda_core.errors import ConfigError
from sda_core.processes import ALONE, processes


def test_three_talk(run_processes: Any) -> None:
    assert run_processes(Path(__file__).with_name("processes_process.py"), 3) == [0, 0, 0]


def test_one_alone_talks_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with processes() as team:
        assert team == ALONE
    assert team.share(b"x") == [b"x"]
    assert team.broadcast_bytes(b"x") == b"x"
    assert team.broadcast_flags(np.array([True]), 1).tolist() == [True]
    total = torch.ones(2)
    team.sum(total)
    assert total.tolist() == [1, 1]
    team.wait()
    with pytest.raises(ConfigError) as caught, team.raise_on_all_ranks():
        raise ConfigError("here", "is wrong")
    assert not caught.value.known_to_all
