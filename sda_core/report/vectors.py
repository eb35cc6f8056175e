"""Effects of adaptation on the vectors: geometry, items with conflicting modalities, and a map.

* **Alignment and uniformity** (Wang & Isola 2020, eq. 1 and 2) of unit vectors ``x`` of images and ``y`` of texts:
  ``mean |x_i - y_i|^2``, 0 if both are equal, 2 if they are unrelated; and ``log mean_{i != j} exp(-2 |x_i - x_j|^2)``, 0 if
  all vectors are equal, about -4 if they are spread out.
* **Conflicting items** are pairs that are similar in one modality and different in the other: the largest differences of the
  two cosines, each standardised over all pairs, after subtracting the mean vector (vectors of language models share a large
  common part).  Every item occurs at most once.
* **The map** is a t-SNE (van der Maaten & Hinton 2008) of the fused vectors.  That of the last variant starts from the
  coordinates of the first one, because two runs from scratch differ randomly, far more than a few steps of adaptation move
  a vector.
* For **modality drop** see :mod:`~sda_core.report.modality_drop`.

Large shops are sampled evenly over the item ids; everything runs on one thread, so that equal vectors give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from sda_core.artifacts import EMBEDDINGS, ITEMS, Workspace
from sda_core.errors import ArtifactError
from sda_core.image_store import ImageStore
from sda_core.item_vectors import read_vectors
from sda_core.params import ExportParams
from sda_core.report.modality_drop import modality_drop
from sda_core.report.model import Geometry, ModalityDrop, VectorMap
from sda_core.unit_rows import unit_rows

MAX_COMPARED = 1500  # maximum number of items whose pairs are all compared
MAX_MAPPED = 300  # maximum number of items on a map
_PERPLEXITY = 20.0
_SEED = 7

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """Two items that are similar in one modality: their cosines in both, by the base model without the mean vector."""

    first: int
    second: int
    alike_in: str  # image or text
    image_cosine: float
    text_cosine: float


def sampled(num_items: int, most: int) -> npt.NDArray[np.int64]:
    """Item ids from 1, evenly spaced; all of them if there are at most ``most``."""
    return np.unique(np.linspace(1, num_items, min(most, num_items)).round().astype(np.int64))


def uniformity(vectors_ND: npt.NDArray[np.floating]) -> float:
    """Uniformity (see the module) over all pairs of rows, scaled to unit length; NaN for less than two rows."""
    if len(vectors_ND) < 2:
        return float("nan")
    unit = unit_rows(vectors_ND.astype(np.float64))
    cosines = np.einsum("id,jd->ij", unit, unit)
    above = cosines[np.triu_indices(len(unit), 1)]
    return float(np.log(np.exp(4.0 * above - 4.0).mean()))  # |x - y|^2 = 2 - 2 cos


def geometry(variant: str, image_ND: Vectors, text_ND: Vectors) -> Geometry:
    """The geometry of one variant.

    Args:
        variant: name of the variant.
        image_ND: image vectors of N items.
        text_ND: text vectors of the same items, in the same order.
    """
    image, text = unit_rows(image_ND.astype(np.float64)), unit_rows(text_ND.astype(np.float64))
    cosines = np.einsum("id,jd->ij", image, text)
    own = np.diagonal(cosines)
    found = float((cosines <= own[:, None] + 1e-9).all(axis=1).mean()) if len(own) else float("nan")
    return Geometry(
        variant=variant,
        num_items=len(image),
        alignment=float((2.0 - 2.0 * own).mean()) if len(own) else float("nan"),
        uniformity_image=uniformity(image),
        uniformity_text=uniformity(text),
        own_text_first=found,
    )


def conflicting(ids: npt.NDArray[np.int64], image_ND: Vectors, text_ND: Vectors, number: int) -> tuple[Pair, ...]:
    """The ``number`` most conflicting pairs of each kind: similar images and different texts, then the reverse.

    Args:
        ids: (N,) item ids of the rows.
        image_ND: their image vectors.
        text_ND: their text vectors.
        number: maximum number of pairs of each kind.
    """
    if len(ids) < 4:
        return ()
    image, text = (unit_rows((rows - rows.mean(axis=0)).astype(np.float64)) for rows in (image_ND, text_ND))
    rows, columns = np.triu_indices(len(ids), 1)
    cosines = [np.einsum("id,jd->ij", unit, unit)[rows, columns] for unit in (image, text)]
    spreads = [max(float(values.std()), 1e-12) for values in cosines]
    image_z, text_z = ((values - values.mean()) / spread for values, spread in zip(cosines, spreads, strict=True))
    pairs: list[Pair] = []
    taken: set[int] = set()
    for kind, score in (("image", image_z - text_z), ("text", text_z - image_z)):
        best = np.argsort(-score.round(9), kind="stable")[: 200 * number]
        chosen = 0
        for place in best.tolist():
            a, b = int(rows[place]), int(columns[place])
            if chosen == number or score[place] <= 0:
                break
            if a in taken or b in taken:
                continue
            taken |= {a, b}
            chosen += 1
            pairs.append(Pair(int(ids[a]), int(ids[b]), kind, float(cosines[0][place]), float(cosines[1][place])))
    return tuple(pairs)


def project(vectors_ND: Vectors, start_N2: npt.NDArray[np.float64] | None = None) -> npt.NDArray[np.float64]:
    """Two coordinates per row; a straight line for fewer than four rows.

    Args:
        vectors_ND: one vector per row.
        start_N2: initial coordinates, returned by this function before; None: from scratch.
    """
    if len(vectors_ND) < 4:
        return np.stack([np.linspace(0, 1, len(vectors_ND)), np.full(len(vectors_ND), 0.5)], axis=1)
    tsne = TSNE(
        perplexity=min(_PERPLEXITY, (len(vectors_ND) - 1) / 3),
        init="pca" if start_N2 is None else start_N2.astype(np.float32),  # pyright: ignore[reportArgumentType] (says sklearn's guide)
        early_exaggeration=12.0 if start_N2 is None else 1.0,
        random_state=_SEED,
        max_iter=500 if start_N2 is None else 250,
        metric="cosine",
    )
    with threadpool_limits(limits=1):
        return tsne.fit_transform(np.asarray(vectors_ND, dtype=np.float32)).astype(np.float64)


def _to_frame(*maps: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """Scale all maps to a common frame of 0..1, rounded to four decimals."""
    low, high = np.concatenate(maps).min(axis=0), np.concatenate(maps).max(axis=0)
    return [((placed - low) / np.where(high > low, high - low, 1.0)).round(4) for placed in maps]


@dataclass(frozen=True)
class Findings:
    """The results of this module for a run; ``cosines`` are those of each pair's fused vectors, by variant."""

    geometry: tuple[Geometry, ...]
    modality_drops: tuple[ModalityDrop, ...]
    pairs: tuple[Pair, ...]
    cosines: tuple[Mapping[str, float], ...]
    maps: tuple[VectorMap, ...]


def examine(
    workspace: Workspace, variants: Sequence[str], num_pairs: int, params: ExportParams, fit_ids: Sequence[int]
) -> Findings:
    """Read the vectors and compute all results of this module.

    Args:
        workspace: paths of a finished run.
        variants: variants with vectors; the first determines the pairs; the first and the last are mapped.
        num_pairs: number of pairs of each kind.
        params: section of the export that made the vectors.
        fit_ids: item ids seen in training.

    Raises:
        ArtifactError: a file is missing or damaged, or the variants have different items.
    """
    store = ImageStore(workspace.images)
    with_image = np.array([item for item in store.item_ids.tolist() if store.status(item) == "ok"], dtype=np.int64)
    chosen = with_image[sampled(len(with_image), MAX_COMPARED) - 1] if len(with_image) else with_image
    leaves = np.array([path[-1] if path else "" for path in ITEMS.read(workspace.items).sort("item_id")["categories"].to_list()])
    numbers: list[Geometry] = []
    drops: list[ModalityDrop] = []
    pairs: tuple[Pair, ...] = ()
    fused: dict[str, Vectors] = {}
    for variant in variants:
        path = workspace.embeddings(variant)
        image, text, whole = (
            read_vectors(path, column, fill="mean") for column in ("image_embedding", "text_embedding", "embedding")
        )
        if image is None or text is None or whole is None or not chosen.max(initial=0) < len(whole) == len(leaves) + 1:
            problem = "does not have one vector for each item of the tables of items and images"
            raise ArtifactError(str(path), problem, "run `dvc repro` to make it again")
        fused[variant] = whole
        ids = sampled(len(whole) - 1, MAX_COMPARED)
        columns = [pl.col(f"{modality}_embedding").is_not_null() for modality in ("image", "text")]
        present = EMBEDDINGS.query(path, lambda rows, columns=columns: rows.sort("item_id").select(columns))
        has_image, has_text = present.to_numpy().T
        both = chosen[has_text[chosen - 1]]
        dropped = modality_drop(
            variant,
            image[ids],
            text[ids],
            has_image[ids - 1],
            np.isin(ids, with_image),
            has_text[ids - 1],
            np.isin(ids, fit_ids),
            leaves[ids - 1].tolist(),
            params,
        )
        drops += [] if dropped is None else [dropped]
        numbers.append(geometry(variant, image[both], text[both]))
        if variant == variants[0]:
            pairs = conflicting(both, image[both], text[both], num_pairs)
    if not fused:
        return Findings((), (), (), (), ())
    units = {variant: unit_rows(whole.astype(np.float64)) for variant, whole in fused.items()}
    cosines = tuple({v: float(unit[pair.first] @ unit[pair.second]) for v, unit in units.items()} for pair in pairs)
    mapped = np.unique([*sampled(len(fused[variants[0]]) - 1, MAX_MAPPED), *(i for p in pairs for i in (p.first, p.second))])
    places = {int(item): place for place, item in enumerate(mapped.tolist())}
    ends = tuple((places[pair.first], places[pair.second]) for pair in pairs)
    shown = list(dict.fromkeys((variants[0], variants[-1])))
    drawn = [project(fused[shown[0]][mapped])]
    drawn += [project(fused[variant][mapped], drawn[0]) for variant in shown[1:]]
    maps = [
        VectorMap(variant, tuple((float(x), float(y)) for x, y in placed), ends)
        for variant, placed in zip(shown, _to_frame(*drawn), strict=True)
    ]
    return Findings(tuple(numbers), tuple(drops), pairs, cosines, tuple(maps))
