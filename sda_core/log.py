"""Logging and progress: the library only speaks through ``logging.getLogger(__name__)`` and :func:`progress`."""

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
NO_PROGRESS = "SDA_NO_PROGRESS"  # set for processes that run side by side, whose bars would overwrite each other


class Progress(Protocol):
    """What a progress bar can do."""

    def update(self, n: int = 1) -> object:
        """Advance by ``n`` units."""
        ...

    def set_postfix_str(self, text: str) -> object:
        """Show a short text behind the bar."""
        ...


def is_main_process() -> bool:
    """Whether this is process 0 of a run (``RANK`` is set by torchrun and accelerate)."""
    return os.environ.get("RANK", "0") == "0"


def _quiet() -> bool:
    return not (is_main_process() and sys.stderr.isatty()) or NO_PROGRESS in os.environ


@contextmanager
def progress(total: int | None, description: str, unit: str, initial: int = 0) -> Generator[Progress]:
    """A progress bar; silent off a terminal and off process 0.

    Args:
        total: number of units, or None where it is not known.
        description: a few words, e.g. the stage's name.
        unit: what is counted, e.g. ``"items"`` or ``"B"``.
        initial: units done before (a resumed run).
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
    """Iterate with a progress bar; silent off a terminal and off process 0."""
    yield from tqdm(iterable, total=total, desc=description, unit=unit, disable=_quiet(), leave=False)


def show_any_text() -> None:
    """Let output and log show every text: what their encoding cannot express is escaped, as in ``\\u8d64``.

    A title may hold any character, and the encoding is the terminal's or, for a redirected output, the system's.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None without a console; a replacement of the caller's stays as it is
            stream.reconfigure(errors="backslashreplace")


def buffer_output() -> None:
    """Give an output without a buffer (``PYTHONUNBUFFERED``) one; each line is still written at once.

    Without a buffer Python drops what a single write left over, as on a disk that is almost full, and raises nothing.
    """
    stream = sys.stdout
    if stream is not sys.__stdout__ or not isinstance(stream, io.TextIOWrapper):  # None, or a replacement of the caller's
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
