"""Logging and progress: the library prints only through ``logging.getLogger(__name__)`` and :func:`progress`."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")
NO_PROGRESS = "SDA_NO_PROGRESS"  # set for parallel processes, whose bars would overwrite each other


class Progress(Protocol):
    """Interface of a progress bar."""

    def update(self, n: int = 1) -> object:
        """Advance by ``n`` units."""
        ...

    def set_postfix_str(self, text: str) -> object:
        """Show a short text after the bar."""
        ...


def is_main_process() -> bool:
    """Whether this is process 0 of a run (``RANK`` is set by torchrun and accelerate)."""
    return os.environ.get("RANK", "0") == "0"


def _quiet() -> bool:
    return not (is_main_process() and sys.stderr.isatty()) or NO_PROGRESS in os.environ


@contextmanager
def progress(total: int | None, description: str, unit: str, initial: int = 0) -> Generator[Progress]:
    """Context with a progress bar, shown only on a terminal of process 0.

    Args:
        total: number of units; None if unknown.
        description: a few words, e.g. the stage's name.
        unit: the counted unit, e.g. ``"items"`` or ``"B"``.
        initial: number of units done before (a resumed run).
    """
    with tqdm(
        total=total, desc=description, unit=unit, initial=initial, disable=_quiet(), unit_scale=unit == "B", leave=False
    ) as bar:

        class _Bar:
            def update(self, n: int = 1) -> object:
                return bar.update(n)

            def set_postfix_str(self, text: str) -> object:
                return bar.set_postfix_str(text)

        yield _Bar()


def track(iterable: Iterable[T], total: int | None, description: str, unit: str) -> Iterator[T]:
    """Iterate with a progress bar, shown only on a terminal of process 0."""
    yield from tqdm(iterable, total=total, desc=description, unit=unit, disable=_quiet(), leave=False)


def show_any_text() -> None:
    """Make output and log accept every text: characters outside of their encoding are escaped, as in ``\\u8d64``.

    A title may contain any character, and the encoding is the terminal's or, for redirected output, the system's.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None without a console; a stream set by the caller is not changed
            stream.reconfigure(errors="backslashreplace")


def buffer_output() -> None:
    """Add a buffer to an unbuffered output (``PYTHONUNBUFFERED``); each line is still written at once.

    Without a buffer Python silently drops the rest of an incomplete write, for example on a disk that is almost full.
    """
    stream = sys.stdout
    if stream is not sys.__stdout__ or not isinstance(stream, io.TextIOWrapper):  # None, or set by the caller
        return
    raw, encoding = stream.buffer, stream.encoding
    if isinstance(raw, io.RawIOBase):
        stream.detach()
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, line_buffering=True)  # type: ignore[misc]


def configure() -> None:
    """Send the package's log to stderr, once; called by the stages and experiments only."""
    show_any_text()
    root = logging.getLogger()
    if any(getattr(handler, "_sda", False) for handler in root.handlers):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S"))
    handler._sda = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    level = logging.INFO if is_main_process() else logging.WARNING
    logging.getLogger("sda_core").setLevel(level)
    logging.getLogger("stages").setLevel(level)
