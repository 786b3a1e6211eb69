"""Ranks of a gloo process group, forked from one program: jobs for them, and what to send and to expect."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

from support import numpy, script_environment, torch
from thread_ranks import ENVIRONMENT

EXPERTS, TOP_K, HIDDEN, MOST = 16, 4, 512, 32
Job = Callable[[Any, Any], None]
# What is done, by how many ranks, and whether all of them come to the end.
JOBS: Dict[str, Tuple[Job, int, bool]] = {}
_BEGIN = "=== job "


def job(ranks: int, is_collective: bool = True) -> Callable[[Job], Job]:
    def added(work: Job) -> Job:
        JOBS[work.__name__] = (work, ranks, is_collective)
        return work

    return added


IS_POSSIBLE = bool(torch and numpy) and torch.distributed.is_available()


class Jobs(unittest.TestCase):
    """Each test is a job of several processes. The file as a program runs them all, so that PyTorch is loaded once."""

    told: List[str]

    @classmethod
    def setUpClass(cls) -> None:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", str(sys.modules[cls.__module__].__file__), "jobs"],
            env={**script_environment(), **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        cls.told = done.stdout.split(_BEGIN)

    def ran(self, name: str, killed: int = 0) -> None:
        (told,) = [part for part in self.told if part.startswith(name + "\n")] or ["\n".join(self.told)]
        self.assertEqual(told.count("came to its end"), JOBS[name][1] - killed, told)


def main() -> None:
    """Of a file with jobs."""
    if sys.argv[1:] == ["jobs"]:
        for name in JOBS:
            run_job(name)
    else:
        unittest.main()


def run_job(name: str) -> None:
    """All ranks of a job, forked from here."""
    ranks, folder = JOBS[name][1], tempfile.mkdtemp()
    os.write(1, f"{_BEGIN}{name}\n".encode())
    left = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                be_rank(name, rank, ranks, Path(folder, "store"))
                os.write(1, f"rank {rank} came to its end\n".encode())
            except BaseException:
                os.write(1, f"rank {rank}: {traceback.format_exc()}".encode())
                os._exit(1)
            # Gloo would wait for those that are dead.
            os._exit(0)
        left.add(child)
    end, failed = time.monotonic() + 60, False
    while left and not failed:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                failed |= os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL)
        failed |= time.monotonic() > end
        time.sleep(0.01)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    shutil.rmtree(folder)


def be_rank(name: str, rank: int, ranks: int, store: Path) -> None:
    from crossdock.deep_ep import Buffer

    work, _, is_collective = JOBS[name]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    group = torch.distributed.new_group(list(range(ranks)))
    options: Dict[str, Any] = dict(low_latency_mode=True, enable_shrink=True, explicitly_destroy=True)
    buffer = Buffer(group, int(1e9), 0, **options)
    work(buffer, group)
    if is_collective:
        torch.distributed.barrier(group)
        buffer.destroy()


def gathered(group: Any, told: Any) -> List[Any]:
    heard: List[Any] = [None] * group.size()
    torch.distributed.all_gather_object(heard, told, group=group)
    return heard


def difference(found: Any, wanted: Any) -> float:
    """Of directions, after one is added to all; 0 for the same."""
    x, y = found.double() + 1, wanted.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def choices(rank: int, tokens: int, seed: int = 0) -> Any:
    """With gaps; and the last token chooses nothing."""
    random = torch.Generator().manual_seed(1000 * seed + rank)
    chosen = torch.rand(tokens, EXPERTS, generator=random).topk(TOP_K, dim=1)[1]
    chosen[torch.rand(tokens, TOP_K, generator=random) < 0.1] = -1
    chosen[-1:] = -1
    return chosen


def values(rank: int, tokens: int, seed: int = 0) -> Any:
    random = torch.Generator().manual_seed(7000 * seed + rank)
    return torch.randn(tokens, HIDDEN, generator=random).to(torch.bfloat16)


def e4m3_table() -> Any:
    """What each of the 256 bytes stands for."""
    bits = torch.arange(256)
    exponent, mantissa = bits >> 3 & 15, (bits & 7).double()
    small, large = mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * torch.pow(2.0, (exponent - 7).double())
    told = torch.where(exponent == 0, small, large)
    told[(bits & 127) == 127] = float("nan")
    return torch.where(bits >> 7 == 1, -told, told).float()


def quantised(x: Any) -> Tuple[Any, Any]:
    """`[tokens, hidden]` as FP8 where PyTorch has that, as bytes where not, and scales of 128 channels."""
    blocks = x.float().reshape(len(x), HIDDEN // 128, 128)
    scales = blocks.abs().amax(2).clamp(1e-4) / 448
    table = e4m3_table()[:127]
    nearest = (blocks / scales[:, :, None]).abs().reshape(-1, 1).sub(table).abs().argmin(1).reshape(x.shape)
    bits = (nearest + 128 * (x < 0)).to(torch.uint8)
    return bits.view(getattr(torch, "float8_e4m3fn", torch.uint8)), scales


def unquantised(rows: Any, scales: Any) -> Any:
    if scales.dtype == torch.int32:
        shifts = torch.arange(4, dtype=torch.int32) * 8
        exponents = (scales[..., None] >> shifts & 255).reshape(*scales.shape[:-1], HIDDEN // 128)
        scales = torch.pow(2.0, (exponents - 127).float())
    bits = rows.view(torch.uint8).long()
    told = e4m3_table()[bits].reshape(*bits.shape[:-1], HIDDEN // 128, 128) * scales[..., None]
    return told.reshape(bits.shape)


def bits_of(tensor: Any) -> Any:
    """Of tensors whose elements cannot be compared, or are NaN."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same(found: Any, wanted: Any) -> bool:
    return found.dtype == wanted.dtype and torch.equal(bits_of(found), bits_of(wanted))


def layout_is_right(buffer: Any, chosen: Any) -> Dict[str, Any]:
    """The layout, by name, after it was compared with what the choices say one by one."""
    ranks, here = buffer.group_size, EXPERTS // buffer.group_size
    per_rank, per_node, per_expert, is_in, event = buffer.get_dispatch_layout(chosen, EXPERTS)
    assert per_node is None and event.event is None
    assert (per_rank.dtype, per_expert.dtype, is_in.dtype) == (torch.int32, torch.int32, torch.bool)
    goes = [{expert // here for expert in row if expert >= 0} for row in chosen.tolist()]
    assert is_in.tolist() == [[rank in row for rank in range(ranks)] for row in goes]
    assert per_rank.tolist() == [sum(rank in row for row in goes) for rank in range(ranks)]
    flat = chosen.flatten().tolist()
    assert per_expert.tolist() == [flat.count(expert) for expert in range(EXPERTS)]
    return dict(num_tokens_per_rank=per_rank, is_token_in_rank=is_in, num_tokens_per_expert=per_expert)
