"""Lock folders that are kept between runs, and report in one line if they cannot be written.

The lock is one of the operating system, on a file next to the folder: it is released when a process is killed, so there are
no stale locks.
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

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})  # on some network file systems


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path) -> Generator[None]:
    """Context that creates ``folder`` if needed and locks it for this process.

    Raises:
        DownloadError: another process has locked it.
        StorageError: a file cannot be written.
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
    """Context that locks ``folder`` for this process.

    Raises:
        DownloadError: another process has locked it.
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
        _log.warning("%s cannot be locked (%s); check that no other run writes there", folder, error)
    try:
        yield
    finally:
        with suppress(PermissionError):  # on Windows the file is open
            path.unlink(missing_ok=True)  # while the lock is held, so that it is not another process's file
        lock.release()
