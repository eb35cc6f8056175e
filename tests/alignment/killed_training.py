"""A training that is killed.  Run by test_training.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.alignment.toy import Encoder, run

torch.set_num_threads(1)
run(Path(sys.argv[1]), encoder=Encoder(delay_seconds=0.3))
