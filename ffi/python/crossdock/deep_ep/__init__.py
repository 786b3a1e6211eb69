"""`Buffer` with DeepEP's call shapes, over crossdock's expert groups, on CPU tensors.

A program that says `from deep_ep import Buffer` runs with `from crossdock.deep_ep import Buffer`. Tensors are
PyTorch's, or NumPy's arrays, of which 16-bit integers stand for bfloat16 and 8-bit ones for FP8; what comes back is of
the kind that was given. `group` is a process group of `torch.distributed`, or any object with `rank()`, `size()` and
`all_gather(object)`, which gives every rank's object by rank; `comm` an mpi4py communicator.

What is different:

- Nothing here takes sizes from `num_nvl_bytes` and `num_rdma_bytes`: memory is taken where rows arrive.
- Ranks meet once for each shape (experts, choices, channels, and the token limit) at the first call that has it: a rank
  that is dead by then is not masked but waited for, and missed.
- The normal mode takes at most `Buffer.max_tokens_per_rank` tokens of a rank in one call.
- There are no streams: every call is over when it returns, but for the hooks of the latency mode, and events say so. A
  hook is to be called before the next eight calls of its shape.
- A rank that dies is masked only where DeepEP does so: in the latency mode of a buffer with `enable_shrink`. Where
  DeepEP's kernels trap, that call and all later ones raise `GroupLost`: destroy the buffer, and make another without
  the dead. A rank is dead when its process has ended, when it has left, or when others waited for it for 100 s (at first
  120 s) while it neither made its call nor waited itself.
- A masked rank cannot be taken back. The normal mode is over then.
- What `get_next_low_latency_combine_buffer` gave stays mapped as long as it is held, after `destroy` too. The other
  ranks are told that this one has left when it is held no more, and wait for it until then as for one that is silent.
- Of a handle's matrices only what callers read is filled: where each source's rows end, in this rank's column of the
  first one, and which of its source's tokens each row is.
- Results travel as they are, whatever `use_logfmt` says. Before PyTorch 2.1 8-bit integers stand for FP8.

What makes no sense is refused before the other ranks hear of the call, with `BadArgument`; where DeepEP asserts, that
is an `AssertionError` too. CUDA tensors are refused with `Unsupported`.

Set `CROSSDOCK_KEY` to the same secret on all ranks; without it anybody may connect, and a warning says so.
`CROSSDOCK_HOST` is the IP address at which the other ranks reach this one; left out, that of the way out.
"""

from __future__ import annotations

from typing import Any

from ..experts import Report
from ._buffer import Buffer
from ._events import Config, EventHandle, EventOverlap, Misused


def __getattr__(name: str) -> Any:
    if name == "topk_idx_t":
        # What choices are given as, for programs that ask: a type of PyTorch, where that is.
        try:
            import torch
        except ImportError:
            import numpy

            return numpy.int64
        return torch.int64
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "Misused", "Report"]
