"""The model card of a saved adapter.  The text is deterministic: the same adapter always gets the same card."""

from __future__ import annotations

import re

from peft import PeftModel
from torch import nn

from sda_core.adapters.merging import moda_layers
from sda_core.adapters.moda import MoDAConfig
from sda_core.adapters.moda.targets import by_kind

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_GATES = {
    "modality": "`g(m) = softmax(W_g Emb_m)` is learned in each layer and depends only on the input's modality `m`",
    "onehot": "`g(m)` is 1 for the experts that modality `m` owns and 0 for the others: an independent LoRA per modality",
    "uniform": "`g` gives every expert the same share, whatever the modality",
}


def model_card(model: PeftModel, base_model: str | None, revision: str | None = None) -> str:
    """The description of a model's adapters as Markdown with the hub's front matter.

    It holds no versions, dates or paths, so two runs with equal results write equal files.

    Args:
        model: a model with one MoDA adapter or several.
        base_model: hub id or name of the model that was adapted; None if it has none.
        revision: revision of the base model; None if unknown.
    """
    hub_id = base_model is not None and _HUB_ID.fullmatch(base_model) is not None
    head = [
        "---",
        *([f"base_model: {base_model}"] if hub_id else []),
        "library_name: peft",
        "tags:",
        "- moda",
        "- lora",
        "---",
        "",
    ]
    kind = type(model.get_base_model()).__name__
    named = f"`{base_model}`{f' at `{revision}`' if revision else ''}, a {kind}" if base_model else f"a {kind}"
    title = f"# MoDA adapter of {base_model or kind}"
    intro = [
        title,
        "",
        f"Modality-disentangled adaptation ([arXiv 2512.06883](https://arxiv.org/abs/2512.06883)) of {named}:",
        "low-rank experts beside frozen linear layers, mixed by a gate.",
    ]
    parts = [part for name in model.peft_config for part in _adapter(model, name)]
    return "\n".join([*head, *intro, *parts]) + "\n"


def _adapter(model: PeftModel, name: str) -> list[str]:
    config = model.peft_config[name]
    assert isinstance(config, MoDAConfig)
    layers = [(path, layer) for path, layer in moda_layers(model.get_base_model()) if name in layer.moda_A]
    number = sum(parameter.numel() for _, layer in layers for parameter in _parameters(layer, name))
    modality = config.modalities[0]
    where = "FOLDER" if name == "default" else f"FOLDER/{name}"
    settings = {
        key: getattr(config, key)
        for key in (
            "r",
            "lora_alpha",
            "use_rslora",
            "lora_dropout",
            "variant",
            "num_experts",
            "expert_rank",
            "gate",
            "modality_dim",
        )
    }
    scale = "lora_alpha / sqrt(r)" if config.use_rslora else "lora_alpha / r"
    text = ["", f"## Adapter `{name}`", ""]
    if config.num_experts == 1:
        text += [f"`y = W0 x + s B A x`: one expert, plain LoRA, with the scale `s = {scale} = {config.scale:.6g}`."]
    else:
        text += [
            f"`y = W0 x + s * sum_e g_e(m) B_e A_e x` over {config.num_experts} experts of rank {config.rank_per_expert}, "
            f"with the scale `s = {scale} = {config.scale:.6g}`.",
            f"{_GATES[config.gate]}.",
        ]
    text += [
        "",
        f"Modalities, in the order of their ids: {', '.join(f'`{each}`' for each in config.modalities)}.",
        f"{number:,} parameters in {len(layers)} linear layers.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| `{key}` | {value} |" for key, value in settings.items()),
        "",
        "| adapted layers | number |",
        "|---|---|",
        *(f"| `{path}` | {count} |" for path, count in by_kind(path for path, _ in layers).items()),
        "",
        "```python",
        "import peft, sda_core  # sda_core makes MODA known to PEFT",
        "from sda_core.adapters import modality",
        "",
        f'model = peft.PeftModel.from_pretrained(base_model, "{where}", adapter_name="{name}").eval()',
        *(
            [
                f'with modality(model, "{modality}"):  # or ids, one per row (B,) or one per token (B, L)',
                "    output = model(**inputs)",
                f'with modality(model, "{modality}"):  # or folded into the weights, for one modality',
                "    plain = model.merge_and_unload()",
            ]
            if config.depends_on_modality
            else ["output = model(**inputs)"]
        ),
        "```",
    ]
    return text


def _parameters(layer: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters() if name.startswith("moda_") and name.endswith(f".{adapter_name}")]
