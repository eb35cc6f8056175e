"""Store the negatives of the sampled protocols: drawn once for all variants, hashed, checked on use.

There is one table per protocol, :data:`sda_core.artifacts.NEGATIVES`, whose metadata hold protocol, seed and the SHA-256 of
the negatives (:func:`sda_core.evaluation.candidates_hash`).  Positions and metrics computed with them store the same hash, so
that results with other negatives are not compared.  Under ``fullrank`` the table is empty and not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sda_core.artifacts import NEGATIVES, SEED_POSITIONS
from sda_core.errors import ArtifactError
from sda_core.evaluation.protocols import NUM_NEGATIVES, Ids, candidates, candidates_hash, evaluated_users
from sda_core.params import EvaluateParams

HASH = "negatives_sha256"
_ADVICE = "run `dvc repro` to draw them again, or bring params.yaml back"


@dataclass(frozen=True)
class Negatives:
    """The items among which the targets of all variants are ranked."""

    table_UN: Ids | None  # rows as in evaluated_users; None: every item that a user has not seen
    sha256: str | None

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata for positions and metrics: the hash; empty without negatives."""
        return {} if self.sha256 is None else {HASH: self.sha256}


def _identity(params: EvaluateParams) -> dict[str, str]:
    seed = {} if params.protocol == "fullrank" else {"seed": str(params.negatives_seed)}
    return {"protocol": params.protocol, **seed}


def write_negatives(path: Path, interactions: pl.DataFrame, params: EvaluateParams, num_items: int) -> Negatives:
    """Draw the negatives of a protocol and write them; equal arguments give equal bytes.

    Args:
        path: path of the file; see ``Workspace.negatives``.
        interactions: the whole table, all splits.
        params: protocol and seed.
        num_items: I.

    Raises:
        DataError: see :func:`sda_core.evaluation.candidates`.
    """
    table_UN = candidates(params.protocol, interactions, params.negatives_seed, num_items)
    drawn = Negatives(table_UN, None if table_UN is None else candidates_hash(table_UN))
    users = np.zeros(0, dtype=np.int32) if table_UN is None else evaluated_users(interactions)
    rows_UN = np.zeros((0, NUM_NEGATIVES), dtype=np.int32) if table_UN is None else table_UN
    columns = {"user_id": users, "candidates": pl.Series(rows_UN, dtype=NEGATIVES.columns["candidates"])}
    hashed = {} if drawn.sha256 is None else {"sha256": drawn.sha256}
    NEGATIVES.write(pl.DataFrame(columns), path, {**_identity(params), **hashed})
    return drawn


def read_negatives(path: Path, interactions: pl.DataFrame, params: EvaluateParams) -> Negatives:
    """Read the stored negatives of a protocol; under ``fullrank`` there are none, and no file is needed.

    Raises:
        ArtifactError: the file is missing or damaged, was drawn for another protocol, seed or other users, or its rows do
            not match their hash.
    """
    if params.protocol == "fullrank":
        return Negatives(None, None)
    frame, metadata = NEGATIVES.read(path), NEGATIVES.metadata(path)
    for key, expected in _identity(params).items():
        if metadata.get(key) != expected:
            raise ArtifactError(str(path), f"was drawn with {key} {metadata.get(key)}, params.yaml says {expected}", _ADVICE)
    if not np.array_equal(frame["user_id"].to_numpy(), evaluated_users(interactions)):
        raise ArtifactError(str(path), "has other users than those with a test target", _ADVICE)
    table_UN = frame["candidates"].to_numpy()
    sha256 = candidates_hash(table_UN)
    if metadata.get("sha256") != sha256:
        raise ArtifactError(str(path), f"its negatives have sha256 {sha256}, its metadata says {metadata.get('sha256')}", _ADVICE)
    return Negatives(table_UN, sha256)


def negatives_of(path: Path) -> dict[str, str]:
    """The hash of the negatives in the metadata of a positions file, as :attr:`Negatives.metadata`."""
    metadata = SEED_POSITIONS.metadata(path)
    return {HASH: metadata[HASH]} if HASH in metadata else {}


def check_same_negatives(paths: Iterable[Path]) -> None:
    """Check that positions files were computed with the same negatives, as far as they have a hash.

    Raises:
        ArtifactError: two files have different hashes.
    """
    first: tuple[Path, str] | None = None
    for path in paths:
        sha256 = negatives_of(path).get(HASH)
        if sha256 is None:
            continue
        first = first or (path, sha256)
        if sha256 != first[1]:
            problem = f"was ranked among other negatives ({sha256[:12]}) than {first[0]} ({first[1][:12]})"
            raise ArtifactError(str(path), problem, "evaluate both in the same way; such numbers cannot be compared")
