"""One of several processes that train an adapter together.  Run by test_processes.py."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sda_core.alignment import batch_rows
from sda_core.errors import ArtifactError, ConfigError, TrainingError
from sda_core.items import ItemSource
from sda_core.processes import ProcessLostError, processes
from tests.alignment import toy
from tests.sections import changed

if TYPE_CHECKING:
    INDEX, COUNT, ADDRESS, PORT = 0, 1, "", 0
    ARGUMENTS: tuple[Any, ...] = ()

torch.set_num_threads(1)
os.environ |= {"MASTER_ADDR": ADDRESS, "MASTER_PORT": str(PORT), "RANK": str(INDEX), "WORLD_SIZE": str(COUNT)}
mode, folder, *more = ARGUMENTS

if mode == "train":
    (delay_seconds,) = more
    with processes() as team:
        toy.run_shared(folder, team, toy.Encoder(delay_seconds))

elif mode == "whole":  # without chunks, without dropout
    (center,) = more
    with processes() as team:
        toy.run_whole(folder, team, center)

elif mode == "sharded":
    from torch.distributed.tensor import DTensor

    from sda_core import adapters

    with processes() as team:
        for recompute, teacher in ((False, "adapted"), (True, "base"), (True, "adapted")):
            model, _ = toy.run_tiny(
                folder / f"sharded-{recompute}-{teacher}",
                team,
                gradient_checkpointing=recompute,
                sharding="fsdp",
                micro_batch_size=2,
                teacher_source=teacher,
            )
            layers = model.get_base_model().model.language_model.layers
            weight = layers[0].self_attn.q_proj.get_base_layer().weight
            assert isinstance(weight, DTensor)
            assert weight.to_local().numel() * 2 == weight.numel()
            assert not any(isinstance(value, DTensor) for value in toy.weights(model).values())
        if team.is_main:
            adapters.save(model, folder / "saved")

elif mode == "mistakes":
    with processes() as team:

        class Torn(ItemSource):
            def images(self, rows: np.ndarray) -> list[Image.Image | None]:
                if INDEX == 1:
                    raise ArtifactError("image of item 5", "cannot be decoded")
                return super().images(rows)

        plain = toy.items()
        torn = Torn(plain.item_ids, plain.texts(np.arange(20)), "A picture.", "hash", toy.Images(), "text_only")
        with pytest.raises(ArtifactError, match="image of item 5: cannot be decoded") as caught:
            toy.run_shared(folder / "torn", team, toy.Encoder(), source=torn)
        assert caught.value.known_to_all

        class Broken(toy.Encoder):
            def encode(self, model: nn.Module, inputs: Any) -> Tensor:
                rows = super().encode(model, inputs)
                if INDEX == 1 and float(inputs["x"].max()) > 1:
                    rows = torch.cat([rows[:1], rows[1:] * torch.nan])  # the second text of a chunk
                return rows

        batch = plain.item_ids[batch_rows(np.flatnonzero(plain.shows_image), 0, toy.SHARED)]
        expected = ", ".join(str(batch[place]) for place in (5, 7))  # chunks of two, this process has the last two of four
        with pytest.raises(TrainingError, match=rf"step 0: loss nan .*\(items {expected}\)") as stopped:
            toy.run_shared(folder / "broken", team, Broken())
        assert stopped.value.known_to_all
        with pytest.raises(ConfigError, match=r"in chunks of micro_batch_size 3 .*multiple of 2 chunks.*\(got 3\)") as odd:
            toy.run(folder / "odd", changed(toy.SHARED, micro_batch_size=3), team=team)
        assert odd.value.known_to_all
        if INDEX == 1:
            os._exit(0)  # gone without a word
        with pytest.raises(ProcessLostError, match="process 0 of 2: another process of this launch is gone"):
            toy.run_shared(folder / "lost", team, toy.Encoder())
        os._exit(0)  # the group cannot be closed without the other
