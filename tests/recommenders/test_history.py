"""The validation curves of the seeds on disk, their mean, and what is chosen by."""

from __future__ import annotations

from pathlib import Path

import pytest

from sda_core.artifacts import Workspace, write_tsv
from sda_core.errors import ArtifactError
from sda_core.recommenders import EpochRecord
from sda_core.recommenders.history import EpochMean, best_ndcg, mean_over_seeds, read_history, validation_metrics

LONG = [EpochRecord(1, 4.0, None, False), EpochRecord(2, 3.0, 0.1, True), EpochRecord(3, 2.0, None, False),
        EpochRecord(4, 1.0, 0.05, False)]  # fmt: skip
SHORT = [EpochRecord(1, 2.0, None, False), EpochRecord(2, 1.0, 0.3, True)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for records in (LONG, []):
        write_tsv(tmp_path / "history.tsv", records)
        assert read_history(tmp_path) == records


@pytest.mark.parametrize("content", [b"epoch\tloss\n1\tx\n", b"\xff\xfe", b"epoch\tloss\tvalid_ndcg_10\tis_best\na\tb\tc\td\n"])
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ArtifactError, match="validation curve is missing; run `dvc repro`"):
        read_history(tmp_path)
    (tmp_path / "history.tsv").write_bytes(content)
    with pytest.raises(ArtifactError, match="is not a validation curve") as caught:
        read_history(tmp_path)
    assert "train it again" in str(caught.value)


def test_the_mean_curve_goes_on_with_the_last_values_of_a_seed_that_has_stopped() -> None:
    assert mean_over_seeds([LONG, SHORT]) == [
        EpochMean(1, 3.0, None, 2),
        EpochMean(2, 2.0, 0.2, 2),
        EpochMean(3, 1.5, None, 1),
        EpochMean(4, 1.0, pytest.approx(0.175), 1),
    ]
    assert [row.valid_ndcg_10 for row in mean_over_seeds([SHORT])] == [None, 0.3]
    assert mean_over_seeds([[]]) == []


def test_variants_are_chosen_by_the_mean_of_the_seeds_best(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for seed, records in ((1, LONG), (2, SHORT)):
        write_tsv(workspace.model("sda", "sasrec", seed) / "history.tsv", records)
    write_tsv(workspace.model("sda", "pop", 0) / "history.tsv", [])
    assert best_ndcg(LONG) == 0.1
    assert validation_metrics(workspace, "sda", "sasrec", (1, 2)) == {"valid_ndcg@10": pytest.approx(0.2)}
    assert validation_metrics(workspace, "sda", "pop", (0,)) == {}
