"""Reading ahead: the next batches are fetched from the mapped files while the network works on this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Yield the items in order while one thread is up to `depth` items ahead; 0 reads when asked.

    What the source raises is raised here, in its place in the order; the thread ends with the iterator, at once
    where that is closed.

    >>> list(read_ahead(range(3), depth=2))
    [0, 1, 2]
    """
    if depth < 1:
        yield from items
        return
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        waiting: deque[Future[Any]] = deque(reader.submit(next, source, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(reader.submit(next, source, end))
                yield item
        finally:
            for future in waiting:
                future.cancel()
