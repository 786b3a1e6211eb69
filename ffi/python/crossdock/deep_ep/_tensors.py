"""What the calls need of the arrays of NumPy and the tensors of PyTorch."""

from __future__ import annotations

import sys
from typing import Any, Tuple, Type, Union

import numpy

from ..errors import BadArgument, Unsupported

INDICES = ("int32", "int64")


class NumpyKind:
    """Arrays of NumPy: bfloat16 as 16-bit integers or ml_dtypes', FP8 as 8-bit ones or ml_dtypes'."""

    @staticmethod
    def numbers(tensor: Any) -> Any:
        return numpy.asarray(tensor)

    @staticmethod
    def bits(tensor: Any, nbytes: int) -> Any:
        array = numpy.ascontiguousarray(tensor)
        if array.dtype.itemsize != nbytes or array.dtype in (numpy.float16, numpy.bool_):
            raise _wrong_type(array.dtype, nbytes)
        return array.view(numpy.uint16 if nbytes == 2 else numpy.uint8)

    @staticmethod
    def is_contiguous(tensor: Any) -> bool:
        return bool(tensor.flags.c_contiguous)

    @staticmethod
    def tensor(array: Any) -> Any:
        return array

    @staticmethod
    def indices(array: Any, like: Any) -> Any:
        return array.astype(like.dtype)

    @staticmethod
    def bf16(array: Any) -> Any:
        return array

    @staticmethod
    def like(array: Any, tensor: Any) -> Any:
        """Bits of bfloat16, as the type of a tensor of such."""
        return array.view(tensor.dtype) if tensor.dtype.itemsize == 2 else array

    @staticmethod
    def fp8(array: Any, tensor: Any) -> Any:
        """Bits of e4m3, as the type of a tensor of such, and as what stands for it beside any other."""
        return array.view(tensor.dtype) if tensor.dtype.itemsize == 1 else array


class TorchKind:
    """Tensors of PyTorch, on the CPU."""

    @staticmethod
    def numbers(tensor: Any) -> Any:
        try:
            return tensor.detach().numpy()
        except (TypeError, RuntimeError) as error:
            # Those that NumPy has not, and tensors without memory.
            raise BadArgument(f"numbers of {tensor.dtype} that cannot be read: {error}", "", 3) from error

    @staticmethod
    def bits(tensor: Any, nbytes: int) -> Any:
        import torch

        if tensor.element_size() != nbytes or tensor.dtype in (torch.float16, torch.bool):
            raise _wrong_type(tensor.dtype, nbytes)
        whole = tensor.detach().contiguous().view(torch.int16 if nbytes == 2 else torch.uint8)
        return whole.numpy().view(numpy.uint16 if nbytes == 2 else numpy.uint8)

    @staticmethod
    def is_contiguous(tensor: Any) -> bool:
        return bool(tensor.is_contiguous())

    @staticmethod
    def tensor(array: Any) -> Any:
        import torch

        return torch.from_numpy(array)

    @staticmethod
    def indices(array: Any, like: Any) -> Any:
        import torch

        return torch.from_numpy(array).to(like.dtype)

    @staticmethod
    def bf16(array: Any) -> Any:
        import torch

        return torch.from_numpy(array.view(numpy.int16)).view(torch.bfloat16)

    @staticmethod
    def like(array: Any, tensor: Any) -> Any:
        return TorchKind.bf16(array)

    @staticmethod
    def fp8(array: Any, tensor: Any) -> Any:
        import torch

        # Before 2.1 there is no such type; 8-bit integers stand for it.
        usual = getattr(torch, "float8_e4m3fn", torch.uint8)
        return torch.from_numpy(array).view(tensor.dtype if tensor.element_size() == 1 else usual)


Kind = Union[Type[NumpyKind], Type[TorchKind]]


def kind_of(tensor: Any) -> Kind:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(tensor, torch.Tensor):
        return NumpyKind
    if tensor.device.type == "cuda":
        raise Unsupported("a CUDA tensor: there is no CUDA port", "move it to the CPU", 9)
    if tensor.device.type != "cpu":
        raise BadArgument(f"a tensor on {tensor.device}", "move it to the CPU", 3)
    return TorchKind


def numbers_of(name: str, tensor: Any, extents: Tuple[int, ...], *dtypes: str) -> Any:
    """As an array that shares the tensor's memory; refused unless it has these extents and one of these types."""
    array = kind_of(tensor).numbers(tensor)
    if array.dtype.name not in dtypes:
        raise BadArgument(f"{name} of {array.dtype}", f"give {' or '.join(dtypes)}", 3)
    has_extents(name, array, extents)
    return array


def has_extents(name: str, tensor: Any, extents: Tuple[int, ...]) -> None:
    """`-1` is any."""
    if not hasattr(tensor, "shape"):
        raise BadArgument(f"{name} is a {type(tensor).__name__}", "give a tensor", 3)
    shape = tuple(tensor.shape)
    if len(shape) != len(extents) or any(wanted not in (-1, found) for found, wanted in zip(shape, extents)):
        told = ", ".join("any" if extent < 0 else str(extent) for extent in extents)
        raise BadArgument(f"{name} is {list(shape)}, and [{told}] is wanted", "", 3)


def bytes_of(array: Any) -> Any:
    """The bytes from an array's first element to its last, whatever lies between."""
    from .._abi import ffi

    if min(array.strides) < 0:
        raise BadArgument("scales that lie backwards", "give them forwards", 3)
    nbytes = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides)) + array.itemsize
    # With the array, so that it stays as long as its bytes are looked at.
    first = ffi.gc(ffi.cast("char *", array.__array_interface__["data"][0]), lambda _, kept=array: None)
    return ffi.buffer(first, nbytes if array.size else 0)


def _wrong_type(dtype: object, nbytes: int) -> BadArgument:
    wanted = "bfloat16" if nbytes == 2 else "FP8"
    return BadArgument(f"elements of {dtype} are no {wanted}", f"convert them to {wanted}", 3)
