"""PEFT knows MoDA after ``import sda_core``, in either order, and ``import sda_core`` alone stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from sda_core.adapters import MoDAConfig, modality
from tests.tolerances import assert_equal_up_to_rounding

LOAD = """
import sys
{first}
assert "torch" not in sys.modules or "peft" in sys.modules, "sda_core imported torch"
{second}
import torch
from torch import nn
from peft import PeftModel
base = nn.Sequential(nn.Linear(3, 3))
base.load_state_dict(torch.load(sys.argv[1] + "/base.pt", weights_only=True))
model = PeftModel.from_pretrained(base, sys.argv[1])
from sda_core.adapters import modality
with modality(model, "text"):
    print(model(torch.ones(1, 3)).tolist())
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING["MODA"].__module__.startswith("sda_core.")
assert not any("_peft_hook" in type(finder).__module__ for finder in sys.meta_path)
assert "_peft_hook" not in type(sys.modules["peft"].__loader__).__module__
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # others ask whether PEFT is there long before anybody imports it
        ("import importlib.util, sda_core; importlib.util.find_spec('peft')", "from peft.tuners.lora import LoraConfig"),
        ("import peft", "import sda_core"),
    ],
)
def test_either_order(tmp_path: Path, repository: Path, first: str, second: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 3))
    torch.save(base.state_dict(), tmp_path / "base.pt")
    model = get_peft_model(base, MoDAConfig(target_modules=["0"])).eval()
    assert isinstance(model, PeftModel)
    nn.init.normal_(model.base_model.model[0].moda_B["default"])
    model.save_pretrained(tmp_path)
    with modality(model, "text"):
        expected = model(torch.ones(1, 3)).detach()
    script = LOAD.format(first=first, second=second)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_equal_up_to_rounding(torch.tensor(json.loads(done.stdout)), expected)
