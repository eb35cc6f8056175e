"""Several adapters, some of them merged: merging changes no output, and PEFT's reports name MODA with the right numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sda_core.adapters import MoDAConfig, MoDALinear, base_model, merge_modality, merged_modality, modality, unmerge_modality
from sda_core.adapters.moda import PEFT_TYPE
from sda_core.errors import TrainingError

Make = Callable[..., peft.PeftModel]
NAMES = ["default", "second", "third"]
ADDITIONALLY = "ignore:Already following adapters were merged:UserWarning"
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of at most 12 products, three blocks deep


def batch() -> Tensor:
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def several(make_stack: Make) -> Callable[..., peft.PeftModel]:
    """Three active adapters: of other ranks, gates, orders of the modalities, and layers."""

    def make(active: list[str] = NAMES) -> peft.PeftModel:
        model = make_stack().eval()
        model.add_adapter(
            "second", MoDAConfig(r=4, num_experts=2, modalities=["text", "image"], target_modules=["up"], lora_dropout=0.0)
        )
        model.add_adapter("third", MoDAConfig(gate="uniform", target_modules=["down"], lora_dropout=0.0))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "moda_" in name and not name.endswith("default"):
                nn.init.normal_(parameter, std=0.3)
        model.base_model.set_adapter(list(active))
        return model

    return make


def output(model: nn.Module, name: str | list[int] = "image") -> Tensor:
    with modality(model, name), torch.no_grad():
        return model(batch())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters() if "base_layer" in name}


def assert_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = weights(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# ---------------------------------------------------------------------------------------- part of several
@pytest.mark.filterwarnings(ADDITIONALLY)
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("merged", [["default"], ["second"], ["third"], ["third", "default"], ["default", "second"], NAMES])
def test_merging_some_of_the_active_adapters_changes_no_output(
    several: Callable[..., peft.PeftModel], merged: list[str], safe_merge: bool
) -> None:
    model = several()
    before, kept = output(model), weights(model)
    for name in NAMES:  # each adapter counts in what is compared
        others = [other for other in NAMES if other != name]
        assert not torch.allclose(output(several(others)), before)
    with modality(model, "image"):
        model.merge_adapter(adapter_names=merged, safe_merge=safe_merge)
    torch.testing.assert_close(output(model), before, **CLOSE)
    assert model.base_model.model.blocks[0].up.merged_adapters == [name for name in merged if name != "third"]
    rest = [name for name in NAMES if name not in merged]
    if rest:
        with modality(model, "image"):
            model.merge_adapter(adapter_names=rest)  # one after the other
    torch.testing.assert_close(output(model), before, **CLOSE)
    model.unmerge_adapter()
    assert_weights(model, kept)
    assert torch.equal(output(model), before)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    active=st.lists(st.sampled_from(NAMES), unique=True, min_size=1),
    merges=st.lists(st.lists(st.sampled_from(NAMES), min_size=1), max_size=3),
    name=st.sampled_from(["image", "text"]),
)
@pytest.mark.filterwarnings(ADDITIONALLY, "ignore:All adapters are already merged:UserWarning")
def test_a_model_computes_its_active_and_its_merged_adapters(
    several: Callable[..., peft.PeftModel], active: list[str], merges: list[list[str]], name: str
) -> None:
    """Whatever is active, and in whatever order and number of calls adapters are merged; one that is not active counts too."""
    model = several(active)
    counted = [one for one in NAMES if one in active or any(one in names for names in merges)]
    for names in merges:
        with modality(model, name):
            model.merge_adapter(adapter_names=names)
    torch.testing.assert_close(output(model, name), output(several(counted), name), **CLOSE)


@pytest.mark.filterwarnings(ADDITIONALLY)
def test_two_merges_are_one_merge_to_the_bit() -> None:
    """In bfloat16 as well: the sum is rounded once, not once a merge."""
    torch.manual_seed(0)
    config = MoDAConfig(target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)).bfloat16(), config)
    model.add_adapter("other", config)
    layer = model.base_model.model[0]
    for parameter in layer.moda_B.values():
        nn.init.normal_(parameter)
    before = layer.base_layer.weight.clone()
    with modality(model, "image"):
        model.merge_adapter(adapter_names=["default", "other"])
        together = layer.base_layer.weight.clone()
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight, before)
        model.merge_adapter(adapter_names=["default"])
        model.merge_adapter(adapter_names=["other"])
    assert torch.equal(layer.base_layer.weight, together)
    exact = before.float() + layer.get_delta_weight("default", "image") + layer.get_delta_weight("other", "image")
    torch.testing.assert_close(together.float(), exact, rtol=2**-8, atol=0)  # half a unit of bfloat16, with room for the sum


def test_an_adapter_beside_a_merged_one_is_trained(several: Callable[..., peft.PeftModel]) -> None:
    """Its gradients are those of the unmerged model; the merged one has none."""
    found = []
    for merged in ([], ["default"]):
        model = several().train()
        with modality(model, "image"):
            if merged:
                model.merge_adapter(adapter_names=merged)
            model(batch()).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, beside = found
    assert {name for name in plain if not name.endswith("default")} == set(beside)
    for name, gradient in beside.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-10, atol=1e-10)


def test_each_merged_adapter_has_its_own_name_for_an_id(several: Callable[..., peft.PeftModel]) -> None:
    """Id 0 is image in one adapter and text in the other, so that no name fits a merge by ids."""
    model = several(["default", "second"])
    before = output(model, [0, 0, 0])
    with modality(model, [0, 0, 0]):
        model.merge_adapter()
    torch.testing.assert_close(output(model, [0, 0, 0]), before, **CLOSE)
    with pytest.raises(TrainingError, match="merged for 'text', but the pass is for 'image'"):
        output(model, "image")
    with pytest.raises(TrainingError, match="merged for 'image', but the pass is for 'text'"):
        output(model, "text")


def test_a_merge_belongs_to_one_modality_for_all_adapters(several: Callable[..., peft.PeftModel]) -> None:
    model = several()
    expected = output(model, "image")
    with modality(model, "image"):
        model.merge_adapter(adapter_names=["default"])
    with pytest.raises(TrainingError, match="put the pass into `with modality"):
        model(batch())  # the second is not merged, so it has to know
    with pytest.raises(TrainingError, match="merged for 'image', but the pass is for 'text'"):
        output(model, "text")
    with (
        modality(model, "text"),
        pytest.warns(UserWarning, match="Already following"),
        pytest.raises(TrainingError, match="merged for 'image', but"),
    ):
        model.merge_adapter(adapter_names=["second"])
    with pytest.warns(UserWarning, match="Already following"):
        model.merge_adapter(adapter_names=["third"])  # treats all alike
    torch.testing.assert_close(output(model, "image"), expected, **CLOSE)


# ---------------------------------------------------------------------- what else PEFT does while merged
def test_choosing_other_adapters_unmerges(several: Callable[..., peft.PeftModel]) -> None:
    model = several()
    kept = weights(model)
    with modality(model, "image"):
        model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.base_model.set_adapter(["second", "third"])
    assert_weights(model, kept)
    assert torch.equal(output(model), output(several(["second", "third"])))


def test_disabled_adapters_do_not_count_and_come_back_merged(several: Callable[..., peft.PeftModel]) -> None:
    model = several(["second"])
    with modality(model, "image"):
        model.merge_adapter(adapter_names=["default"])  # merged and not active: only the merge makes it count
    expected, merged = output(model), weights(model)
    base = copy.deepcopy(model).unload()
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(model(batch()), base(batch()))
            assert model.get_model_status().merged_adapters == ["default"]
        assert_weights(model, merged)
        assert torch.equal(output(model), expected)
        with base_model(model):
            assert torch.equal(model(batch()), base(batch()))
        assert torch.equal(output(model), expected)
        assert_weights(model, merged)
    with base_model(model):
        model(batch())
    model.unmerge_adapter()
    assert torch.equal(output(model), output(several(["second"])))


def test_merge_and_unload_of_several(several: Callable[..., peft.PeftModel]) -> None:
    expected = output(several())
    for first in ([], ["second"], ["third", "default"]):
        model = several()
        with modality(model, "image"):
            if first:
                model.merge_adapter(adapter_names=first)
            with pytest.warns(UserWarning, match="lready") if first else pytest.MonkeyPatch.context():
                plain = model.merge_and_unload(safe_merge=True)
        assert not any(isinstance(module, MoDALinear) for module in plain.modules())
        torch.testing.assert_close(plain(batch()), expected, **CLOSE)
    model = several()
    with modality(model, "image"), pytest.raises(TrainingError, match="second, third is active and would be lost"):
        model.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(output(model), expected, **CLOSE)
    model.base_model.set_adapter(["default"])
    with modality(model, "image"):
        plain = model.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(plain(batch()), output(several(["default"])), **CLOSE)


def test_unload_gives_the_weights_back_to_the_bit(several: Callable[..., peft.PeftModel]) -> None:
    model = several()
    base = copy.deepcopy(model).unload()
    with modality(model, "text"):
        model.merge_adapter(adapter_names=["second", "default"])
    plain = model.unload()
    expected = dict(base.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in plain.named_parameters())


def test_a_merged_adapter_is_neither_deleted_nor_replaced(several: Callable[..., peft.PeftModel]) -> None:
    model = several()
    with modality(model, "image"):
        model.merge_adapter(adapter_names=["default"])
    expected = output(model)
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")
    layer = model.base_model.model.blocks[0].up
    with pytest.raises(TrainingError, match=r"'default': is merged and cannot be deleted; call model\.unmerge_adapter"):
        layer.delete_adapter("default")
    with pytest.raises(TrainingError, match="'default': is merged and cannot be replaced"):
        layer.update_layer("default", MoDAConfig(target_modules=["up"]))
    assert torch.equal(output(model), expected)
    model.delete_adapter("second")
    torch.testing.assert_close(output(model), output(several(["default", "third"])), **CLOSE)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("fourth", MoDAConfig(target_modules=["up", "down"]))  # changes nothing before it is chosen
    assert model.get_model_status().merged_adapters == []
    torch.testing.assert_close(output(model), output(several(["default", "third"])), **CLOSE)


def test_unknown_adapters_are_not_merged(several: Callable[..., peft.PeftModel]) -> None:
    """PEFT does nothing then, and says nothing."""
    model = several()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with (
            modality(model, "image"),
            pytest.raises(TrainingError, match=r"no adapter 'forth' \(there are default, second, third\)"),
        ):
            merge(adapter_names=["forth"])
    with modality(model, "image"), pytest.raises(TypeError, match="should be a list of strings"):
        model.base_model.model.blocks[0].up.merge(adapter_names="default")  # type: ignore[arg-type]


def test_a_refused_merge_changes_nothing(several: Callable[..., peft.PeftModel]) -> None:
    model = several()
    kept, layer = weights(model), model.base_model.model.blocks[2].up
    good = layer.moda_B["second"].detach().clone()
    with modality(model, "image"):
        model.merge_adapter(adapter_names=["default"])
    merged, expected = weights(model), output(model)
    with torch.no_grad():
        layer.moda_B["second"][0, 0] = torch.inf
    with (
        modality(model, "image"),
        pytest.warns(UserWarning, match="Already following"),
        pytest.raises(TrainingError, match="adapter default, second gives weights that are not finite"),
    ):
        layer.merge(safe_merge=True, adapter_names=["second"])
    assert_weights(model, merged)
    with torch.no_grad():
        layer.moda_B["second"].copy_(good)
    assert torch.equal(output(model), expected)
    model.unmerge_adapter()
    assert_weights(model, kept)
    with torch.no_grad():
        layer.moda_B["second"][0, 0] = torch.inf
    with pytest.raises(TrainingError, match="not finite"):
        merge_modality(model, "image", safe_merge=True)
    assert model.get_model_status().merged_adapters == []  # all layers or none
    assert_weights(model, kept)


def test_nothing_is_switched_while_layers_stand_aside(several: Callable[..., peft.PeftModel]) -> None:
    model = several()
    expected = output(model)
    config = MoDAConfig(target_modules=["up"])
    with merged_modality(model, "image"):
        torch.testing.assert_close(model(batch()), expected, **CLOSE)
        for change in (
            lambda: model.base_model.set_adapter("second"),
            lambda: model.add_adapter("fourth", config),
            lambda: model.delete_adapter("second"),
            lambda: model.base_model.disable_adapter_layers(),
            lambda: model.base_model.enable_adapter_layers(),
            lambda: model.merge_adapter(),
            lambda: model.merge_adapter(adapter_names=["default"]),
            lambda: model.unmerge_adapter(),
            lambda: model.merge_and_unload(),
            lambda: model.merge_and_unload(adapter_names=["default"]),
            lambda: model.unload(),
            lambda: base_model(model).__enter__(),
        ):
            with pytest.raises(TrainingError, match=r"does not work inside `with merged_modality\(...\)`"):
                change()
        torch.testing.assert_close(model(batch()), expected, **CLOSE)
    assert sorted(model.peft_config) == sorted(NAMES)
    assert torch.equal(output(model), expected)
    with base_model(model):
        assert not torch.allclose(model(batch()), expected)


def test_weighted_sums_are_lora_s_alone(several: Callable[..., peft.PeftModel]) -> None:
    """Experts of different gates have no common matrix, so there is no such method, as in PEFT's other methods."""
    with pytest.raises(AttributeError, match="add_weighted_adapter"):
        several().add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")


# ------------------------------------------------------------------------------------ other kinds of adapters
def test_lora_and_moda_are_not_mixed_by_accident(make_stack: Make) -> None:
    lora, moda = peft.LoraConfig(target_modules=["up"]), MoDAConfig(target_modules=["up"])
    model = make_stack()
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", lora)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        peft.get_peft_model(copy.deepcopy(model).unload(), lora).add_adapter("other", moda)
    with pytest.raises(ValueError, match="`peft_type` 'MODA' is not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(copy.deepcopy(model).unload(), moda, mixed=True)


# --------------------------------------------------------------------------------------------- what PEFT tells
def both_kinds() -> list[peft.PeftModel]:
    """LoRA, and MoDA of one expert, which has the same parameters; each with a second adapter on one of two layers."""
    found = []
    for kind, options in ((peft.LoraConfig, {}), (MoDAConfig, {"num_experts": 1})):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        model = peft.get_peft_model(base, kind(r=4, target_modules=["0", "2"], **options))
        model.add_adapter("other", kind(r=2, target_modules=["0"], **options))
        found.append(model)
    return found


STEPS: dict[str, Callable[[peft.PeftModel], Any]] = {
    "fresh": lambda model: None,
    "the other chosen": lambda model: model.set_adapter("other"),
    "both chosen": lambda model: model.base_model.set_adapter(["default", "other"]),
    "none trained": lambda model: model.set_adapter("default", inference_mode=True),
    "trained by hand": lambda model: model.set_requires_grad("other"),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "one of two merged": lambda model: (
        model.base_model.set_adapter(["default", "other"]),
        model.merge_adapter(adapter_names=["other"]),
    ),
    "a layer merged": lambda model: model.base_model.model[0].merge(),
    "a layer disabled": lambda model: model.base_model.model[0].enable_adapters(enabled=False),
    "unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "deleted": lambda model: model.delete_adapter("other"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_status_is_lora_s_but_for_the_names(step: str) -> None:
    lora, moda = both_kinds()
    for model in (lora, moda):
        STEPS[step](model)
    expected, found = asdict(lora.get_model_status()), asdict(moda.get_model_status())
    assert found.pop("adapter_model_type") == "MoDAModel"
    assert expected.pop("adapter_model_type") == "LoraModel"
    assert found["peft_types"] == dict.fromkeys(expected["peft_types"], "MODA")
    assert set(expected.pop("peft_types").values()) == {"LORA"}
    del found["peft_types"]
    assert found == expected
    for got, wanted in zip(moda.get_layer_status(), lora.get_layer_status(), strict=True):
        assert (got.module_type, wanted.module_type) == ("moda.MoDALinear", "lora.Linear")
        got.module_type = wanted.module_type
        assert got == wanted
    assert moda.get_nb_trainable_parameters() == lora.get_nb_trainable_parameters()


def test_a_status_counts_every_parameter_of_a_gate(several: Callable[..., peft.PeftModel]) -> None:
    model = several(["default", "second"])
    status = model.get_model_status()
    default = 3 * ((8 * 6 + 12 * 8) + (8 * 12 + 6 * 8) + 2 * (2 * 5 + 4 * 5))
    second = 3 * ((4 * 6 + 12 * 4) + (2 * 64 + 2 * 64))
    third = 3 * (8 * 12 + 6 * 8)
    base = 3 * (6 * 12 + 12 + 12 * 6 + 6)
    assert status.trainable_params == default + second
    assert status.total_params == base + default + second + third
    assert status.num_adapter_layers == 6
    assert status.peft_types == dict.fromkeys(NAMES, "MODA")
    assert status.enabled is True
    assert status.active_adapters == ["default", "second"]
    assert status.available_adapters == NAMES
    assert status.requires_grad == {"default": True, "second": True, "third": False}
    assert status.devices == {name: ["cpu"] for name in NAMES}
    assert status.merged_adapters == []
    with modality(model, "image"):
        model.merge_adapter(adapter_names=["default", "third"])
    assert status.merged_adapters == []  # what was told stays what it was
    assert model.get_model_status().merged_adapters == ["default", "third"]
    assert {tuple(layer.merged_adapters) for layer in model.get_layer_status()} == {("default",), ("default", "third")}
    unmerge_modality(model)
    assert model.get_model_status().merged_adapters == []


def test_the_type_is_the_text_moda(make_stack: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_stack()
    config = model.peft_config["default"]
    assert model.peft_type == config.peft_type == MoDAConfig().peft_type == PEFT_TYPE == "MODA"
    assert PEFT_TYPE.value == "MODA"
    assert str(PEFT_TYPE).endswith(".MODA")
    assert hash(PEFT_TYPE) == hash("MODA")
    assert json.dumps(PEFT_TYPE) == '"MODA"'
    for again in (copy.copy(config), copy.deepcopy(config), MoDAConfig(**config.to_dict())):
        assert again == config
    config.save_pretrained(tmp_path)
    saved = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(saved, MoDAConfig)
    assert saved == config
    assert saved.peft_type is PEFT_TYPE
    assert peft.get_peft_config(json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))) == config
    model.print_trainable_parameters()
    trainable = 3 * ((8 * 6 + 12 * 8) + (8 * 12 + 6 * 8) + 2 * (2 * 5 + 4 * 5))
    everything = trainable + 3 * (6 * 12 + 12 + 12 * 6 + 6)
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,} || all params: {everything:,} || ")
    assert repr(model).count("moda.MoDALinear(") == 2  # of each block; the three blocks are alike
    assert "MoDAModel(" in repr(model)
