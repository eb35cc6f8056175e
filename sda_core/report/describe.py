"""Describe the params of a run as text."""

from __future__ import annotations

from typing import Literal, assert_never

from sda_core.params import (
    CLIP,
    AmazonDataset,
    BackboneParams,
    Checkpoint,
    Cut,
    DemoDataset,
    ExportParams,
    FilterParams,
    LossParams,
    Nano,
    Params,
    SigLIP,
    TailParams,
    TinyQwen25VL,
)
from sda_core.report.model import Fact, Variant


def dataset(section: DemoDataset | AmazonDataset) -> str:
    """A short description of the dataset."""
    match section:
        case DemoDataset():
            return f"the built-in shop {section.category}, written in the {section.edition} format"
        case AmazonDataset():
            return f"Amazon reviews {section.edition}, {section.category.replace('_', ' ')}"
        case _:
            assert_never(section)


_NANO = {
    "nano": "nano, a Qwen2.5-VL of 9 million parameters, pre-trained on icons, clip art and text",
    "nano2": "nano 2, a Qwen2.5-VL of 10 million parameters, pre-trained on drawn scenes, photographs, icons, clip art and text",
}


def backbone(section: BackboneParams) -> str:
    """A short description of the backbone."""
    match section:
        case TinyQwen25VL():
            size = f"{section.num_layers} layers of width {section.hidden_size}"
            return f"Qwen2.5-VL architecture, {size}, random weights (seed {section.seed})"
        case Nano():
            return _NANO[section.kind]
        case Checkpoint():
            revision = "" if section.revision is None else f" at {section.revision}"
            return f"{section.name}{revision}, {section.dtype}"
        case _:
            assert_never(section)


def pooling(section: BackboneParams) -> str:
    """A short description of the pooling of a backbone's states."""
    if isinstance(section, CLIP | SigLIP):
        return "that of the two towers"
    return f"{section.pooling} over the last hidden states"


def fusion(section: ExportParams) -> str:
    """A short description of how the vectors of image and text become one."""
    match section.fusion:
        case "late_concat_pca":
            return f"image and text vectors side by side, reduced to {section.fused_dim} dimensions at most (PCA)"
        case "concat":
            return "image and text vectors side by side"
        case "mean":
            return "the mean of image and text vectors"
        case "image" | "text":
            return f"{section.fusion} vectors alone"
        case _:
            assert_never(section.fusion)


def tail(section: TailParams) -> str:
    """A short description of the definition of tail."""
    match section.definition:
        case "train_lt_k":
            return f"items with fewer than {section.max_count} training interactions"
        case "pareto":
            return f"the {100 * section.share:g} % least popular items by training interactions"
        case "paper":
            return f"items with fewer than {section.max_count} interactions over all splits"
        case _:
            assert_never(section.definition)


def filtering(section: FilterParams) -> str:
    """The rows and items that the filter keeps, in one sentence."""
    method = "k-core" if section.method == "kcore" else "single pass"
    parts = [f"{method}, at least {section.min_user_interactions} per user, {section.min_item_interactions} per item"]
    if section.min_rating > 0.0:
        parts.append(f"ratings from {section.min_rating:g}")
    match section.duplicates:
        case "keep":
            parts.append("repeated purchases kept")
        case "first" | "last":
            parts.append(f"of repeated purchases the {section.duplicates} is kept")
        case _:
            assert_never(section.duplicates)
    if section.time_resolution_seconds:
        parts.append(f"times rounded down to multiples of {section.time_resolution_seconds} seconds")
    order = f"random order (seed {section.ties_seed})" if section.ties == "random" else "the order of the raw file"
    parts.append(f"equal times in {order}")
    for what, policy in (("metadata", section.items_without_metadata), ("an image's address", section.items_without_image)):
        parts.append(f"items without {what} {'dropped' if policy == 'drop' else 'kept'}")
    return "; ".join(parts)


def split(section: FilterParams) -> str:
    """The split into training, validation and test, in one sentence."""

    def cut(value: Cut | None) -> str:
        return f"after {100 * value:g} % of the interactions" if isinstance(value, float) else f"on {value} (UTC)"

    match section.split:
        case "leave_one_out":
            return "leave one out: each user's last item is the test target, the one before it the validation target"
        case "global_time":
            return f"by time: validation begins {cut(section.valid_from)}, the test {cut(section.test_from)}"
        case _:
            assert_never(section.split)


def ties(policy: Literal["pessimistic", "mean", "optimistic"]) -> str:
    """A short description of the position of a target among items with equal scores."""
    match policy:
        case "pessimistic":
            return "pessimistic (items with the target's score rank before it)"
        case "mean":
            return "mean (the target ranks in the middle of the items with its score)"
        case "optimistic":
            return "optimistic (items with the target's score rank after it)"
        case _:
            assert_never(policy)


def _describe_loss(loss: LossParams) -> str:
    if loss.teacher == "none":
        return "InfoNCE"
    if loss.variant == "reference":
        return "CMSA as in the public code"
    return "CMSA" if loss.teacher_source == "adapted" else "CMSA with the backbone's own vectors as the teacher"


_CONTROL_TEXT = {
    "random": "Control: random directions instead of content vectors.",
    "shuffled": "Control: the vectors of zero_shot, each on a wrong item.",
    "image_only": "Control: the image vectors of zero_shot alone.",
    "text_only": "Control: the text vectors of zero_shot alone.",
    "oracle": "Control: the true attributes of the items, which no model sees: an upper bound for item vectors.",
    "oracle_shared": "Control: the true attributes that image and text both show.",
    "oracle_image": "Control: the true attributes that only the image shows.",
    "oracle_text": "Control: the true attributes that only the text shows.",
    "oracle_named": "Control: the true attributes that the item's own text names.",
}


def variants(params: Params) -> tuple[Variant, ...]:
    """A description of each variant of the ladder."""
    made: list[Variant] = []
    for name in params.variants:
        if name == "id":
            text = "No content: the recommender learns a vector for each item id."
        elif name == "zero_shot":
            text = "Content vectors of the unchanged backbone."
        elif name in params.control_embeddings.variants:
            text = _CONTROL_TEXT[name]
        elif name in params.joint_embeddings.variants:
            base = params.joint_embeddings.variants[name].of
            model = "the unchanged backbone" if base == "zero_shot" else f"the backbone with the adapter of {base}"
            text = f"Content vectors of one pass over image and text together, by {model}."
        elif name in params.import_embeddings.variants:
            text = "Content vectors that were imported from a file."
        else:
            section = params.train_adapter.variants[name]
            adapter, loss = params.train_adapter.of(name)
            experts = f"{adapter.num_experts} experts, {adapter.gate} gate" if adapter.num_experts > 1 else "one expert"
            kind = "LoRA" if section.adapter == "lora" else "MoDA"
            method = f"{kind} of total rank {adapter.r} ({experts}), trained with {_describe_loss(loss)}"
            text = f"Content vectors after adaptation: {method}."
        made.append(Variant(name, text))
    return tuple(made)


def notes(params: Params) -> tuple[str, ...]:
    """Notes for the interpretation of the results, one or two sentences each."""
    found: list[str] = []
    if isinstance(params.backbone, TinyQwen25VL):
        found.append(
            "The backbone has random weights: they were never trained. It is for trying the "
            "pipeline: differences between variants say nothing about the method."
        )
    if isinstance(params.backbone, Nano):
        found.append("The backbone is a small model that this project pre-trained. Results with it may not hold for a large one.")
    if params.evaluate.protocol != "fullrank":
        found.append(
            f"Targets were ranked among {params.evaluate.protocol[3:]} sampled items only. Such numbers are far higher than "
            "full-rank ones and cannot be compared with them."
        )
    if params.evaluate.retrieval is not None:
        found.append(
            f"Targets were ranked among the {params.evaluate.retrieval.depth:,} nearest items of an index "
            f"({params.evaluate.retrieval.factory}); a target that is not among them counts as last. retrieval_recall@10 in "
            "metrics/ says what the index misses."
        )
    return tuple(found)


def set_up(params: Params) -> tuple[Fact, ...]:
    """The settings of the run as names and texts."""
    protocols = {
        "fullrank": "full rank: every item the user has not seen",
        "uni100": "100 sampled items, uniform over the catalogue",
        "pop100": "100 sampled items, by training popularity",
    }
    training = params.train_adapter.training
    facts = [
        Fact("Data set", dataset(params.dataset)),
        Fact("Filter", filtering(params.filter)),
        Fact("Split", split(params.filter)),
        Fact("Backbone", backbone(params.backbone)),
        Fact("Pooling", pooling(params.backbone)),
        Fact("Adapter training", f"{training.num_steps:,} steps of {training.batch_size} items, seed {training.seed}"),
        Fact("Item vectors", fusion(params.export_embeddings)),
        Fact("Protocol", protocols[params.evaluate.protocol]),
        Fact("Ties", ties(params.evaluate.ties)),
        Fact("Tail", tail(params.evaluate.tail)),
        Fact(
            "Uncertainty",
            f"bootstrap: {params.evaluate.bootstrap_samples:,} draws of users and seeds, seed {params.evaluate.bootstrap_seed}",
        ),
    ]
    facts.append(Fact("Recommender seeds", ", ".join(map(str, params.train_recommender.seeds))))
    return tuple(facts)
