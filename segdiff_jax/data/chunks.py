"""Records read in threads, a chunk ahead of whoever uses them."""

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(
    read: Callable[[int], T], numbers: Sequence[int], size: int
) -> Generator[list[T], None, None]:
    """Yield `read` of `size` of the numbers at a time, in order, while it reads the next ones."""
    waiting = []
    pool = ThreadPoolExecutor(min(size, 2 * (os.cpu_count() or 1)))
    try:
        for start in range(0, len(numbers), size):
            waiting.append(pool.map(read, numbers[start : start + size]))
            if len(waiting) == 2:
                yield list(waiting.pop(0))
        for last in waiting:
            yield list(last)
    finally:
        pool.shutdown(cancel_futures=True)  # nobody may want the rest
