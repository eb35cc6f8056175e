"""Compare the same adapters and losses on backbones of several architectures.

For every backbone and seed a workspace is made in experiments/runs/NAME/BACKBONE, in which the stages of the pipeline train
the adapters and compute the item vectors, and SASRec is trained on them.  Existing results are kept.  Table and plot are written
to experiments/results/families-NAME, which `sda report --experiments` shows.  A backbone is a section of the params, given as
NAME=FILE, such as the files in conf/backbone.  On a machine with enough memory:

    python -m experiments families --name published --backbone qwen2_5_vl=conf/backbone/qwen2_5_vl_7b.yaml \\
        --backbone qwen3_vl=conf/backbone/qwen3_vl_2b.yaml --backbone internvl=conf/backbone/internvl3_1b.yaml

Without --backbone: nano, and its relatives.  These are small checkpoints of other families, made by this script.  Their
language model has nano's weights (the families share Qwen2's architecture), so that they read text like nano, while the
family-specific parts (image tower, connection to the text, positions) are new and random.  So they can show whether adaptation
works in another architecture, but not how well that architecture processes images.  qwen2_5_vl is nano with a random tower, for
comparison.

    python -m experiments families --name relatives --seeds 1,2,3
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from ruamel.yaml import YAML
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer

from experiments.options import THREE_SEEDS, Changes, Name, Recommender, Seeds, Source, Variants
from experiments.study import (
    CUTOFF,
    check_names,
    difference,
    markdown_table,
    mean_and_interval,
    range_over_seeds,
    read_gains,
    write_results,
)
from experiments.workspaces import BASE, VARIANTS, Study, adapt, params_file, prepare, read_curve, train_on
from sda_core.cli.scripts import Names
from sda_core.errors import ConfigError
from sda_core.params import load_params
from sda_core.seed import derive

hf: Any = transformers  # its configurations accept more arguments than their signatures declare

NANO = Path(__file__).resolve().parents[1] / "sda_core" / "backbones" / "nano"
TOKEN_EMBEDDING = "embed_tokens.weight"
Parts = tuple[nn.Module, Any, Any]


def main(
    name: Name,
    source: Source = Path(),
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="Backbones; default: nano and its relatives.  Repeat it for more.", show_default=False
        ),
    ] = None,
    variants: Variants = Names(("lora", "sda")),
    recommender: Recommender = "sasrec",
    seeds: Seeds = THREE_SEEDS,
    changes: Changes = None,
) -> None:
    """Run what is missing, write table and plot."""
    check_names("--variants", variants, VARIANTS)
    params_file(source, "--source")
    folder = Path("experiments") / "runs" / name
    backbones = read_backbones(backbone) if backbone else relatives(folder / "checkpoints")
    study = Study(source.resolve(), folder, variants, seeds, changes or [])
    for seed in seeds:
        for arm, section in backbones.items():
            run(study, arm, section, recommender, seed)
    results = write_results(table(study, list(backbones), recommender), "families", name)
    plot(study, list(backbones), results / "plot.png")


def read_backbones(given: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Read sections of the params by name.

    Args:
        given: texts ``NAME=FILE``.

    Raises:
        ConfigError: a file does not exist, or a text has another form.
    """
    sections = {}
    for each in given:
        name, separator, path = each.partition("=")
        if not separator or not Path(path).is_file():
            raise ConfigError("--backbone", f"expected NAME=FILE with a backbone's section, as in conf/backbone (got {each!r})")
        sections[name] = YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))
    return sections


def run(study: Study, backbone: str, section: Mapping[str, Any], recommender: str, seed: int) -> None:
    """Make adapters, vectors and recommenders of one backbone and seed, unless they exist."""
    workspace = study.workspace(backbone, seed)
    changes = [*study.changes, f"backbone={json.dumps(dict(section))}"]  # JSON is YAML
    prepare(workspace, study.source, study.folder / backbone / f"{BASE}.parquet", seed, study.variants, changes)
    for variant in study.variants:
        adapt(workspace, variant)
    params = load_params(workspace.root / "params.yaml")
    for variant in (BASE, *study.variants):
        train_on(workspace, params, variant, recommender, seed, study.positions(backbone, variant))


# ------------------------------------------------------------------------------------------------- nano's relatives
def relatives(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Params sections of nano and its relatives, whose checkpoints are written to the folder unless they exist."""
    common = {"revision": None, "dtype": "float32", "attention": "auto", "max_text_tokens": 128, "pooling": "mean"}
    sections: dict[str, Mapping[str, Any]] = {
        "nano": {"kind": "nano", "min_pixels": 784, "max_pixels": 12544, "max_text_tokens": 128, "pooling": "mean"}
    }
    for family, make in RELATIVES.items():
        path = folder / family
        if not (path / "config.json").exists():
            write_relative(make, path)
        size = {"min_pixels": 784, "max_pixels": 12544} if family.startswith("qwen") else {"max_tiles": 0}
        sections[family] = {"kind": family, "name": str(path.resolve())} | common | size
    return sections


def write_relative(make: Any, folder: Path) -> None:
    """Write one relative: nano's language model in another family's architecture, everything else random from one seed."""
    nano = AutoModelForImageTextToText.from_pretrained(NANO, dtype=torch.float32, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(0, "relative", make.__name__))
        model, tokenizer, processor = make(nano.config, AutoTokenizer.from_pretrained(NANO, local_files_only=True))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".language_model." not in name and weight.ndim >= 2:  # the classes initialise with 0.02, which is small
                    weight.normal_(0.0, weight[0].numel() ** -0.5)
            own = dict(model.model.language_model.named_parameters())
            given = dict(nano.model.language_model.named_parameters())
            if own.keys() != given.keys():
                raise RuntimeError(f"{make.__name__}: its language model is not built as nano's")
            for name, weight in given.items():
                target = own[name][: len(weight)] if name == TOKEN_EMBEDDING else own[name]
                target.copy_(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


def _decoder(config: Any, tokenizer: Any, **more: Any) -> dict[str, Any]:
    """The configuration of nano's language model; ``tokenizer`` may have more tokens than nano's."""
    text = config.text_config
    copied = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
        "max_position_embeddings",
    )  # fmt: skip
    return {name: getattr(text, name) for name in copied} | {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | more  # fmt: skip


def _plain_rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": config.text_config.rope_parameters["rope_theta"]}


def _tower(config: Any, image_size: int, **more: Any) -> dict[str, Any]:
    """The configuration of a square image tower of the size of nano's."""
    vision = config.vision_config
    return {
        "hidden_size": vision.hidden_size, "intermediate_size": vision.intermediate_size, "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.num_heads, "image_size": image_size, "patch_size": vision.patch_size,
    } | more  # fmt: skip


def _qwen_ids(config: Any) -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: getattr(config, name) for name in names}


def qwen2_5_vl(config: Any, tokenizer: Any) -> Parts:
    """Nano's own architecture with a random tower."""
    rope = dict(config.text_config.rope_parameters)
    made = hf.Qwen2_5_VLConfig(
        text_config=_decoder(config, tokenizer, rope_parameters=rope, vocab_size=config.text_config.vocab_size),
        vision_config=config.vision_config.to_dict(), tie_word_embeddings=True, **_qwen_ids(config),
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(made), tokenizer, hf.Qwen2VLImageProcessorPil()


def qwen2_vl(config: Any, tokenizer: Any) -> Parts:
    """Full attention in the tower instead of windows, layer norms, a wider MLP."""
    rope, vision = dict(config.text_config.rope_parameters), config.vision_config
    tower = {
        "depth": vision.depth, "embed_dim": vision.hidden_size, "hidden_size": config.text_config.hidden_size,
        "num_heads": vision.num_heads, "mlp_ratio": 4, "patch_size": vision.patch_size,
    }  # fmt: skip
    made = hf.Qwen2VLConfig(
        text_config=_decoder(config, tokenizer, rope_parameters=rope, vocab_size=config.text_config.vocab_size),
        vision_config=tower, tie_word_embeddings=True, **_qwen_ids(config),
    )  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(made), tokenizer, hf.Qwen2VLImageProcessorPil()


def llava_onevision(config: Any, tokenizer: Any) -> Parts:
    """A SigLIP tower, an MLP as projector, positions in one dimension."""
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    side = 56
    layouts = [[side * rows, side * columns] for rows in range(1, 4) for columns in range(1, 4)]
    made = hf.LlavaOnevisionConfig(
        text_config=_decoder(config, tokenizer, model_type="qwen2", rope_parameters=_plain_rope(config)),
        vision_config=_tower(config, side, model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=layouts, vision_aspect_ratio="anyres_max_4", tie_word_embeddings=True,
    )  # fmt: skip
    tokenizer.chat_template = _template("<image>")
    half = [0.5, 0.5, 0.5]
    size = {"height": side, "width": side}
    processor = hf.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=layouts, image_mean=half, image_std=half)
    return hf.LlavaOnevisionForConditionalGeneration(made), tokenizer, processor


def internvl(config: Any, tokenizer: Any) -> Parts:
    """A ViT with merged neighbouring patches, an MLP as projector, positions in one dimension."""
    tokenizer.add_tokens(["<img>", "</img>", "<IMG_CONTEXT>", "<video>"], special_tokens=True)
    side = 112
    made = hf.InternVLConfig(
        text_config=_decoder(config, tokenizer, model_type="qwen2", rope_parameters=_plain_rope(config)),
        vision_config=_tower(config, side, attention_bias=True), image_seq_length=16,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), tie_word_embeddings=True,
    )  # fmt: skip
    tokenizer.chat_template = _template("<IMG_CONTEXT>")
    size = {"height": side, "width": side}
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = hf.GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, image_mean=mean, image_std=deviation)
    return hf.InternVLForConditionalGeneration(made), tokenizer, processor


def _template(image_token: str) -> str:
    """Nano's chat template with another image placeholder."""
    nano = (NANO / "chat_template.jinja").read_text(encoding="utf-8")
    return nano.replace("<|vision_start|><|image_pad|><|vision_end|>", image_token)


RELATIVES = {made.__name__: made for made in (qwen2_5_vl, qwen2_vl, llava_onevision, internvl)}


# ------------------------------------------------------------------------------------------------- numbers
def table(study: Study, backbones: Sequence[str], recommender: str) -> str:
    """A Markdown table: one row per backbone and variant; differences to the same backbone without adapter."""
    rows = []
    for backbone in backbones:
        base_SU = read_gains("ndcg", study.positions(backbone, BASE), study.seeds)
        rows.append([backbone, BASE, "", f"{study.retrieval(backbone, BASE):.3f}", f"{base_SU.mean():.4f}", "", ""])
        for variant in study.variants:
            ndcg_SU = read_gains("ndcg", study.positions(backbone, variant), study.seeds)
            gain_SU = ndcg_SU - base_SU
            curves = [read_curve(study.workspace(backbone, seed), variant)["retrieval"] for seed in study.seeds]
            first, last = (np.mean([curve[place] for curve in curves]) for place in (0, -1))
            cells = [backbone, variant, f"{first:.3f}, {last:.3f}", f"{study.retrieval(backbone, variant):.3f}"]
            cells += [f"{ndcg_SU.mean():.4f}", difference(gain_SU, study.params(backbone).evaluate, variant)]
            rows.append([*cells, range_over_seeds(gain_SU)])
    heads = ["backbone", "variant", "retrieval, first step and last", "retrieval@1", f"NDCG@{CUTOFF}", f"- {BASE} [95 %]"]
    title = f"{recommender} on vectors of several backbones, {len(study.seeds)} seeds"
    return markdown_table([*heads, "over seeds"], rows, title)


def plot(study: Study, backbones: Sequence[str], path: Path) -> None:
    """Plot the differences to the backbone without adapter, with their intervals."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(1.6 * len(backbones) + 2, 3.4), layout="constrained")
    for number, variant in enumerate(study.variants):
        centres, errors = [], []
        for backbone in backbones:
            ndcg_SU, base_SU = (read_gains("ndcg", study.positions(backbone, name), study.seeds) for name in (variant, BASE))
            mean, low, high = mean_and_interval(ndcg_SU - base_SU, study.params(backbone).evaluate, variant)
            centres.append(mean)
            errors.append((mean - low, high - mean))
        places = np.arange(len(backbones)) + 0.16 * (number - (len(study.variants) - 1) / 2)
        axis.errorbar(places, centres, yerr=np.maximum(np.array(errors).T, 0.0), fmt="o", capsize=3, label=variant)
    axis.axhline(0.0, color="#666666", linestyle="--", linewidth=1)
    axis.set_xticks(range(len(backbones)), backbones)
    axis.set_ylabel(f"NDCG@{CUTOFF} - {BASE}")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
