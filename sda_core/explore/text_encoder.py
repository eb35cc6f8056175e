"""Embed a typed text with the model that made a variant's item vectors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sda_core import backbones
from sda_core.adapters.saving import load
from sda_core.artifacts import Workspace
from sda_core.data.prompts import prompt_hash, text_prompt
from sda_core.embeddings.table import read_metadata
from sda_core.errors import ArtifactError, ConfigError
from sda_core.fingerprint import fingerprint
from sda_core.params import ItemsParams, Params
from sda_core.runtime import prepare_torch

_COMPARED = ("kind", "name", "revision", "pooling", "max_text_tokens")


class TextEncoder:
    """The backbone of a run with one variant's adapter, ready to embed texts.

    Args:
        workspace: paths of the run.
        params: params of the run; backbone, prompts, and whether the adapter is merged.
        variant: the variant with whose vectors the text will be compared.

    Raises:
        ConfigError: the variant's vectors were not made by a model of this project, or the adapter is missing.
        ArtifactError: the vectors are missing, or were made with another backbone, adapter or prompt than the current ones.
    """

    def __init__(self, workspace: Workspace, params: Params, variant: str) -> None:
        path = workspace.embeddings(variant)
        if not path.is_file():
            raise ArtifactError(str(path), "embeddings table is missing", "run `dvc repro` to make it")
        described = read_metadata(path)
        if "backbone_kind" not in described or "control" in described:
            problem = f"no model of this project made the vectors of {variant!r}, so a text cannot be embedded for them"
            raise ConfigError("--variant", problem, "name zero_shot or a variant with an adapter")
        adapter = workspace.adapter(variant) if described.get("adapter_hash") else None
        if adapter is not None and not adapter.is_dir():
            raise ArtifactError(str(adapter), "adapter is missing", "run `dvc repro` to train it")
        if adapter is not None and fingerprint(adapter) != described["adapter_hash"]:
            raise _outdated(path, "with another adapter")
        if prompt_hash(params.items) != described.get("prompt_hash"):
            raise _outdated(path, "with other prompts")
        self._items_params: ItemsParams = params.items
        self._device = prepare_torch(params.runtime)
        self._backbone = backbones.build(params.backbone, self._device)
        if _differs(self._backbone.info.metadata(), described):
            raise _outdated(path, "by another backbone")
        self._model, self._modality_context = load(self._backbone.model, adapter, merge=params.export_embeddings.merge)
        self._model.eval()

    def encode(self, text: str) -> np.ndarray:
        """The vector of a text used as an item's title in the prompt: ``(D,)`` float32, not normalised.

        Raises:
            ConfigError: the text is empty, or not Unicode.
        """
        if not text.strip():
            raise ConfigError("TEXT", "is empty", "type what to look for, for example 'striped blue shirt'")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # Python's form of bytes that the terminal's encoding lacks
            raise ConfigError("TEXT", f"{text!r} is not UTF-8 text", "type it in a terminal that uses UTF-8")
        inputs = self._backbone.text_inputs([text_prompt({"title": text}, self._items_params)])
        moved = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        with torch.inference_mode(), self._modality_context("text"):
            return self._backbone.encode(self._model, moved)[0].to("cpu", torch.float32).numpy()


def _differs(present: Mapping[str, str], described: Mapping[str, str]) -> bool:
    names = [f"backbone_{name}" for name in _COMPARED]
    return [present.get(name) for name in names] != [described.get(name) for name in names]


def _outdated(path: object, how: str) -> ArtifactError:
    return ArtifactError(str(path), f"these vectors were made {how} than the project has now", "run `dvc repro`")
