"""Records kept in memory once made, for datasets that fit."""

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]


class Memory:
    """Records by index. Made anew each time unless `keep`.

    A worker process fills its own memory: pixels are not worth a pipe.
    """

    def __init__(self, keep: bool):
        self._kept: dict[int, Record] | None = {} if keep else None

    def get(self, index: int, make: Callable[[int], Record]) -> Record:
        """Return `make(index)`, or the very record that it gave before."""
        if self._kept is None:
            return make(index)
        if index not in self._kept:
            self._kept[index] = make(index)
        return self._kept[index]

    def __reduce__(self) -> tuple[type["Memory"], tuple[bool]]:
        return Memory, (self._kept is not None,)
