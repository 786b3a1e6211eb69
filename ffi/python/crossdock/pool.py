"""Which pages are free, and what every other page is waiting for."""

from __future__ import annotations

import array
from typing import Any, NamedTuple, Union

from ._abi import BUFFER_TOO_SMALL, NULL, OK, check, check_closed, failure, ffi, forked, lib, made, process
from ._buffers import numbers_of
from .layout import Layout


class PoolStats(NamedTuple):
    """The counts of a pool, all of one moment. Every page is in exactly one of `free`, `owned`, `granted`,
    `quarantined`, `abandoned` and `shared`."""

    pages: int
    free: int
    """Pages that no room uses and nobody has taken."""
    owned: int
    """Pages that were taken."""
    granted: int
    """Pages that a peer may write."""
    quarantined: int
    """Pages whose room has ended and that a peer can still write."""
    abandoned: int
    """Pages that can never come home."""
    shared: int
    """Pages that are being sent, or are shared."""
    largest_run: int
    """The longest run of free pages; 0 where the engine's allocator chooses."""
    lowest_free: int
    """The fewest pages that were ever free."""
    under_pressure: bool
    """Whether the free pages fell below the low watermark and have not come up to the high one since."""
    takes: int
    """How often pages were taken."""
    failed_takes: int
    """How often they could not be."""


class Pool:
    """Knows of each page of a cache who holds it.

    Where the engine has an allocator of its own, rooms name the pages. A pool that `allocates` hands them out: `take`.
    """

    __slots__ = ("_handle", "_pid", "_is_closed", "__weakref__")

    def __init__(
        self,
        pages: Union[int, Layout],
        *,
        allocates: bool = False,
        low_watermark: int = 0,
        high_watermark: int = 0,
    ) -> None:
        """Over so many pages, or as many as the pages of the tokens in a layout. Pressure begins when fewer pages than
        `low_watermark` are free, and ends when at least `high_watermark` are."""
        self._is_closed = True
        options = made("crossdock_pool_options")
        options.pages = pages.pages if isinstance(pages, Layout) else pages
        options.allocates = allocates
        options.low_watermark, options.high_watermark = low_watermark, high_watermark
        handle = ffi.new("crossdock_pool *")
        check(lib.crossdock_pool_create(options, handle))
        self._handle: int = handle[0]
        self._pid = process.pid
        self._is_closed = False

    def take(self, count: int) -> Pages:
        """Takes pages, of a pool that allocates."""
        self._here()
        handle = ffi.new("crossdock_pages *")
        check(lib.crossdock_pool_take(self._handle, count, handle))
        return Pages(handle[0])

    def adopt(self, ids: Any) -> Pages:
        """Takes pages by their numbers, of a pool that does not allocate: all of them or, with an error, none. Raises `PageInUse`
        where a room still sends or serves one of them, or a peer may write it."""
        self._here()
        handle = ffi.new("crossdock_pages *")
        pages = ffi.new("crossdock_page_list *")
        pages.pool = self._handle
        # The numbers are read during the call, and live as long.
        numbers = numbers_of(ids)
        pages.ids, pages.count, pages.id_bytes = numbers
        check(lib.crossdock_pool_adopt(pages, handle))
        return Pages(handle[0])

    def stats(self) -> PoolStats:
        """What the pages are doing."""
        self._here()
        stats = made("crossdock_pool_stats")
        check(lib.crossdock_pool_get_stats(self._handle, stats))
        told = {name: getattr(stats, name) for name in PoolStats._fields}
        return PoolStats(**{**told, "under_pressure": bool(stats.under_pressure)})

    def _here(self) -> None:
        if self._pid != process.pid:
            raise forked(self)

    def close(self) -> None:
        """Lets the pool go. Pages that are out come home to it all the same, and rooms that use it go on."""
        if not self._is_closed:
            self._here()
            self._is_closed = True
            check_closed(lib.crossdock_pool_close(self._handle))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._is_closed and self._pid == process.pid:
            lib.crossdock_pool_close(self._handle)


class Pages:
    """Pages that were taken from a pool, in an order. A room that receives consumes them, and gives them back as new
    ones: `Receiving.take_pages`. One that sends does not."""

    __slots__ = ("_handle", "_pid", "_is_closed", "__weakref__")

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._pid = process.pid
        self._is_closed = False

    @property
    def ids(self) -> array.array[int]:
        """Their numbers, in their order, as 32-bit numbers; NumPy takes them as they are."""
        self._here()
        count = len(self)
        ids = array.array("I", bytes(4 * count))
        check(lib.crossdock_pages_ids(self._handle, ffi.from_buffer("uint32_t[]", ids), count, NULL))
        return ids

    def __len__(self) -> int:
        self._here()
        count = ffi.new("size_t *")
        status = lib.crossdock_pages_ids(self._handle, NULL, 0, count)
        if status not in (OK, BUFFER_TOO_SMALL):
            raise failure(status)
        return int(count[0])

    def _here(self) -> None:
        if self._pid != process.pid:
            raise forked(self)

    def close(self) -> None:
        """Gives the pages back to their pool. Rooms that send them keep them until they are over."""
        if not self._is_closed:
            self._here()
            self._is_closed = True
            check_closed(lib.crossdock_pages_close(self._handle))

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._is_closed and self._pid == process.pid:
            lib.crossdock_pages_close(self._handle)
