# SPDX-License-Identifier: Apache-2.0
"""Memory traffic of a product whose work-groups share a last-level cache, by a simulation of their walk. Modelled.

Each core computes one work-group's tile at a time. All cores step through K together, a chunk at a time, and a chunk of an
operand that the cache does not hold comes from memory; the least recently used leave it. Left out: the sets of the cache,
traffic of anything else, cores that drift apart.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil

CHUNK = 512  # of K


@dataclass(frozen=True)
class Walk:
    """The order in which work-groups of rows x columns begin: down `panel` rows of them, then the next column. 1: by rows."""

    rows: int
    columns: int
    panel: int

    def tiles(self, m: int, n: int) -> Iterator[tuple[int, int]]:
        rows, columns = ceil(m / self.rows), ceil(n / self.columns)
        panels = ceil(rows / self.panel)
        height = ceil(rows / panels)
        for panel in range(panels):
            for column in range(columns):
                yield from ((row, column) for row in range(panel * height, min(rows, (panel + 1) * height)))


class Cache:
    """Of so many bytes; counts the bytes that it had to fetch, or that are written through it."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.traffic = 0.0
        self.held = 0.0
        self.chunks: OrderedDict[Hashable, float] = OrderedDict()

    def touch(self, chunk: Hashable, size: float) -> None:
        if chunk in self.chunks:
            self.chunks.move_to_end(chunk)
            return
        self.traffic += size
        self.held += size
        self.chunks[chunk] = size
        while self.held > self.capacity:
            self.held -= self.chunks.popitem(last=False)[1]


@cache
def traffic(
    m: int, n: int, k: int, walk: Walk, cores: int, capacity: float, bytes_a: float, bytes_b: float, bytes_y: float = 2
) -> float:
    """Bytes from and to memory of y [m, n] = a [m, k] x b [n, k]^T; `bytes_` of an element."""
    cache = Cache(capacity)
    tiles = list(walk.tiles(m, n))
    depth = min(k, CHUNK)
    for first in range(0, len(tiles), cores):
        together = tiles[first : first + cores]
        for chunk in range(ceil(k / depth)):
            for row, column in together:
                cache.touch(("a", row, chunk), walk.rows * depth * bytes_a)
                cache.touch(("b", column, chunk), walk.columns * depth * bytes_b)
        for tile in together:
            cache.touch(("y", tile), walk.rows * walk.columns * bytes_y)
    return cache.traffic
