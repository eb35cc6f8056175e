"""Read the gate values of a saved adapter without torch, which the report does not need."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sda_core.artifacts import read_json
from sda_core.errors import ArtifactError
from sda_core.report.model import GateMap

_ADVICE = "run `dvc repro` to train it again"


def gate_map(variant: str, folder: Path) -> GateMap | None:
    """The gate values, ``softmax(W_g Emb_m)``, averaged over the adapted layers of each block.

    Args:
        variant: name of the variant.
        folder: folder written by ``adapters.save``.

    Returns:
        None if the gate has no parameters (one expert, ``onehot``, ``uniform``).

    Raises:
        ArtifactError: a file is missing or damaged, or the gate is learned by another formula.
    """
    config, path = read_json(folder / "adapter_config.json", "adapter configuration"), folder / "adapter_model.safetensors"
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(str(path), f"is not a readable safetensors file ({error})", _ADVICE) from None
    by_block: dict[int, list[np.ndarray]] = {}
    for name in sorted(weights):
        layer, _, kind = name.rpartition(".")
        if kind != "moda_gate":
            continue
        if config.get("gate") != "modality":
            raise ArtifactError(str(path), f"its gate {config.get('gate')!r} has no formula in gate_map", "add one there")
        if f"{layer}.moda_embedding" not in weights:
            raise ArtifactError(str(path), f"{layer} has a gate and no modality embeddings", _ADVICE)
        logits_ME = np.einsum("md,ed->me", weights[f"{layer}.moda_embedding"], weights[name]).astype(np.float64)
        mass_ME = np.exp(logits_ME - logits_ME.max(axis=1, keepdims=True))
        number = re.search(r"\.(\d+)\.", layer)
        by_block.setdefault(int(number[1]) if number else 0, []).append(mass_ME / mass_ME.sum(axis=1, keepdims=True))
    if not by_block or next(iter(by_block.values()))[0].shape[1] < 2:
        return None
    blocks = sorted(by_block)
    mass = {block: np.mean(by_block[block], axis=0) for block in blocks}
    every_ME = [mass_ME for found in by_block.values() for mass_ME in found]
    return GateMap(
        variant=variant,
        blocks=tuple(blocks),
        modalities=tuple(str(name) for name in config.get("modalities", ())),
        mass=tuple(tuple(tuple(float(value) for value in row) for row in mass[block]) for block in blocks),
        num_layers=len(every_ME),
        largest_difference=float(max((m.max(axis=0) - m.min(axis=0)).max() for m in every_ME)),
    )
