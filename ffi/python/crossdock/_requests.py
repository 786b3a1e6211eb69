"""The structures that a node's calls for rooms need, filled by as few steps as Python allows."""

from __future__ import annotations

import struct
from typing import Any, Dict, List, Sequence, Tuple

from ._abi import address_of, ffi, forked, process
from ._buffers import numbers_of
from .errors import BadArgument, Error
from .pool import Pages, Pool

Request = Tuple[Any, Any, Any, int, Any]
"""The options, their buffer from the list of pages on, this list, its address, and where the room's handle comes."""

PageList = Any
"""Pages for a pool: `Pages`, or their numbers."""

LIST, RECEIVE, SEND = "crossdock_page_list", "crossdock_receive_options", "crossdock_send_options"
LIST_BYTES, RECEIVE_BYTES, SEND_BYTES = (ffi.sizeof(name) for name in (LIST, RECEIVE, SEND))


class _Packer:
    """Writes structures that lie one behind the other by one call: `into(buffer, 0, *values)`. Each is given by the names
    of its fields, which are all it has; those of the last one are its first ones."""

    _FORMATS: Dict[str, str] = {"uint32_t": "I", "uint64_t": "Q", "size_t": "N"}

    def __init__(self, **structures: Sequence[str]) -> None:
        self._formats: Dict[str, str] = {}
        form = "@"
        for structure, names in structures.items():
            fields = ffi.typeof(structure).fields
            if [name for name, _ in fields[: len(names)]] != list(names):
                raise ImportError(f"{structure} of the shared library has other fields than this package knows")
            formats = {name: self._format(field.type) for name, field in fields[: len(names)]}
            form += "".join(formats.values())
            self._formats.update(formats)
        self.into = struct.Struct(form).pack_into

    def _format(self, kind: Any) -> str:
        # A handle is told as the 64-bit number that it is.
        return "P" if kind.kind == "pointer" else self._FORMATS.get(kind.cname, "Q")

    def refused(self, **values: object) -> Error:
        """Which of the values does not fit, where they were refused."""
        for name, value in values.items():
            try:
                struct.pack(self._formats[name], value)
            except struct.error:
                return BadArgument(f"{name} is {value!r}, which does not fit", "", 3)
        raise AssertionError("all of them fit")


_LIST_FIELDS = ["pool", "pages", "ids", "count", "id_bytes", "reserved"]
receive_packer = _Packer(
    crossdock_page_list=_LIST_FIELDS,
    crossdock_receive_options=(
        ["size", "sources", "source_count", "room", "use_count", "tokens", "skip_tokens", "first_layer", "layers"]
        + ["reserved", "pages", "page_lists", "deadline_ms", "user_data"]
    ),
)
send_packer = _Packer(
    crossdock_page_list=_LIST_FIELDS,
    crossdock_send_options=(
        ["size", "ranks", "rank_count", "room", "use_count", "tokens", "pages", "page_lists", "aux", "aux_bytes"]
        + ["deadline_ms", "user_data"]
    ),
)


def request_of(kind: str, nbytes: int) -> Request:
    """The structures of one call: a list of pages and the options behind it, and the room's handle."""
    block = ffi.new("uint64_t[]", (LIST_BYTES + nbytes) // 8)
    entry = ffi.cast(f"{LIST} *", block)
    options = ffi.cast(f"{kind} *", entry + 1)
    return options, ffi.buffer(block), entry, address_of(entry), ffi.new("crossdock_room *")


def lists_of(pools: Sequence[Pool], pages: PageList, more_pages: Sequence[PageList]) -> Tuple[object, int, int]:
    """Lists of pages for all pools: what keeps them alive, where they are, how many."""
    if 1 + len(more_pages) != len(pools):
        message = f"pages for {1 + len(more_pages)} pools; the layout has {len(pools)}"
        raise BadArgument(message, "give `more_pages` for those that were added to it", 3)
    lists = ffi.new(f"{LIST}[]", len(pools))
    kept: List[object] = [lists]
    for entry, pool, given in zip(lists, pools, (pages, *more_pages)):
        kept.append(_fill(entry, pool, given))
    return kept, address_of(lists), len(lists)


def list_of(pool: Pool, pages: PageList) -> Tuple[object, Any]:
    """A list of pages of one pool: what keeps it alive, and a pointer to it."""
    entry = ffi.new(f"{LIST} *")
    return (entry, _fill(entry, pool, pages)), entry


def _fill(entry: Any, pool: Pool, given: PageList) -> object:
    """What keeps the numbers alive."""
    if isinstance(given, Pages):
        if given._pid != process.pid:
            raise forked(given)
        entry.pages = given._handle
        return given
    entry.ids, entry.count, entry.id_bytes = numbers = numbers_of(given)
    entry.pool = pool._handle
    return numbers
