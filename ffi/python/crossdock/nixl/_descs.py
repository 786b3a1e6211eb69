"""Descriptor lists of what programs have: tensors, arrays, tuples."""

from __future__ import annotations

import logging
import sys
from typing import Any, Optional, Type, TypeVar

import numpy

from ._bindings import DRAM_SEG, VRAM_SEG, BLK_SEG, FILE_SEG, OBJ_SEG, _DList, nixl_mem_t, nixlInvalidParamError
from ._bindings import nixlRegDList

_log = logging.getLogger("crossdock.nixl")

MEMORY_KINDS = {
    "DRAM": DRAM_SEG,
    "VRAM": VRAM_SEG,
    "FILE": FILE_SEG,
    "BLOCK": BLK_SEG,
    "OBJ": OBJ_SEG,
    "cpu": DRAM_SEG,
    "cuda": VRAM_SEG,
}

_List = TypeVar("_List", bound=_DList)


def descs_of(kind: Type[_List], descs: Any, mem_type: Optional[str]) -> Optional[_List]:
    """`None`, and a log line, for what NIXL answers with `None`."""
    if isinstance(descs, kind):
        return descs
    if isinstance(descs, _DList):
        _refused(f"a {type(descs).__name__} was given for a {kind.__name__}")
        return None
    if _is_tensor(descs):
        return _of_tensors(kind, [descs])
    if not len(descs):
        raise nixlInvalidParamError("no descriptors at all")
    if isinstance(descs, numpy.ndarray):
        if mem_type is None:
            if descs.ndim == 2 and descs.shape[1] in (3, 5) and descs.dtype.kind in "iu" and descs.itemsize == 8:
                _refused("numbers that look like descriptors: give mem_type")
                return None
            # It is the memory itself, which NIXL does not take.
            return _of_tensors(kind, [descs])
        if descs.ndim != 2 or descs.shape[1] != 3:
            _refused(f"descriptors of shape {descs.shape}: give (count, 3)")
            return None
        return kind(kind_of(mem_type), descs)
    if isinstance(descs[0], tuple):
        width = 4 if kind is nixlRegDList else 3
        if mem_type is None:
            _refused("tuples say no kind of memory: give mem_type")
            return None
        if any(len(desc) != width for desc in descs):
            _refused(f"a {kind.__name__} has tuples of {width}")
            return None
        return kind(kind_of(mem_type), descs)
    if all(_is_tensor(desc) or isinstance(desc, numpy.ndarray) for desc in descs):
        return _of_tensors(kind, descs)
    _refused(f"a {type(descs).__name__} of {type(descs[0]).__name__} describes no memory")
    return None


def _of_tensors(kind: Type[_List], tensors: Any) -> Optional[_List]:
    rows = numpy.zeros((len(tensors), 3), numpy.uint64)
    kinds = set()
    for at, tensor in enumerate(tensors):
        if isinstance(tensor, numpy.ndarray):
            if not tensor.flags.c_contiguous:
                _refused("an array whose bytes do not follow each other")
                return None
            rows[at] = (tensor.ctypes.data, tensor.nbytes, 0)
            kinds.add(DRAM_SEG)
            continue
        if not tensor.is_contiguous():
            _refused("a tensor whose bytes do not follow each other")
            return None
        device = tensor.get_device()
        rows[at] = (tensor.data_ptr(), tensor.numel() * tensor.element_size(), max(device, 0))
        kinds.add(DRAM_SEG if device < 0 else VRAM_SEG)
    if len(kinds) != 1:
        _refused("tensors on host and GPU together")
        return None
    return kind(kinds.pop(), rows)


def _is_tensor(value: object) -> bool:
    # It can be one only if somebody has imported torch.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def kind_of(mem_type: str) -> nixl_mem_t:
    if mem_type not in MEMORY_KINDS:
        raise nixlInvalidParamError(f"memory of kind {mem_type!r}: there are {', '.join(MEMORY_KINDS)}")
    return MEMORY_KINDS[mem_type]


def _refused(why: str) -> None:
    _log.error("descriptors: %s", why)
