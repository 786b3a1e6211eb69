"""Other libraries' arrays as they are: nothing is copied, and no element becomes a Python object."""

from __future__ import annotations

import array
from math import prod
from typing import Any, Dict, NamedTuple, Optional, Set, Tuple

from ._abi import address_of, ffi
from .errors import BadArgument

_from_buffer = ffi.from_buffer
# Of numbers in the machine's own order, as a buffer tells them.
_ID_BYTES: Dict[str, int] = {form: array.array(form).itemsize for form in "iIlLqQ"}

# Of arrays that are such buffers, as NumPy's: what their dtype comes to, once one has been looked at.
_dtypes: Dict[object, int] = {}
# Those of tensors that give themselves as such arrays, as PyTorch's.
_tensor_dtypes: Set[object] = set()


class Region(NamedTuple):
    """Bytes of somebody else."""

    address: int
    nbytes: int
    # They stay where they are as long as it lives.
    owner: object
    # `None` for host memory.
    cuda_device: Optional[int]


def region_of(value: Any, cuda_device: Optional[int] = None) -> Region:
    """Where an array's bytes are: a buffer (NumPy, bytearray, mmap), DLPack (PyTorch, JAX, CuPy), or one of the array
    interfaces."""
    try:
        view = memoryview(value)
    except (TypeError, ValueError, BufferError):
        # NumPy has dtypes that no buffer tells, as those of ml_dtypes.
        pass
    else:
        _refuse_unless(value, view.c_contiguous, not view.readonly)
        pointer = ffi.from_buffer("char[]", view, require_writable=True)
        return Region(address_of(pointer), view.nbytes, pointer, None)
    if hasattr(value, "__array_interface__"):
        return _interface_region(value, value.__array_interface__, None)
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        from ._dlpack import tensor_of

        tensor = tensor_of(value)
        _refuse_unless(value, tensor.is_contiguous, not tensor.is_read_only)
        nbytes = prod(tensor.shape) * tensor.item_bytes
        return Region(tensor.address, nbytes, (value, tensor.capsule), tensor.cuda_device)
    if hasattr(value, "__cuda_array_interface__"):
        # The interface tells no device.
        return _interface_region(value, value.__cuda_array_interface__, cuda_device or 0)
    kind = type(value).__name__
    raise TypeError(f"a {kind} is no memory: give a buffer, or something with DLPack or an array interface")


def _interface_region(value: object, interface: Any, cuda_device: Optional[int]) -> Region:
    from ._dlpack import is_compact

    shape = tuple(interface["shape"])
    item_bytes = int(interface["typestr"][2:])
    nbytes = prod(shape) * item_bytes
    strides = interface.get("strides")
    is_contiguous = strides is None or is_compact(shape, tuple(strides), item_bytes)
    data = interface.get("data")
    if not isinstance(data, tuple):
        # Such an object is the buffer itself, or names another that is, and where in it.
        whole, offset = region_of(data), int(interface.get("offset", 0))
        if offset < 0 or offset + nbytes > whole.nbytes:
            raise BadArgument(f"{nbytes} bytes from {offset} of a buffer of {whole.nbytes}", "", 3)
        _refuse_unless(value, is_contiguous, True)
        return whole._replace(address=whole.address + offset, nbytes=nbytes)
    address, is_read_only = data
    _refuse_unless(value, is_contiguous, not is_read_only)
    return Region(address, nbytes, value, cuda_device)


def _refuse_unless(value: object, is_contiguous: bool, is_writable: bool) -> None:
    kind = type(value).__name__
    if not is_contiguous:
        advice = "allocate it in one piece, in C order: a copy would not be what peers write"
        raise BadArgument(f"the bytes of this {kind} do not follow each other", advice, 3)
    if not is_writable:
        raise BadArgument(f"this {kind} is read-only", "give memory that peers may write", 3)


def numbers_of(ids: Any) -> Tuple[Any, int, int]:
    """Page numbers as C reads them: a pointer, which keeps them alive, how many, and the bytes of each. Integers of 4
    or 8 bytes that follow each other are passed as they are; with gaps between they are copied."""
    try:
        dtype = getattr(ids, "dtype", None)
        known = _dtypes.get(dtype)
        if known is not None and ids.ndim == 1:
            return _from_buffer(ids), len(ids), known
        if dtype in _tensor_dtypes:
            return numbers_of(ids.numpy())
    except (TypeError, ValueError, RuntimeError, BufferError):
        # With gaps between them, no buffer, or on a GPU.
        dtype = None
    try:
        view = memoryview(ids)
    except TypeError:
        return _other_numbers(ids)
    id_bytes = _ID_BYTES.get(view.format)
    if id_bytes is None or view.ndim != 1:
        raise TypeError(
            f"page numbers of format {view.format!r} in {view.ndim} dimensions: give 4 or 8-byte integers in one"
        )
    if not view.c_contiguous:
        return _from_buffer(view.tobytes()), len(view), id_bytes
    if dtype is not None:
        _dtypes[dtype] = id_bytes
    return _from_buffer(ids), len(view), id_bytes


def _other_numbers(ids: Any) -> Tuple[Any, int, int]:
    if not hasattr(ids, "__dlpack__"):
        # Negative ones are refused by the library, with all others that no pool has.
        return numbers_of(array.array("q", ids))
    try:
        as_array = ids.numpy()
    except (AttributeError, TypeError, RuntimeError):
        # Not PyTorch's, or on a GPU, or built without NumPy.
        pass
    else:
        numbers = numbers_of(as_array)
        _tensor_dtypes.add(ids.dtype)
        return numbers
    from ._dlpack import tensor_of

    tensor = tensor_of(ids)
    if tensor.cuda_device is not None:
        raise TypeError("page numbers on a GPU: copy them to the host first")
    if not tensor.is_integer or tensor.item_bytes not in (4, 8) or len(tensor.shape) != 1:
        raise TypeError("page numbers of this tensor: give 4 or 8-byte integers in one dimension")
    if not tensor.is_contiguous:
        raise TypeError("the page numbers of this tensor have gaps between them: make it contiguous first")
    keep = tensor.capsule
    pointer = ffi.gc(ffi.cast("char *", tensor.address), lambda _: keep)
    return pointer, tensor.shape[0], tensor.item_bytes
