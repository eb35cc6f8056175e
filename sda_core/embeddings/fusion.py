"""Fuse the image and text vectors of each item, or the vectors of a joint pass, into one vector per item."""

from __future__ import annotations

import logging
from typing import assert_never

import numpy as np
import polars as pl

from sda_core.artifacts import INTERACTIONS, Workspace
from sda_core.errors import DataError
from sda_core.params import ExportParams
from sda_core.principal_axes import principal_axes, project
from sda_core.unit_rows import unit_rows

_log = logging.getLogger(__name__)


def seen_items(workspace: Workspace) -> np.ndarray:
    """Item ids of the training interactions, with repetitions: the items that :func:`fuse` may fit on."""
    return INTERACTIONS.read(workspace.interactions).filter(pl.col("split") == "train")["item_id"].to_numpy()


def fuse(
    image_ID: np.ndarray,
    text_ID: np.ndarray,
    has_image: np.ndarray,
    fit_ids: np.ndarray,
    params: ExportParams,
    base: tuple[np.ndarray, np.ndarray] | None = None,
    has_text: np.ndarray | None = None,
) -> np.ndarray:
    """Fuse image and text vectors into one vector per item.

    With ``params.center`` the mean of the fitted rows of each half is subtracted first, so that what all items have in common
    takes no part of the length.  With ``params.normalize`` each half is then scaled to unit length, and the result at the end.
    So a half is ``(x - m) / |x - m|``, with ``m`` the mean, or ``x / |x|`` without ``center``.

    A row without an image then gets the mean image vector of the fitted items that have one (or of all items that have one, if
    no fitted item does), which carries no information about the item.  Likewise a row without a text gets the mean text vector.
    So after the centring in ``late_concat_pca`` such a row is that of its other modality alone: without a text
    ``y = (image - mean image) A_image``, without an image ``y = (text - mean text) A_text``, with ``A`` the rows of the axes
    for that modality.  A row that has none of the fused modalities, or none whose weight is not 0, is zero: nothing is known
    about this item.

    ===================  ====================================================================================
    ``late_concat_pca``  principal components of ``[image, text]``, fitted on ``fit_ids`` only, centred, not
                         whitened; ``min(fused_dim, 2 D, number of fitted items)`` components; the largest loading
                         of each component in absolute value is positive
    ``concat``           ``[image, text]``, 2 D wide
    ``mean``             ``(image + text) / 2``
    ``image``, ``text``  one of the two
    ===================  ====================================================================================

    If both modalities are fused, each is multiplied by its weight.  Before that, ``params.balance: equal_energy`` scales
    them so that the mean squared distance of the fitted rows from their mean is the same for both.
    ``params.axis_scaling: even`` divides each principal component by ``sqrt(v + mean v)``, with ``v`` its variance over the
    fitted items: it brings components of large variance closer to the others, and does not inflate components of small
    variance as whitening does.

    ``base`` adds the image and text vectors of the backbone without its adapter, with the same treatment:
    ``[image, text, base image, base text]``.

    Args:
        image_ID: ``(I, D)`` float32, row r is that of item id r + 1.
        text_ID: ``(I, D)`` float32.
        has_image: ``(I,)`` bool, whether a row of ``image_ID`` is valid.
        fit_ids: item ids seen in training.
        params: fusion, ``fused_dim``, ``center``, ``normalize``, weights and scaling.
        base: image and text vectors of the same items by the backbone alone; for ``concat`` and ``late_concat_pca``.
        has_text: ``(I,)`` bool, whether a row of ``text_ID`` is valid; None if all are.

    Returns:
        ``(I, F)`` float32.

    Raises:
        DataError: no item to fit on, an id out of range, fusion ``image`` without any image or ``text`` without any
            text, or fusion ``mean`` of different widths.
    """
    fit_rows = _fit_rows(fit_ids, len(image_ID))
    has = has_image, np.ones(len(text_ID), dtype=bool) if has_text is None else has_text
    match params.fusion:
        case "late_concat_pca":
            joined_IF = _with_base(image_ID, text_ID, base, has, fit_rows, params)
            fused_IF = _principal_components(joined_IF, fit_rows, params.fused_dim, even=params.axis_scaling == "even")
        case "concat":
            fused_IF = _with_base(image_ID, text_ID, base, has, fit_rows, params)
        case "mean":
            width = image_ID.shape[1]
            if width != text_ID.shape[1]:  # imported vectors
                raise DataError(
                    "params.yaml: export_embeddings.fusion",
                    f"is 'mean', but the vectors of images are {width} wide and those of texts {text_ID.shape[1]}",
                    "use 'concat' or 'late_concat_pca'",
                )
            joined_IF = _joined(image_ID, text_ID, has, fit_rows, params)
            fused_IF = (joined_IF[:, :width] + joined_IF[:, width:]) / 2
        case "image":
            if not has_image.any():
                raise DataError("params.yaml: export_embeddings.fusion", "is 'image', but no item has an image", "use 'text'")
            fused_IF = image_ID.astype(np.float32)
            _prepare(fused_IF, has[0], fit_rows, params)
        case "text":
            if not has[1].any():
                raise DataError("params.yaml: export_embeddings.fusion", "is 'text', but no item has a text", "use 'image'")
            fused_IF = text_ID.astype(np.float32)
            _prepare(fused_IF, has[1], fit_rows, params)
        case _:
            assert_never(params.fusion)
    fused_IF[~has_content(*has, params)] = 0.0  # principal components have rounding noise there, which would get length 1
    if params.normalize:
        unit_rows(fused_IF, out=fused_IF)
    return fused_IF


def has_content(has_image: np.ndarray, has_text: np.ndarray, params: ExportParams) -> np.ndarray:
    """Whether :func:`fuse` knows anything about an item, ``(I,)`` bool: the item has a fused modality whose weight is not 0."""
    if params.fusion in ("image", "text"):
        return has_image if params.fusion == "image" else has_text
    return has_image & (params.image_weight != 0) | has_text & (params.text_weight != 0)


def fuse_joint(joint_ID: np.ndarray, fit_ids: np.ndarray, params: ExportParams) -> np.ndarray:
    """Process the vectors of a joint pass in the same way as :func:`fuse` processes pairs of vectors.

    With ``late_concat_pca`` the result consists of the principal components, so that origin, width and ``axis_scaling`` are
    those of the other variants; any other ``fusion`` does not change the vectors.  With ``params.center`` the mean of the fitted
    rows is subtracted first; with ``params.normalize`` they are then scaled to unit length, and the result at the end.  Weights,
    ``balance`` and ``with_base`` apply to pairs of vectors and have no effect here.

    Args:
        joint_ID: ``(I, D)`` float32, row r is that of item id r + 1.
        fit_ids: item ids seen in training.
        params: see above.

    Returns:
        ``(I, F)`` float32.

    Raises:
        DataError: no item to fit on, or an id out of range.
    """
    fit_rows = _fit_rows(fit_ids, len(joint_ID))
    fused_IF = joint_ID.astype(np.float32)
    _prepare(fused_IF, np.ones(len(fused_IF), dtype=bool), fit_rows, params)
    if params.fusion == "late_concat_pca":
        fused_IF = _principal_components(fused_IF, fit_rows, params.fused_dim, even=params.axis_scaling == "even")
    if params.normalize:
        unit_rows(fused_IF, out=fused_IF)
    return fused_IF


def _fit_rows(fit_ids: np.ndarray, num_items: int) -> np.ndarray:
    """Rows of the items seen in training, without repetitions."""
    fit_rows = np.unique(np.asarray(fit_ids, dtype=np.int64)) - 1
    if len(fit_rows) and (fit_rows[0] < 0 or fit_rows[-1] >= num_items):
        raise DataError(
            "item fusion", f"ids of training items should lie in 1..{num_items} (got {fit_rows[0] + 1}..{fit_rows[-1] + 1})"
        )
    return fit_rows


def _with_base(
    image_ID: np.ndarray,
    text_ID: np.ndarray,
    base: tuple[np.ndarray, np.ndarray] | None,
    has: tuple[np.ndarray, np.ndarray],
    fit_rows: np.ndarray,
    params: ExportParams,
) -> np.ndarray:
    """``[image, text]``, followed by those of the base if given."""
    joined_IF = _joined(image_ID, text_ID, has, fit_rows, params)
    return joined_IF if base is None else np.concatenate([joined_IF, _joined(*base, has, fit_rows, params)], axis=1)


def _joined(
    image_ID: np.ndarray,
    text_ID: np.ndarray,
    has: tuple[np.ndarray, np.ndarray],
    fit_rows: np.ndarray,
    params: ExportParams,
) -> np.ndarray:
    """``[image, text]``, ``(I, 2 D)`` float32: the only additional copy that a fusion makes."""
    joined_IF = np.concatenate([image_ID, text_ID], axis=1, dtype=np.float32)
    width = image_ID.shape[1]
    parts = joined_IF[:, :width], joined_IF[:, width:]
    for part, has_part in zip(parts, has, strict=True):
        _prepare(part, has_part, fit_rows, params)
    factors = [params.image_weight, params.text_weight]
    if params.balance == "equal_energy":
        energies = [_energy(part[fit_rows]) for part in parts]
        mean = sum(energies) / 2
        factors = [f * np.sqrt(mean / energy) if energy > 0 else f for f, energy in zip(factors, energies, strict=True)]
    for part, factor in zip(parts, factors, strict=True):
        if factor != 1:
            part *= np.float32(factor)
    return joined_IF


def _energy(vectors_ID: np.ndarray) -> float:
    """Mean squared distance of some rows from their mean; 0 without rows."""
    if not len(vectors_ID):
        return 0.0
    centred = vectors_ID - vectors_ID.mean(0, dtype=np.float64)
    return float(np.einsum("id,id->", centred, centred) / len(centred))


def _prepare(vectors_ID: np.ndarray, has_vector: np.ndarray, fit_rows: np.ndarray, params: ExportParams) -> None:
    """In place: center rows and scale them to unit length, each if requested; write the mean vector to rows without one."""
    fitted = np.zeros(len(has_vector), dtype=bool)
    fitted[fit_rows] = True
    known = has_vector & fitted if (has_vector & fitted).any() else has_vector
    if params.center and known.any():
        vectors_ID -= vectors_ID[known].mean(0, dtype=np.float64).astype(np.float32)
    if params.normalize:
        unit_rows(vectors_ID, out=vectors_ID)
    if not has_vector.all():
        vectors_ID[~has_vector] = vectors_ID[known].mean(0, dtype=np.float64) if known.any() else 0.0


def _principal_components(vectors_IF: np.ndarray, fit_rows: np.ndarray, num_components: int, *, even: bool) -> np.ndarray:
    """Centred projections on the principal axes of the fitted rows, ``(I, K)`` float32; scaled if ``even``."""
    if not len(fit_rows):
        raise DataError(
            "item fusion", "there is no training item to fit the principal components on", "check the filter's statistics"
        )
    mean_F, axes_FK = principal_axes(vectors_IF, fit_rows, num_components, even=even)
    if axes_FK.shape[1] < num_components:
        _log.info(
            "late_concat_pca: %d components instead of %d (%d columns, %d fitted items)",
            axes_FK.shape[1],
            num_components,
            vectors_IF.shape[1],
            len(fit_rows),
        )
    return project(vectors_IF, mean_F, axes_FK)
