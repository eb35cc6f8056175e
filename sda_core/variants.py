"""How each variant of the ladder is made, told from the params: adapted, joint, imported, a control, or the bare backbone.

These functions decide which adapter a stage loads and which indexes exist, so they stand here and not in ``params``: stages
that use them list this file among their ``deps``.
"""

from __future__ import annotations

from sda_core.errors import ConfigError
from sda_core.modalities import JOINT, MODALITIES, Pass
from sda_core.params import Params


def indexed_variants(params: Params) -> tuple[str, ...]:
    """The variants that have an index of item vectors, in their order: all but ``id`` and the controls."""
    return tuple(variant for variant in params.variants if variant not in {"id", *params.control_embeddings.variants})


def controls(params: Params) -> tuple[str, ...]:
    """The variants that are no choice: random, shuffled and true vectors.  One modality alone is a choice."""
    return tuple(variant for variant in params.control_embeddings.variants if variant not in {"image_only", "text_only"})


def reported(params: Params) -> tuple[str, ...]:
    """The variants whose gains stand in ``comparisons.json``: those with an adapter, and the positive control."""
    return (*params.train_adapter.variants, *(name for name in params.control_embeddings.variants if name == "oracle"))


def adapter_of(params: Params, variant: str) -> str | None:
    """The trained variant with whose adapter a variant's vectors are made: itself, or that of a joint variant; None without.

    Raises:
        ConfigError: as :func:`is_trained`.
    """
    joint = params.joint_embeddings.variants
    name = joint[variant].of if variant in joint else variant
    return name if is_trained(params, name) else None


def passes_of(params: Params, variant: str) -> tuple[Pass, ...]:
    """What a variant's sequences hold: image and text apart, or both together."""
    return JOINT if variant in params.joint_embeddings.variants else MODALITIES


def is_trained(params: Params, variant: str) -> bool:
    """Whether a variant has an adapter of its own; ``zero_shot``, ``id`` and the controls have none.

    Raises:
        ConfigError: no such variant, or one whose vectors are imported.
    """
    if variant in params.train_adapter.variants:
        return True
    if variant in {"id", "zero_shot", *params.control_embeddings.variants}:
        return False
    if variant in params.import_embeddings.variants:
        raise ConfigError("--variant", f"{variant!r} is imported", "use `sda import-embeddings`")
    made = params.train_adapter.variants, params.joint_embeddings.variants, params.control_embeddings.variants
    known = ", ".join(sorted({"id", "zero_shot"}.union(*made)))
    raise ConfigError("--variant", f"unknown variant {variant!r}; known are {known}")
