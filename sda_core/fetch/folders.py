"""Folders that are kept between runs: one run at a time, and one clear line where they cannot be written.

The lock is the operating system's, on a file beside the folder: a killed process loses it at once, so there is no
stale lock to detect.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sda_core.errors import DownloadError, failed_path, storage_error

_log = logging.getLogger(__name__)

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})  # of some network file systems


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path) -> Generator[None]:
    """Make ``folder`` where it is missing, and hold it for this process until the block ends.

    Raises:
        DownloadError: another process holds it.
        StorageError: something cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            yield
    except OSError as error:
        if (failure := storage_error(error, failed_path(error) or str(folder))) is None:
            raise
        raise failure from None


@contextmanager
def folder_lock(folder: Path) -> Generator[None]:
    """Hold ``folder`` for this process until the block ends.

    Raises:
        DownloadError: another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock.tmp")
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise DownloadError(str(folder), "another run is writing to it", "wait for that run to end, or stop it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning("%s cannot be locked (%s); make sure that no other run writes there", folder, error)
    try:
        yield
    finally:
        with suppress(PermissionError):  # on Windows the file is open
            path.unlink(missing_ok=True)  # while it is held, so that nobody else's goes
        lock.release()
