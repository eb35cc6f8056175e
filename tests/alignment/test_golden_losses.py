"""The first five losses of an adapter's training: a change that moves them is a change of the method, not of the code alone.

They were recorded before MoDA's gates were computed in `gates.py`.  The training is in float64 and without dropout, so that
the last bits of the float32 initial weights, and of the images, are all that may differ between processors.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.alignment.toy import LORA, MODA, TRAINING, run
from tests.sections import changed
from tests.tolerances import up_to_rounding

GOLDEN = {
    "lora": (LORA, [2.555303250552704, 1.7320313725048175, 1.7681315259807893, 2.2024102587701724, 1.5545433448858976]),
    "moda": (MODA, [2.555303250552704, 1.7372964429404656, 1.7349692932773098, 2.2620520486138953, 1.6433470319171366]),
    "onehot": (
        changed(MODA, gate="onehot"),
        [2.555303250552704, 1.7347465173716714, 1.726585436949455, 2.105165980380313, 1.6216233387644667],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_first_losses(tmp_path: Path, name: str) -> None:
    adapter, losses = GOLDEN[name]
    training = changed(TRAINING, num_steps=5, log_every=1, warmup_steps=0)
    _, curve = run(tmp_path, training, adapter=changed(adapter, lora_dropout=0.0), dtype=torch.float64)
    got, expected = (torch.tensor(values, dtype=torch.float64) for values in ([record.loss for record in curve], losses))
    torch.testing.assert_close(got, expected, **up_to_rounding(expected, torch.float32))
