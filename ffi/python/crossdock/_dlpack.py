"""Where a tensor that speaks DLPack is. Nothing is copied, and the tensor stays its owner's."""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Dict, NamedTuple, Optional, Tuple

from .errors import BadArgument, Unsupported

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
# For CUDA: the producer is not to wait for any stream, since nothing reads the bytes here.
_NO_STREAM = -1
_READ_ONLY = 1


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype = ctypes.c_int
_is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Tensor(NamedTuple):
    """What a capsule describes."""

    address: int
    shape: Tuple[int, ...]
    item_bytes: int
    is_integer: bool
    is_contiguous: bool
    is_read_only: bool
    cuda_device: Optional[int]
    # Keeps the bytes where they are.
    capsule: object


def tensor_of(value: Any) -> Tensor:
    """Asks `value.__dlpack__`. The capsule is not consumed: it gives the bytes back when it goes."""
    try:
        device = int(value.__dlpack_device__()[0])
    except (ValueError, RuntimeError, BufferError) as error:
        # PyTorch's tensors without memory.
        raise _refused(value, error) from error
    if device not in (CPU, CUDA, CUDA_HOST, CUDA_MANAGED):
        raise Unsupported(f"a tensor on DLPack device {device}", "give host or CUDA memory", 9)
    is_cuda = device in (CUDA, CUDA_MANAGED)
    capsule = _capsule_of(value, {"stream": _NO_STREAM} if is_cuda else {})
    if _is_valid(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise Unsupported(f"DLPack {versioned.major}.{versioned.minor}", "this library knows version 1", 9)
        return _described(versioned.tensor, bool(versioned.flags & _READ_ONLY), is_cuda, capsule)
    return _described(_Tensor.from_address(_pointer(capsule, b"dltensor")), False, is_cuda, capsule)


def _capsule_of(value: Any, options: Dict[str, Any]) -> Any:
    try:
        return _asked(value, options)
    except (BufferError, RuntimeError, ValueError) as error:
        # PyTorch tells DLPack nothing of FP8, old ones nothing of booleans; of their bytes it does.
        as_bytes = _as_bytes(value)
        if as_bytes is None:
            raise _refused(value, error) from error
        try:
            return _asked(as_bytes, options)
        except (BufferError, RuntimeError, ValueError):
            raise _refused(value, error) from error


def _asked(value: Any, options: Dict[str, Any]) -> Any:
    try:
        return value.__dlpack__(max_version=(1, 0), **options)
    except TypeError:
        # A producer from before there were versions.
        return value.__dlpack__(**options)


def _as_bytes(value: Any) -> Any:
    """A tensor of PyTorch whose elements have one byte, as such bytes in the same place; `None` for anything else."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor) or value.element_size() != 1:
        return None
    return value.view(torch.uint8)


def _refused(value: object, error: Exception) -> BadArgument:
    advice = "give a dense tensor that has memory"
    return BadArgument(f"this {type(value).__name__} tells no memory: {error}", advice, 3)


def _described(tensor: Any, is_read_only: bool, is_cuda: bool, capsule: object) -> Tensor:
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    return Tensor(
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=shape,
        item_bytes=(tensor.bits * tensor.lanes + 7) // 8,
        is_integer=tensor.code in (0, 1) and tensor.lanes == 1,
        is_contiguous=strides is None or is_compact(shape, strides, 1),
        is_read_only=is_read_only,
        cuda_device=tensor.device_id if is_cuda else None,
        capsule=capsule,
    )


def is_compact(shape: Tuple[int, ...], strides: Tuple[int, ...], step: int) -> bool:
    """Whether items follow each other without gaps, the last dimension fastest."""
    if 0 in shape:
        return True
    for extent, stride in zip(reversed(shape), reversed(strides)):
        if extent != 1 and stride != step:
            return False
        step *= extent
    return True
