"""Folders that are kept: removed, locked, and one line where they cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sda_core.errors import DownloadError, StorageError
from sda_core.fetch.folders import folder_lock, locked_folder, remove


def test_remove(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("folder", "file", "link", "absent"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with (
        folder_lock(folder),
        folder_lock(tmp_path / "b"),
        pytest.raises(DownloadError, match="another run is writing"),
        folder_lock(folder),
    ):
        pass
    for _ in range(2):
        with folder_lock(folder):
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), folder_lock(tmp_path / "a"):
        raise ValueError("x")
    with folder_lock(tmp_path / "a"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EISDIR, errno.EIO])
def test_what_a_user_can_mend_is_one_line(tmp_path: Path, number: int) -> None:
    with pytest.raises(StorageError, match="cannot be written") as caught, locked_folder(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert "\n" not in str(caught.value)


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), locked_folder(tmp_path / "a"):
        (tmp_path / "none").read_bytes()
