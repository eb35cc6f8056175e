"""MoDA as a PEFT method: what a PEFT user does with an adapter, done with this one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sda_core.adapters import (
    MoDAConfig,
    MoDALinear,
    MoDAModel,
    adapter_is_zero,
    gate_values,
    load,
    merge_modality,
    modality,
    save,
    unmerge_modality,
)
from sda_core.errors import ArtifactError, ConfigError, TrainingError

Make = Callable[..., peft.PeftModel]


def batch() -> Tensor:
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def outputs(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name in ("image", "text"):
        with modality(model, name), torch.no_grad():
            found[name] = model(batch())
    assert not torch.allclose(found["image"], found["text"])
    return found


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def bare(model: peft.PeftModel) -> nn.Module:
    """A fresh copy of the base model."""
    return copy.deepcopy(model).unload()


# ----------------------------------------------------------------------------------------- save and load
def test_saved_and_loaded_is_the_same_to_the_bit(make_stack: Make, tmp_path: Path) -> None:
    model = make_stack().eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare(model), tmp_path)
    assert isinstance(again.base_model, MoDAModel)
    assert_equal(outputs(again), outputs(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, MoDAConfig)
    written = {key: value for key, value in config.to_dict().items() if key not in {"auto_mapping", "inference_mode"}}
    assert written.items() <= model.peft_config["default"].to_dict().items()
    assert {"r", "lora_alpha", "num_experts", "expert_rank", "gate", "modalities", "modality_dim"} <= written.keys()


def test_the_files_hold_what_they_should(make_stack: Make, tmp_path: Path) -> None:
    model = make_stack(depth=1)
    save(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "MODA"
    assert config["target_modules"] == ["down", "up"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = [f"base_model.model.blocks.0.{name}" for name in ("down", "up")]
    assert sorted(tensors) == sorted(f"{layer}.moda_{part}" for layer in layers for part in ("A", "B", "embedding", "gate"))
    save(model, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_further_ways_to_load(make_stack: Make, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = make_stack().eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare(model), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_equal(outputs(again.eval()), outputs(model))
    assert sum(parameter.requires_grad for parameter in again.parameters()) == 3 * 2 * 4


def test_load_says_what_is_wrong(make_stack: Make, tmp_path: Path) -> None:
    model = make_stack().eval()
    with pytest.raises(ArtifactError, match=r"adapter_config\.json: adapter is missing"):
        load(bare(model), tmp_path)
    save(model, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-20])
    with pytest.raises(ArtifactError, match="cannot be put on this Stack"):
        load(bare(model), tmp_path / "adapter")
    weights.write_bytes(whole)
    with pytest.raises(ArtifactError, match="cannot be put on this Sequential"):
        load(nn.Sequential(nn.Linear(2, 2)), tmp_path / "adapter")
    wider = nn.ModuleDict({"up": nn.Linear(3, 4), "down": nn.Linear(4, 3)})
    with pytest.raises(ArtifactError, match="cannot be put on this ModuleDict"):
        load(wider, tmp_path / "adapter")
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("0.up.moda_A")}, weights)
    with pytest.raises(ArtifactError, match=r"Found missing adapter keys"):
        load(bare(model), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"r": 8', '"r": 7'), encoding="utf-8")
    with pytest.raises(ConfigError, match="7 cannot be split among 4 experts"):
        load(bare(model), tmp_path / "adapter")


def test_load_gives_the_model_and_its_context(make_stack: Make, tmp_path: Path) -> None:
    model = make_stack().eval()
    save(model, tmp_path)
    loaded, context = load(bare(model), tmp_path)
    assert not loaded.training
    for name, expected in outputs(model).items():
        with context(name):
            assert torch.equal(loaded(batch()), expected)
    base = bare(model)
    plain, context = load(base, None)
    with context("image"):
        assert torch.equal(plain(batch()), base(batch()))


# --------------------------------------------------------------------------------------------------- merge
@pytest.mark.parametrize("gate", ["modality", "onehot"])
def test_merged_is_unmerged_for_each_modality(make_stack: Make, gate: str) -> None:
    model = make_stack(gate=gate).eval()
    expected, weights = outputs(model), {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    for name in ("image", "text", "image"):
        merge_modality(model, name, safe_merge=True)
        torch.testing.assert_close(model(batch()), expected[name], rtol=1e-12, atol=1e-12)
        with modality(model, name):
            torch.testing.assert_close(model(batch()), expected[name], rtol=1e-12, atol=1e-12)
        other = {"image": "text", "text": "image"}[name]
        with modality(model, other), pytest.raises(TrainingError, match=f"merged for '{name}', but the pass is for '{other}'"):
            model(batch())
        with modality(model, [0, 1, 1]), pytest.raises(TrainingError, match="but the pass is for ids of 3 rows"):
            model(batch())
    unmerge_modality(model)
    unmerge_modality(model)
    assert all(torch.equal(parameter, weights[n]) for n, parameter in model.named_parameters() if n in weights)
    assert_equal(outputs(model), expected)


def test_unmerging_restores_bfloat16_weights_to_the_bit() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)).bfloat16(), MoDAConfig(target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].moda_B["default"])
    before = model.base_model.model[0].base_layer.weight.clone()
    delta = model.base_model.model[0].get_delta_weight("default", "image")
    merge_modality(model, "image")
    merged = model.base_model.model[0].base_layer.weight
    assert torch.equal(merged, (before.float() + delta).bfloat16())  # rounded once
    assert not torch.equal(merged, before)
    unmerge_modality(model)
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)


def test_pefts_own_merge_takes_the_open_modality(make_stack: Make) -> None:
    model = make_stack().eval()
    expected = outputs(model)
    with pytest.raises(TrainingError, match=r"call sda_core.adapters.merge_modality\(model, 'image'\)"):
        model.merge_adapter()
    assert not model.base_model.model.blocks[0].up.merged
    assert_equal(outputs(model), expected)
    with modality(model, [0, 1, 0]), pytest.raises(TrainingError, match="has a weight for each modality"):
        model.merge_adapter()
    with modality(model, "text"):
        model.merge_adapter()
    torch.testing.assert_close(model(batch()), expected["text"], rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    with modality(model, "text"):
        plain = model.merge_and_unload()
    assert not any(isinstance(module, MoDALinear) for module in plain.modules())
    torch.testing.assert_close(plain(batch()), expected["text"], rtol=1e-12, atol=1e-12)


def test_a_uniform_adapter_merges_like_any_lora(make_stack: Make) -> None:
    model = make_stack(gate="uniform").eval()
    expected = model(batch())
    model.merge_adapter()
    torch.testing.assert_close(model(batch()), expected, rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    with modality(model, "text"):  # merged for all of them
        torch.testing.assert_close(model(batch()), expected, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(batch()), expected, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_merged(make_stack: Make) -> None:
    model = make_stack()
    with torch.no_grad():
        model.base_model.model.blocks[2].down.moda_B["default"][0, 0] = torch.inf
    with pytest.raises(TrainingError, match="not finite"):
        merge_modality(model, "image", safe_merge=True)
    with pytest.raises(TrainingError, match="should be one of image, text"):
        merge_modality(make_stack(), "audio")
    with pytest.raises(TrainingError, match="has no MoDA layer"):
        merge_modality(nn.Linear(2, 2), "image")
    quantised = make_stack()
    layer = quantised.base_model.model.blocks[0].up
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TrainingError, match=r"torch\.int8 takes no sum"):
        merge_modality(quantised, "image")


# ------------------------------------------------------------------------------ disable, unload, several
def test_disabled_is_the_base_model(make_stack: Make) -> None:
    model = make_stack().eval()
    base = bare(model)
    expected = outputs(model)
    with model.disable_adapter():
        assert torch.equal(model(batch()), base(batch()))  # and no modality is needed
    assert_equal(outputs(model), expected)
    merge_modality(model, "image")
    with model.disable_adapter():
        assert torch.equal(model(batch()), base(batch()))
    assert torch.equal(model.unload()(batch()), base(batch()))


def test_only_the_adapter_is_trained(make_stack: Make) -> None:
    model = make_stack()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".moda_" in name for name in trainable)
    assert all(".moda_" not in name for name, p in model.named_parameters() if not p.requires_grad)


def test_several_adapters(make_stack: Make, tmp_path: Path) -> None:
    model = make_stack().eval()
    first = outputs(model)
    model.add_adapter(
        "other", MoDAConfig(target_modules=["up"], modalities=["text", "image", "audio"], num_experts=2, lora_dropout=0.0)
    )
    assert_equal(outputs(model), first)
    model.set_adapter("other")
    for name, parameter in model.named_parameters():
        if ".moda_" in name and name.endswith(".other"):
            assert parameter.requires_grad
            nn.init.normal_(parameter, std=0.3)
        else:
            assert not parameter.requires_grad
    second = outputs(model)
    assert not torch.allclose(second["image"], first["image"])
    with modality(model, "audio"):
        model(batch())
    model.set_adapter("default")
    assert_equal(outputs(model), first)
    with pytest.raises(TrainingError, match="should be one of image, text"):
        modality(model, "audio")

    model.base_model.set_adapter(["default", "other"])  # both at once: the sum of their changes, layer by layer
    layer = model.base_model.model.blocks[0].up
    with modality(model, "image"):
        both = layer(batch())
    delta = layer.get_delta_weight("default", "image") + layer.get_delta_weight("other", "image")
    torch.testing.assert_close(both, layer.base_layer(batch()) + batch() @ delta.T, rtol=1e-12, atol=1e-12)
    merge_modality(model, "image")
    torch.testing.assert_close(layer(batch()), both, rtol=1e-12, atol=1e-12)
    unmerge_modality(model)

    model.set_adapter("other")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare(model), tmp_path / "other", adapter_name="other")
    assert_equal(outputs(again), second)
    again.load_adapter(tmp_path, "default")
    again.set_adapter("default")
    assert_equal(outputs(again), first)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert_equal(outputs(model), first)
    assert sorted(gate_values(model, "default")) == sorted(name for name, m in model.named_modules() if isinstance(m, MoDALinear))


def test_injected_without_a_wrapper() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    peft.inject_adapter_in_model(MoDAConfig(target_modules=["0"], lora_dropout=0.0), model)
    nn.init.normal_(model[0].moda_B["default"])
    outputs(model)
    state = peft.get_peft_model_state_dict(model)
    assert sorted(state) == ["0.moda_A", "0.moda_B", "0.moda_embedding", "0.moda_gate"]
    assert set(peft.set_peft_model_state_dict(model, state).unexpected_keys) == set()


# --------------------------------------------------------------------------------------------------- errors
def test_targets_that_cannot_be_adapted() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1), "linear": nn.Linear(2, 2)})
    with pytest.raises(TrainingError, match=r"module conv: is a Conv1d, and MoDA adapts torch\.nn\.Linear only"):
        peft.get_peft_model(model, MoDAConfig(target_modules=["conv", "linear"]))
    with pytest.raises(ValueError, match="not found in the base model"):  # PEFT's own
        peft.get_peft_model(nn.ModuleDict({"linear": nn.Linear(2, 2)}), MoDAConfig(target_modules=["nowhere"]))
    with pytest.raises(ConfigError, match="target_modules: is empty"):
        peft.get_peft_model(nn.ModuleDict({"linear": nn.Linear(2, 2)}), MoDAConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"MoDAConfig\.r: should be at least 1 \(got 0\)"),
        ({"num_experts": 0}, "num_experts: should be at least 1"),
        ({"modality_dim": 0}, "modality_dim: should be at least 1"),
        ({"r": 6}, "6 cannot be split among 4 experts; make r a multiple of num_experts, or set expert_rank='full'"),
        ({"lora_alpha": 0}, "lora_alpha: should be positive"),
        ({"lora_dropout": 1.0}, r"lora_dropout: should be at least 0 and below 1 \(got 1\.0\)"),
        ({"gate": "router"}, r"gate: should be one of modality, onehot, uniform \(got 'router'\)"),
        ({"expert_rank": "half"}, "expert_rank: should be one of split, full"),
        ({"modalities": []}, "modalities: should be a list of different names"),
        ({"modalities": ["image", "image"]}, "modalities: should be a list of different names"),
        ({"gate": "onehot", "modalities": ["a", "b", "c"]}, "4 experts cannot be shared out among the modalities a, b, c"),
    ],
)
def test_configs_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoDAConfig(**options)


def test_config_details() -> None:
    assert MoDAConfig(r=6, expert_rank="full").rank_per_expert == 6
    assert MoDAConfig(r=8).rank_per_expert == 2
    assert MoDAConfig().depends_on_modality
    assert not MoDAConfig(gate="uniform").depends_on_modality
    assert not MoDAConfig(num_experts=1).depends_on_modality
    assert MoDAConfig(target_modules=["b", "a"]).target_modules == ["a", "b"]
    assert MoDAConfig(target_modules="x.*").target_modules == "x.*"


def test_zero_adapters_are_noticed(make_stack: Make) -> None:
    model = make_stack()
    assert not adapter_is_zero(model)
    for module in model.modules():
        if isinstance(module, MoDALinear):
            nn.init.zeros_(module.moda_B["default"])
    assert adapter_is_zero(model)
