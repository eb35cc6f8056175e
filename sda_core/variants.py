"""The kind of each variant according to the params: adapted, joint, imported, a control, or the backbone alone.

These functions determine which adapter a stage loads and which indexes exist, so they are here and not in ``params``: stages
that use them list this file in their ``deps``.
"""

from __future__ import annotations

from sda_core.errors import ConfigError
from sda_core.modalities import JOINT, MODALITIES, Pass
from sda_core.params import Params


def indexed_variants(params: Params) -> tuple[str, ...]:
    """The variants with an index of item vectors, in order: all except ``id`` and the controls."""
    return tuple(variant for variant in params.variants if variant not in {"id", *params.control_embeddings.variants})


def controls(params: Params) -> tuple[str, ...]:
    """The variants that cannot be chosen: random, shuffled and oracle vectors.  A single modality can be chosen."""
    return tuple(variant for variant in params.control_embeddings.variants if variant not in {"image_only", "text_only"})


def reported(params: Params) -> tuple[str, ...]:
    """The variants whose gains are in ``comparisons.json``: those with an adapter, and the positive control."""
    return (*params.train_adapter.variants, *(name for name in params.control_embeddings.variants if name == "oracle"))


def adapter_of(params: Params, variant: str) -> str | None:
    """The trained variant whose adapter is used: the variant itself, or that of a joint variant; None without an adapter.

    Raises:
        ConfigError: as :func:`is_trained`.
    """
    joint = params.joint_embeddings.variants
    name = joint[variant].of if variant in joint else variant
    return name if is_trained(params, name) else None


def passes_of(params: Params, variant: str) -> tuple[Pass, ...]:
    """The passes of a variant: image and text separately, or both in one sequence."""
    return JOINT if variant in params.joint_embeddings.variants else MODALITIES


def is_trained(params: Params, variant: str) -> bool:
    """Whether an adapter is trained for a variant; ``zero_shot``, ``id`` and the controls have none.

    Raises:
        ConfigError: no such variant, or its vectors are imported.
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
