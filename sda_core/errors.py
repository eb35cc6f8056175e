"""The exceptions of SDA.

::

    SDAError
    ├── ConfigError     params.yaml, a preset or a command-line option is wrong
    ├── ArtifactError   a file of the pipeline is missing, damaged or of another schema
    ├── DownloadError   a source cannot be reached, or its response is not the expected data
    ├── DataError       the data was read, but cannot be used with these settings
    ├── StorageError    a file cannot be written or read: disk full, read-only, no permission
    └── TrainingError   a training run cannot continue (non-finite loss, nothing to adapt, ...)

A message is one line: where, found, expected, what to do.  The stages print it and exit with 1; every other exception is a
bug and keeps its traceback.
"""

import errno
import os
import re
from typing import cast


class SDAError(Exception):
    """Base class of all errors that a user can fix.

    Args:
        where: the file, parameter or stage concerned, e.g. ``"params.yaml: filter.min_user_interactions"``.
        problem: the value found, and the value expected.
        advice: the remedy; optional if the problem implies it.

    Attributes:
        known_to_all: whether every process of the launch raises this error, so that only process 0 needs to report it.
    """

    known_to_all = False

    def __init__(self, where: str, problem: str, advice: str = "") -> None:
        self.where = where
        self.problem = problem
        self.advice = advice
        text = f"{where}: {problem}"
        if advice:
            text += f"; {advice}"
        super().__init__(" ".join(text.split()))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Keep the three parts when the error crosses a process border."""
        return (type(self), (self.where, self.problem, self.advice))


class ConfigError(SDAError):
    """``params.yaml``, a preset or a command-line option is wrong."""


class ArtifactError(SDAError):
    """A file of the pipeline is missing or damaged, or has an unexpected schema."""


class DownloadError(SDAError):
    """A source cannot be reached, or its response is not the expected data."""


class DataError(SDAError):
    """The data was read, but cannot be used with these settings (empty after filtering, too many bad lines)."""


class TrainingError(SDAError):
    """A training run cannot continue: non-finite loss, nothing to adapt, no user left to train on."""


class StorageError(SDAError):
    """A file or folder cannot be written or read: the disk is full or read-only, or a permission is missing."""


# ------------------------------------------------------------------------------------------ failures of storage
_FREE = "free some space and run the same command again"
_ADVICE = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: "free some space or raise the disk quota, and run the same command again",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`), and run the same command again",
    errno.EROFS: "mount the file system writable, or use another folder",
    errno.EACCES: "change its permissions, or use another folder",
    errno.EPERM: "change its permissions, or use another folder",
    errno.EIO: "check the disk, and run the same command again",
    errno.EISDIR: "move the folder away",
    errno.ENOTDIR: "move away the file whose path should be a folder",
    errno.EEXIST: "move away the file whose path should be a folder",
    errno.ELOOP: "remove the loop of symbolic links",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.EBUSY: "close the program that uses it, and run the same command again",
    errno.ETXTBSY: "close the program that uses it, and run the same command again",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`), and run the same command again",
    errno.ENFILE: "raise the limit on open files, and run the same command again",
}
"""Remedies by error number.  A missing file is not included, because its reader knows which command makes it."""
_ONLY_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}

_RUST = re.compile(r"\(os error (\d+)\)")  # polars, safetensors
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy
_LIBRARY_TEXTS = {  # texts that FAISS and torch quote in a RuntimeError
    os.strerror(number): number for number in (*sorted(_ONLY_WRITING), errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR)
}


def storage_errno(error: BaseException) -> int | None:
    """The error number of the failed system call behind an exception; None if it is not a storage failure.

    Libraries written in Rust and C++ give the number only in the message: polars raises ``OSError`` without ``errno`` or
    ``ComputeError``, safetensors ``SafetensorError``, FAISS and torch ``RuntimeError``.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _ADVICE else None
    if isinstance(error, SDAError) or not isinstance(error, Exception):
        return None
    text = str(error)
    found = _RUST.search(text)
    if found is not None:
        return int(found[1]) if int(found[1]) in _ADVICE else None
    if isinstance(error, OSError) and _SHORT_WRITE.search(text):
        return errno.ENOSPC
    number = next((number for told, number in _LIBRARY_TEXTS.items() if told in text), None)
    return storage_errno(error.__cause__) if number is None and error.__cause__ is not None else number


def failed_path(error: BaseException) -> str | None:
    """The path in the error of a failed system call; None if it has none.

    For a copy that could not be written it is the destination, although Python names the source first.
    """
    if not isinstance(error, OSError):
        return None
    first, second = cast("tuple[object, object]", (error.filename, error.filename2))
    named = second if error.errno in _ONLY_WRITING and second is not None else first
    return os.fsdecode(named) if isinstance(named, str | bytes) else None


def storage_error(error: BaseException, where: str, verb: str = "written") -> StorageError | None:
    """Convert an exception to an error of one line; None if it is not a storage failure.

    Args:
        error: the exception.
        where: the path that could not be used.
        verb: ``written``, ``read``, or another participle for the failed operation.
    """
    number = storage_errno(error)
    if number is None:
        return None
    done = "written" if number in _ONLY_WRITING else verb
    return StorageError(where, f"cannot be {done} ({os.strerror(number)})", _ADVICE[number])
