"""tests/ mirrors sda_core: a module's tests stand in the file of its name, or in the file or folder that is named here."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
# Modules, or packages, whose tests stand elsewhere.
ELSEWHERE = {
    "_peft_hook": "adapters/test_peft_hook.py",
    "adapters/card": "adapters/test_model.py",
    "adapters/saving": "adapters/test_merging.py",
    "adapters/moda": "adapters",
    "alignment/sharding": "alignment/test_processes.py",
    "alignment/item_blocks": "alignment/test_base_vectors.py",
    "artifacts": "test_storage.py",
    "backbones": "backbones/test_families.py",
    "cli/app": "cli/test_output.py",
    "cli/catalogue": "cli/test_recommend.py",
    "cli/check_adapter": "stages/test_train_adapter.py",
    "cli/comparison": "cli/test_diff.py",
    "cli/explore": "explore/test_commands.py",
    "cli/export": "cli/test_full_disk.py",
    "cli/extra": "test_package.py",
    "cli/import_hm": "exchange/test_hm.py",
    "cli/init": "test_package.py",
    "cli/neighbors": "cli/test_recommend.py",
    "cli/noise": "cli/test_diff_noise.py",
    "cli/process": "cli/test_costs.py",
    "cli/project": "test_package.py",
    "cli/revisions": "cli/test_diff.py",
    "cli/search": "explore/test_commands.py",
    "cli/scripts": "experiments/test_runner.py",
    "cli/stage": "cli/test_errors.py",
    "cli/verify": "test_verification.py",
    "checkpoint": "recommenders/test_fit.py",
    "data/demo": "data/test_demo.py",
    "data/identifiers": "data/test_amazon.py",
    "data/junk": "data/test_cleaning.py",
    "data/metadata_values": "data/test_amazon.py",
    "dropped_values": "data/test_prices.py",
    "errors": "cli/test_errors.py",
    "exchange": "exchange/test_exports.py",
    "fetch": "fetch/test_download.py",
    "fingerprint": "test_index.py",
    "item_source": "test_items.py",
    "item_vectors": "embeddings/test_table.py",
    "log": "cli/test_output.py",
    "losses/twins": "losses/test_build.py",
    "modalities": "alignment/test_inputs.py",
    "ranking/places": "recommenders/test_position.py",
    "recommenders": "recommenders/test_contract.py",
    "report": "report/test_vectors.py",
    "seed": "data/test_filtering.py",
    "sources": "test_architecture.py",
    "steps/evaluate": "stages/test_evaluate.py",
    "steps/export_embeddings": "stages/test_import_embeddings.py",
    "steps/train_adapter": "stages/test_train_adapter.py",
    "steps/train_recommender": "stages/test_train_recommender.py",
    "traits": "recommenders/test_contract.py",
    "variants": "test_params.py",
}


def test_every_module_has_its_tests(repository: Path) -> None:
    for file in sorted((repository / "sda_core").rglob("*.py")):
        module = file.relative_to(repository / "sda_core").with_suffix("")
        if module.name in ("__init__", "__main__"):
            continue
        places = [TESTS / module.parent / f"test_{module.name.lstrip('_')}.py"]
        places += [TESTS / ELSEWHERE[name] for name in (str(module), str(module.parent)) if name in ELSEWHERE]
        assert any(place.exists() for place in places), f"{module} has no {places[0].relative_to(TESTS)}; name its tests here"


def test_the_table_is_true(repository: Path) -> None:
    for name, file in ELSEWHERE.items():
        assert (TESTS / file).exists(), file
        assert (repository / "sda_core" / name).is_dir() or (repository / "sda_core" / f"{name}.py").is_file(), name
