"""Memory that peers write and read."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple, Union

from ._abi import BUSY, address_of, check, check_closed, ffi, forked, lib, made, process, text_or_null
from ._buffers import region_of
from .errors import BadHandle
from .kinds import HugePages, MemoryKind, chosen

# Imported memory that nobody holds any more while a node still reaches it, with its owners.
_lingering: List[Tuple[int, int, object]] = []


class Memory:
    """A range of memory, which a node registers for one region of its layout.

    `Memory(nbytes)` allocates, zeroed, what peers on the same host can map. `Memory.of` uses an array that is there.
    """

    __slots__ = ("_handle", "_pid", "_base", "_owner", "_is_closed", "nbytes", "address", "kind", "fd", "__weakref__")

    def __init__(
        self, nbytes: int, *, name: Optional[str] = None, huge_pages: Union[HugePages, str] = HugePages.NEVER
    ) -> None:
        self._is_closed = True
        options = made("crossdock_memory_options")
        options.huge_pages = chosen(HugePages, "huge_pages", huge_pages)
        options.name = label = text_or_null(name)
        handle = ffi.new("crossdock_memory *")
        check(lib.crossdock_memory_allocate(nbytes, options, handle))
        del label
        self._begin(handle[0], None)

    @classmethod
    def of(cls, array: Any, *, cuda_device: Optional[int] = None) -> Memory:
        """Uses an array's own bytes: a buffer (NumPy, bytearray, mmap), or something with DLPack (PyTorch, JAX, CuPy),
        `__array_interface__` or `__cuda_array_interface__`, for which `cuda_device` names the device. It has to be
        contiguous and writable. It is kept alive until the memory is closed."""
        region = region_of(array, cuda_device)
        return cls.at(region.address, region.nbytes, region.owner, cuda_device=region.cuda_device)

    @classmethod
    def at(cls, address: int, nbytes: int, owner: object = None, *, cuda_device: Optional[int] = None) -> Memory:
        """Uses the bytes at an address. They have to stay there until the memory is closed; `owner` is kept alive so
        long."""
        handle = ffi.new("crossdock_memory *")
        if cuda_device is None:
            check(lib.crossdock_memory_import(ffi.cast("void *", address), nbytes, handle))
        else:
            check(lib.crossdock_memory_import_cuda(address, nbytes, cuda_device, handle))
        memory = cls.__new__(cls)
        memory._begin(handle[0], owner)
        return memory

    def _begin(self, handle: int, owner: object) -> None:
        self._handle: int = handle
        self._pid = process.pid
        self._owner = owner
        self._is_closed = False
        info = made("crossdock_memory_info")
        check(lib.crossdock_memory_describe(handle, info))
        self.nbytes: int = info.bytes
        self.address: int = address_of(info.base)
        self.kind = MemoryKind(info.kind)
        self.fd: int = info.fd
        # What `view` gives holds on to it: the bytes stay where they are as long as anybody looks at them.
        release: Any = _Keep(owner) if self.kind == MemoryKind.PRIVATE else _Close(handle)
        self._base: Any = ffi.gc(ffi.cast("char *", info.base), release)

    def handle(self) -> int:
        """For the node."""
        if self._pid != process.pid:
            raise forked(self)
        if self._is_closed:
            # The library may still have it: for a view.
            raise BadHandle("the memory was closed", "use it only until then", 2)
        return self._handle

    @property
    def view(self) -> memoryview:
        """The bytes themselves, to be read and written. They stay mapped as long as the view lives."""
        self.handle()
        return memoryview(ffi.buffer(self._base, self.nbytes)).cast("B")

    @property
    def __array_interface__(self) -> Dict[str, Any]:
        return {"version": 3, "typestr": "|u1", "shape": (self.nbytes,), "data": self.view}

    def __buffer__(self, flags: int) -> memoryview:
        return self.view

    def __len__(self) -> int:
        return self.nbytes

    def close(self) -> None:
        """Lets the memory go. Allocated memory stays mapped while a node or a view uses it. An array is its owner's
        alone again once this has returned: it raises `Busy` while a node or a connected peer can still reach it."""
        if self._is_closed:
            return
        if self._pid != process.pid:
            raise forked(self)
        if self.kind == MemoryKind.PRIVATE:
            check_closed(lib.crossdock_memory_close(self._handle))
        self._is_closed = True
        self._base = self._owner = None
        sweep()

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._is_closed or self._pid != process.pid or self.kind != MemoryKind.PRIVATE:
            return
        if lib.crossdock_memory_close(self._handle) == BUSY:
            _lingering.append((self._pid, self._handle, self._owner))


class _Keep:
    """Keeps an owner alive as long as it lives itself."""

    __slots__ = ("_owner",)

    def __init__(self, owner: object) -> None:
        self._owner = owner

    def __call__(self, _: Any) -> None:
        self._owner = None


class _Close:
    """Closes allocated memory when nobody looks at it any more."""

    __slots__ = ("_handle", "_pid")

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._pid = process.pid

    def __call__(self, _: Any) -> None:
        if self._pid == process.pid:
            lib.crossdock_memory_close(self._handle)


def sweep() -> None:
    """Lets arrays go whose memory nobody holds and no node reaches any more."""
    for entry in list(_lingering):
        pid, handle, _ = entry
        if pid == process.pid and lib.crossdock_memory_close(handle) == BUSY:
            continue
        try:
            _lingering.remove(entry)
        except ValueError:
            # Somebody else swept it out.
            pass
