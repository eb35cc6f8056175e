"""One of several processes that talk.  Run by test_processes.py."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from sda_core.errors import DataError
from sda_core.processes import processes

if TYPE_CHECKING:
    INDEX, COUNT, ADDRESS, PORT = 0, 1, "", 0

os.environ |= {"MASTER_ADDR": ADDRESS, "MASTER_PORT": str(PORT), "RANK": str(INDEX), "WORLD_SIZE": str(COUNT)}
with processes() as team:
    assert (team.index, team.count, team.is_main) == (INDEX, COUNT, INDEX == 0)
    assert team.share(b"x" * INDEX) == [b"x" * index for index in range(COUNT)]
    assert team.share(b"") == [b""] * COUNT
    assert team.broadcast_bytes(b"all of it" if team.is_main else None) == b"all of it"
    assert team.broadcast_bytes(b"") == b""
    flags = team.broadcast_flags(np.array([True, False]) if team.is_main else None, 2)
    assert flags.tolist() == [True, False]
    total = torch.tensor([1.0, float(INDEX)])
    team.sum(total)
    assert total.tolist() == [COUNT, sum(range(COUNT))]
    with team.raise_on_all_ranks():
        pass

    def find() -> None:
        with team.raise_on_all_ranks():
            if INDEX:
                raise DataError(f"row {INDEX}", "is odd", "look at it")

    with pytest.raises(DataError, match="row 1: is odd; look at it") as caught:  # the lowest index's
        find()
    assert caught.value.known_to_all
    with pytest.raises(ZeroDivisionError), team.explain_connection_errors():  # a bug is no lost connection
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="shapes"), team.explain_connection_errors():
        raise RuntimeError("shapes do not match")
    team.wait()
