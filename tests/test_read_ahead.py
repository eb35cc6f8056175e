"""Values that a thread takes from an iterator while the caller works."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from sda_core.read_ahead import read_ahead


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_the_same_values_in_the_same_order(depth: int) -> None:
    assert list(read_ahead(iter(range(7)), depth)) == list(range(7))
    assert list(read_ahead(iter([None, None]), depth)) == [None, None]
    assert list(read_ahead(iter(()), depth)) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_the_depth_is_taken_before_it_is_asked_for(depth: int) -> None:
    taken: list[int] = []
    is_full = threading.Event()

    def values() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            if number == depth:
                is_full.set()
            yield number

    ahead = read_ahead(values(), depth)
    assert next(ahead) == 0
    assert is_full.wait(10)
    ahead.close()  # type: ignore[attr-defined]
    assert taken == list(range(depth + 1))


def test_an_error_comes_at_its_place() -> None:
    def values() -> Iterator[int]:
        yield 1
        raise ValueError("torn")

    ahead = read_ahead(values(), 2)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="torn"):
        next(ahead)
