"""Prepare inputs in a thread while the caller works on the previous ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

T = TypeVar("T")


def read_ahead(values: Iterator[T], depth: int = 1) -> Iterator[T]:
    """Yield the same values in the same order, read from the iterator by one thread.

    Args:
        values: iterator that reads, decodes or computes values; its exceptions are raised here.
        depth: maximum number of waiting values, held in addition to the one in use.
    """
    end = object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        waiting = deque(reader.submit(next, values, end) for _ in range(depth))
        try:
            while (value := waiting.popleft().result()) is not end:
                waiting.append(reader.submit(next, values, end))
                yield cast("T", value)
        finally:
            for future in waiting:
                future.cancel()
