"""`crossdock.deep_ep.Buffer` on tensors of PyTorch, between processes that share a gloo process group.

What DeepEP's own tests assert (test_intranode, test_internode, test_low_latency), and which job below asserts it:

layout: tokens by rank, by expert, whether a token goes to a rank   | all, `layout_is_right`: against a count by hand
rows that come, the ends of each source's (its column of the prefix)| `normal`
rows are their source's, in BF16 and FP8 times scales               | `normal`: bit for bit, in their order, scales too,
                                                                    | given by rows and by columns, and packed
expert numbers, counts by expert with and without choices           | `normal`: each number; with an alignment too
weights of choices elsewhere; those written over come back summed   | `normal`
num_worst_tokens: the same rows, then -1                            | `normal`
cached handles; async_finish, previous_event in all combinations    | `normal`; after more calls than slots: `handles`
combine against the reference (5e-6), its weights (1e-9)            | `normal`: exactly; with biases, unchosen tokens
low latency: counts, statistics, layout ranges, source tokens       | `latency`: also T < M, T = 0, waiting times
its rows: BF16, FP8, rounded, UE8M0; by hook and by event           | `latency`: also random rows, by element
its combine (1e-5, FP8 9e-4), no NaN, out, zero copy                | `latency`: also NaN past the counts
the same hash when the same is run again                            | `latency`: the same bits
shrinking: ranks that stop before dispatch, combine, clean          | `deaths`: one is killed; handles from before it
the normal mode after a death                                       | `deaths`: is over, as its kernels trap
both modes of one buffer                                            | `handles`, `deaths`
16 ranks (test_internode), sizes, configurations, refusals          | test_deep_ep.py, test_deep_ep_faults.py

Not here: a rank that dies before its first call, in which ranks meet. Without sense on a CPU: the format of use_logfmt
(results travel as they are), RDMA buffers, chunk sizes, streams, speed.
"""

from __future__ import annotations

import os
import signal
import unittest
from typing import Any, Callable, Dict, List, Sequence, Tuple, Type

from support import numpy, torch
from torch_ranks import EXPERTS, HIDDEN, IS_POSSIBLE, JOBS, MOST, TOP_K, Jobs, bits_of, choices, difference
from torch_ranks import gathered, job, layout_is_right, main, quantised, same, unquantised, values

from crossdock.errors import BadArgument, GroupLost, OutOfOrder


@job(4)
def normal(buffer: Any, group: Any) -> None:
    from crossdock.deep_ep import Config, topk_idx_t

    assert topk_idx_t == torch.int64
    rank, ranks, here = group.rank(), group.size(), EXPERTS // group.size()
    # One rank has no tokens.
    tokens = 0 if rank == 2 else 20 + rank
    chosen = choices(rank, tokens)
    layout = layout_is_right(buffer, chosen)
    is_in = layout["is_token_in_rank"]
    constant = torch.full((tokens, HIDDEN), float(rank), dtype=torch.bfloat16)
    weights = torch.rand(tokens, TOP_K, generator=torch.Generator().manual_seed(rank))
    told = gathered(group, (chosen, is_in, weights, layout["num_tokens_per_expert"]))
    counts = sum(one[3] for one in told).reshape(ranks, here)[rank].tolist()
    mine = [one[1][:, rank] for one in told]
    ends = torch.cumsum(torch.stack([source.sum() for source in mine]), 0)
    theirs = torch.cat([one[0][source] for one, source in zip(told, mine)])
    local = torch.where((theirs >= 0) & (theirs // here == rank), theirs - here * rank, -torch.ones_like(theirs))
    local_weights = torch.cat([one[2][source] for one, source in zip(told, mine)]) * (local >= 0)
    config = Config(buffer.num_sms, 8, 256)

    def waits(event: Any, is_async: bool) -> None:
        assert (event.event is not None) == is_async
        if is_async:
            event.current_stream_wait()

    fp8, scales = quantised(values(rank, tokens, 1))
    by_column = fp8, scales.t().contiguous().t()
    packed = fp8, torch.arange(tokens, dtype=torch.int32)[:, None] * 65537
    for x in (values(rank, tokens), constant, (fp8, scales), by_column, packed):
        is_fp8 = isinstance(x, tuple)
        parts = x if is_fp8 else (x,)
        sent = gathered(group, [bits_of(part) for part in parts])
        rows = [
            torch.cat([one[part][source] for one, source in zip(sent, mine)]) for part in range(len(parts))
        ]

        def is_all_there(found: Any) -> bool:
            came = found if is_fp8 else (found,)
            assert [part.dtype for part in came] == [part.dtype for part in parts]
            return all(torch.equal(bits_of(part), wanted) for part, wanted in zip(came, rows))

        for is_async, has_previous, has_choices in combinations(2, 2, 2):
            options: Dict[str, Any] = dict(config=config, async_finish=bool(is_async))
            if has_previous:
                options["previous_event"] = buffer.capture()
            given = dict(topk_idx=chosen, topk_weights=weights) if has_choices else {}
            gave = buffer.dispatch(x, **layout, **given, **options)
            recv_x, recv_idx, recv_weights, recv_counts, handle, event = gave
            waits(event, is_async)
            assert is_all_there(recv_x)
            assert handle[0][:, rank].tolist() == ends.tolist()
            assert torch.equal(handle[3], torch.cat([source.nonzero()[:, 0] for source in mine]).int())
            assert recv_counts == counts
            if has_choices:
                assert recv_idx.dtype == chosen.dtype and torch.equal(recv_idx, local)
                assert torch.equal(recv_weights, local_weights)
            else:
                assert recv_idx is None and recv_weights is None
                again, *none, event = buffer.dispatch(x, handle=handle, **options)
                waits(event, is_async)
                assert is_all_there(again) and none == [None] * 4
            if x is packed:
                # What the scales say is the caller's.
                buffer.combine(torch.zeros(len(recv_x[0]), HIDDEN, dtype=torch.bfloat16), handle)
                continue
            results = unquantised(*recv_x).to(torch.bfloat16) if is_fp8 else recv_x
            mean = unquantised(*x).to(torch.bfloat16) if is_fp8 else x
            # Each rank gives the same, so sums are exact.
            wanted = mean.float() * is_in.sum(1, keepdim=True)
            if has_choices and x is constant:
                recv_weights[recv_idx == -1] = 0.25
            combined, back, event = buffer.combine(results, handle, recv_weights, **options)
            waits(event, is_async)
            assert torch.equal(combined, wanted.to(torch.bfloat16))
            if has_choices and x is constant:
                elsewhere = is_in.sum(1, keepdim=True) - (chosen >= 0).int()
                sums = torch.where(is_in.any(1, keepdim=True), weights * (chosen >= 0) + 0.25 * elsewhere, weights * 0)
                assert torch.allclose(back, sums)
            elif has_choices:
                assert torch.equal(back, weights * (chosen >= 0))
            else:
                assert back is None

    # As few rows as come and no fewer; and the rest is empty.
    x = values(rank, tokens)
    for dtype in (torch.int64, torch.int32):
        given = dict(topk_idx=chosen.to(dtype), topk_weights=weights)
        recv_x, recv_idx, _, recv_counts, handle, _ = buffer.dispatch(x, **layout, **given, expert_alignment=8)
        assert recv_idx.dtype == dtype
        assert recv_counts == [-(-count // 8) * 8 for count in counts]
        assert buffer.dispatch(x, **layout, expert_alignment=8)[3] == recv_counts
        gave = buffer.dispatch(x, **layout, **given, num_worst_tokens=100)
        worst, worst_idx, worst_weights, none, worst_handle, _ = gave
        came = len(recv_x)
        assert none == [] and len(worst) == len(worst_idx) == len(worst_weights) == 100
        assert same(worst[:came], recv_x) and torch.equal(worst_idx[:came], recv_idx)
        assert (worst_idx[came:] == -1).all() and (worst_weights[came:] == 0).all()
    biases = tuple(values(rank, tokens, seed) for seed in (2, 3))
    for bias in (biases[0], biases, (biases[0], None)):
        combined, _, _ = buffer.combine(worst, worst_handle, bias=bias)
        first, *more = [one for one in (bias if isinstance(bias, tuple) else (bias,)) if one is not None]
        wanted = first.float() + sum(one.float() for one in more)
        for goes_to in is_in.t():
            wanted = wanted + x.float() * goes_to[:, None]
        assert torch.equal(combined, wanted.to(torch.bfloat16))


def combinations(*extents: int) -> List[Tuple[int, ...]]:
    return [tuple(numpy.unravel_index(at, extents)) for at in range(int(numpy.prod(extents)))]


@job(4)
def latency(buffer: Any, group: Any) -> None:
    assert buffer.get_low_latency_rdma_size_hint(MOST, HIDDEN, group.size(), EXPERTS) > 0
    rank = group.rank()
    tokens = (MOST, 9, 0, 17)[rank]
    chosen = choices(rank, tokens)
    constant = torch.full((tokens, HIDDEN), float(rank - 128), dtype=torch.bfloat16)
    constant[:, -128:] = torch.arange(tokens)[:, None].to(torch.bfloat16)
    weights = torch.rand(tokens, TOP_K, generator=torch.Generator().manual_seed(rank))
    for x in (constant, values(rank, tokens)):
        told = gathered(group, (chosen, x))
        for has_hook, form in combinations(2, 4):
            fp8, rounded, packed = form > 0, form > 1, form > 2
            first = latency_step(buffer, told, weights, bool(has_hook), fp8, rounded, packed, x is constant)
            again = latency_step(buffer, told, weights, bool(has_hook), fp8, rounded, packed, x is constant)
            assert len(first) == len(again) and all(map(torch.equal, first, again))


def latency_step(
    buffer: Any,
    told: Sequence[Any],
    weights: Any,
    has_hook: bool,
    fp8: bool,
    rounded: bool,
    packed: bool,
    is_constant: bool,
) -> List[Any]:
    """One dispatch and its combines; returns all bits that it gave."""
    rank, ranks, here = buffer.rank, buffer.group_size, EXPERTS // buffer.group_size
    chosen, x = told[rank]
    stats, costs = torch.ones(here, dtype=torch.int32), torch.zeros(ranks, dtype=torch.int64)
    received, counts, handle, event, hook = buffer.low_latency_dispatch(
        x, chosen, MOST, EXPERTS, stats, costs, use_fp8=fp8, round_scale=rounded, use_ue8m0=packed,
        async_finish=not has_hook, return_recv_hook=has_hook,
    )
    arrived(event, hook, has_hook)
    assert counts.dtype == stats.dtype == torch.int32 and torch.equal(stats, counts + 1)
    assert (costs >= 0).all()
    if fp8:
        rows, scales = received
        assert scales.shape == (here, ranks * MOST, HIDDEN // (512 if packed else 128))
        assert scales.stride(1) == 1, "the tokens follow each other"
        got, bits = unquantised(rows, scales), [rows.view(torch.uint8), bits_of(scales)]
    else:
        got, bits = received.float(), [bits_of(received)]
    assert received[0].shape[-1] == HIDDEN if fp8 else received.shape == (here, ranks * MOST, HIDDEN)
    sources, ranges = handle[0], handle[1]
    assert (sources.dtype, ranges.dtype, ranges.shape) == (torch.int32, torch.int64, (here, ranks))
    seen: List[Any] = [counts.clone(), ranges.clone()]
    for expert in range(here):
        end = 0
        for source, (theirs, sent) in enumerate(told):
            those = (theirs == here * rank + expert).any(1).nonzero()[:, 0]
            begin, count = int(ranges[expert, source]) >> 32, int(ranges[expert, source]) & 0xFFFFFFFF
            assert (begin, count) == (end, len(those))
            end += count
            assert sources[expert, begin:end].tolist() == those.tolist()
            rows_here, wanted = got[expert, begin:end], sent[those].float()
            if not fp8 or (is_constant and not rounded):
                assert same(rows_here.to(torch.bfloat16), sent[those])
            else:
                # 3 bits of mantissa, and what lies below the smallest step of its 128 channels.
                blocks = wanted.reshape(count, HIDDEN // 128, 128).abs()
                steps = blocks.amax(2, keepdim=True).expand(blocks.shape).reshape(wanted.shape) / 448
                assert ((rows_here - wanted).abs() <= wanted.abs() / 16 + 2 * steps * 2.0**-9).all()
        assert int(counts[expert]) == end
        seen += [one[expert, :end].clone() for one in (sources, *bits)]
    # What lies past the counts means nothing.
    results = got.to(torch.bfloat16)
    for expert in range(here):
        results[expert, int(counts[expert]) :] = float("nan")
    scale = (weights * (chosen >= 0)).sum(1, keepdim=True)
    for zero_copy in (False, True):
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = results
        out = torch.full((len(x), HIDDEN), float("nan"), dtype=torch.bfloat16)
        combined, event, hook = buffer.low_latency_combine(
            results, chosen, weights, handle, zero_copy=zero_copy, out=out, combine_wait_recv_cost_stats=costs,
            async_finish=not has_hook, return_recv_hook=has_hook,
        )
        arrived(event, hook, has_hook)
        assert combined is out and not out.isnan().any()
        if len(x) and not rounded:
            assert difference(out, x.float() * scale) < (9e-4 if fp8 else 1e-5)
        assert (out[-1:] == 0).all(), "the last token chose nothing"
        seen.append(bits_of(out).clone())
    assert torch.equal(seen[-1], seen[-2])
    return seen


def arrived(event: Any, hook: Any, has_hook: bool) -> None:
    assert (hook is not None) == has_hook and (event.event is None) == has_hook
    if has_hook:
        hook()
    else:
        event.current_stream_wait()


@job(2)
def handles(buffer: Any, group: Any) -> None:
    """What calls gave stays what it was, through more calls than there are slots; in both modes."""
    rank, tokens = group.rank(), 12
    begun, kept = [], []
    for step in range(11):
        chosen, x = choices(rank, tokens, step), values(rank, tokens, step)
        layout = layout_is_right(buffer, chosen)
        weights = torch.ones(tokens, TOP_K)
        recv_x, _, _, _, handle, _ = buffer.dispatch(x, **layout, topk_idx=chosen, topk_weights=weights)
        got, counts, latency_handle, _, _ = buffer.low_latency_dispatch(x, chosen, MOST, EXPERTS, use_fp8=False)
        begun.append((x, chosen, layout["is_token_in_rank"], recv_x, handle, got, counts, latency_handle))
        kept.append([one.clone() for one in (recv_x, got, counts, *latency_handle[:2])])
    places = {one[5].data_ptr() for one in begun}
    assert len(places) == len(begun)
    for one, before in zip(begun, kept):
        _, _, _, recv_x, _, got, counts, latency_handle = one
        assert all(map(same_or_equal, (recv_x, got, counts, *latency_handle[:2]), before))
    for x, chosen, is_in, recv_x, handle, got, _, latency_handle in reversed(begun):
        for _ in range(2):
            combined, _, _ = buffer.combine(recv_x, handle)
            assert torch.equal(combined, (x.float() * is_in.sum(1, keepdim=True)).to(torch.bfloat16))
            combined, _, _ = buffer.low_latency_combine(got, chosen, torch.ones(tokens, TOP_K), latency_handle)
            assert difference(combined, x.float() * (chosen >= 0).sum(1, keepdim=True)) < 1e-5
    try:
        buffer.low_latency_combine(got, chosen, torch.ones(tokens, TOP_K), begun[0][7], zero_copy=True)
    except OutOfOrder:
        pass
    else:
        raise AssertionError("results that nobody has written were combined")
    # Memory of what nobody holds is used again.
    del begun, handle, latency_handle, got, one, recv_x, counts
    got = buffer.low_latency_dispatch(x, chosen, MOST, EXPERTS, use_fp8=False)[0]
    assert got.data_ptr() in places


def same_or_equal(found: Any, before: Any) -> bool:
    return bool(torch.equal(found, before) if found.dtype != torch.bfloat16 else same(found, before))


@job(4)
def subgroups(buffer: Any, group: Any) -> None:
    """Two pairs of ranks at once, each numbered by its own group."""
    from crossdock.deep_ep import Buffer

    world = group.rank()
    pairs = [torch.distributed.new_group([0, 2]), torch.distributed.new_group([3, 1])]
    pair, members = pairs[world % 2], ([0, 2], [1, 3])[world % 2]
    with_neighbour = Buffer(pair, low_latency_mode=True, explicitly_destroy=True)
    assert (with_neighbour.rank, with_neighbour.group_size) == (torch.distributed.get_rank(pair), 2)
    chosen = torch.arange(6)[:, None] % 2 * (EXPERTS // 2) + torch.arange(TOP_K)
    chosen[:, 1:] = -1
    x = torch.full((6, HIDDEN), float(world), dtype=torch.bfloat16)
    received, counts, handle, _, _ = with_neighbour.low_latency_dispatch(x, chosen, MOST, EXPERTS, use_fp8=False)
    assert counts.tolist() == [6] + [0] * (EXPERTS // 2 - 1)
    assert sorted(received[0, :6, 0].tolist()) == [float(member) for member in members for _ in range(3)]
    combined, _, _ = with_neighbour.low_latency_combine(received, chosen, torch.ones(6, TOP_K), handle)
    assert torch.equal(combined, x)
    with_neighbour.destroy()


@job(1)
def refusals(buffer: Any, group: Any) -> None:
    """Of one rank: nobody waits for it."""
    x, chosen, weights = values(0, 8), choices(0, 8), torch.ones(8, TOP_K)
    layout = layout_is_right(buffer, chosen)
    given = dict(topk_idx=chosen, topk_weights=weights)
    handle = buffer.dispatch(x, **layout, **given)[4]
    for name, wrong in (
        ("float16", lambda: buffer.dispatch(x.half(), **layout, **given)),
        ("float32", lambda: buffer.dispatch(x.float(), **layout, **given)),
        ("no memory", lambda: buffer.dispatch(x.to("meta"), **layout, **given)),
        ("weights in bfloat16", lambda: buffer.dispatch(x, **layout, topk_idx=chosen, topk_weights=weights.bfloat16())),
        ("choices as floats", lambda: buffer.get_dispatch_layout(weights, EXPERTS)),
        ("bytes without scales", lambda: buffer.dispatch(x.view(torch.uint8), **layout, **given)),
        ("booleans with scales", lambda: buffer.dispatch((x > 0, torch.ones(8, 4)), **layout, **given)),
        ("scales in float64", lambda: buffer.dispatch((quantised(x)[0], torch.ones(8, 4).double()), **layout, **given)),
        ("scales of 64 channels", lambda: buffer.dispatch((quantised(x)[0], torch.ones(8, 8)), **layout, **given)),
        ("other tokens than the handle's", lambda: buffer.dispatch(x[:5], handle=handle)),
        ("fewer rows than came", lambda: buffer.combine(x[:2], handle)),
        ("more tokens than the limit", lambda: buffer.low_latency_dispatch(x, chosen, 4, EXPERTS)),
        ("a result that has gaps", lambda: latency_into(buffer, x, chosen, weights, torch.zeros(HIDDEN, 8).t())),
    ):
        try:
            wrong()
        except ValueError as error:
            assert isinstance(error, BadArgument), name
        else:
            raise AssertionError(f"{name}: taken")
    # Tensors of a gradient, of gaps, and of a class of its own are tensors.
    class Special(torch.Tensor):  # type: ignore[misc, name-defined]
        pass

    for odd in (x.clone().requires_grad_(), x.t().contiguous().t(), x.as_subclass(Special)):
        recv_x, _, _, _, handle, _ = buffer.dispatch(odd, **layout, **given)
        assert same(recv_x, odd.detach().as_subclass(torch.Tensor)[layout["is_token_in_rank"][:, 0]])
        buffer.combine(recv_x, handle)


def latency_into(buffer: Any, x: Any, chosen: Any, weights: Any, out: Any) -> None:
    got, _, handle, _, _ = buffer.low_latency_dispatch(x, chosen, MOST, EXPERTS, use_fp8=False)
    buffer.low_latency_combine(got, chosen, weights, handle, out=out.to(torch.bfloat16))


@job(4, is_collective=False)
def deaths(buffer: Any, group: Any) -> None:
    """Of four ranks the last is killed before a dispatch, the next leaves before a combine, the next before a clean."""
    rank, ranks, here = group.rank(), group.size(), EXPERTS // group.size()
    tokens, weights = 14, torch.ones(14, TOP_K)
    chosen, x = choices(rank, tokens), values(rank, tokens)
    layout = layout_is_right(buffer, chosen)
    told = gathered(group, chosen)
    dead: List[int] = []

    def masks_are_right() -> None:
        status = torch.full((ranks,), 7, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(one in dead) for one in range(ranks)], (status, dead)

    def dispatched() -> Tuple[Any, Any]:
        got, counts, handle, _, _ = buffer.low_latency_dispatch(x, chosen, MOST, EXPERTS, use_fp8=False)
        for expert in range(here):
            heard = [0 if source in dead else int((theirs == here * rank + expert).sum())
                     for source, theirs in enumerate(told)]
            assert (handle[1][expert] & 0xFFFFFFFF).tolist() == heard
            assert int(counts[expert]) == sum(heard)
        return got, handle

    def combined_is_right(got: Any, handle: Any, **options: Any) -> None:
        combined, _, _ = buffer.low_latency_combine(got, chosen, weights, handle, **options)
        alive = (chosen >= 0) & ~sum(chosen // here == one for one in [*dead, -7]).bool()
        assert not combined.isnan().any()
        assert difference(combined, x.float() * alive.sum(1, keepdim=True)) < 1e-5

    buffer.clean_low_latency_buffer(MOST, HIDDEN, EXPERTS)
    masks_are_right()
    given = dict(topk_idx=chosen, topk_weights=weights)
    recv_x, _, recv_weights, _, old, _ = buffer.dispatch(x, **layout, **given)
    buffer.combine(recv_x, old)
    got, first = dispatched()
    combined_is_right(got, first)
    buffer.low_latency_clean_mask_buffer()
    if rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    dead.append(3)
    then, second = dispatched()
    masks_are_right()
    if rank == 2:
        buffer.destroy()
        return
    dead.append(2)
    combined_is_right(then, second)
    masks_are_right()
    # Handles from before: their rows lie where those of the dead were among them.
    combined_is_right(got, first)
    buffer.get_next_low_latency_combine_buffer(first)[:] = got
    combined_is_right(torch.zeros_like(got), first, zero_copy=True)
    wrong: List[Tuple[Callable[[], object], Type[Exception]]] = [
        (buffer.low_latency_clean_mask_buffer, BadArgument),
        (lambda: buffer.low_latency_update_mask_buffer(3, False), BadArgument),
        # The normal mode has no masks, whatever the latency mode has.
        (lambda: buffer.combine(recv_x, old, recv_weights), GroupLost),
        (lambda: buffer.dispatch(x, handle=old), GroupLost),
        (lambda: buffer.dispatch(x, **layout, **given), GroupLost),
    ]
    for call, error in wrong:
        try:
            call()
        except error:
            continue
        raise AssertionError("the dead were not missed")
    if rank == 1:
        buffer.destroy()
        return
    dead.append(1)
    buffer.clean_low_latency_buffer(MOST, HIDDEN, EXPERTS)
    masks_are_right()
    combined_is_right(*dispatched())


@job(3, is_collective=False)
def told_dead(buffer: Any, group: Any) -> None:
    """A rank that the others are told of is waited for no longer, and hears of it."""
    rank, tokens = group.rank(), 5
    chosen, x = choices(rank, tokens), values(rank, tokens)
    buffer.low_latency_dispatch(x, chosen, MOST, EXPERTS)
    torch.distributed.barrier(group)
    status = torch.zeros(group.size(), dtype=torch.int32)
    if rank == 0:
        # It is not there for the next call, and comes late.
        torch.distributed.barrier(group)
        try:
            buffer.low_latency_dispatch(x, chosen, MOST, EXPERTS)
        except GroupLost:
            return
        raise AssertionError("a masked rank went on")
    buffer.low_latency_update_mask_buffer(0, True)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [1] + [0] * (group.size() - 1)
    _, _, handle, _, _ = buffer.low_latency_dispatch(x, chosen, MOST, EXPERTS)
    assert not (handle[1][:, 0] & 0xFFFFFFFF).any()
    torch.distributed.barrier(group)


@unittest.skipUnless(IS_POSSIBLE, "PyTorch with torch.distributed, or NumPy, is not installed")
class Processes(Jobs):
    def test_the_normal_mode(self) -> None:
        self.ran("normal")

    def test_the_latency_mode(self) -> None:
        self.ran("latency")

    def test_handles_and_what_is_held(self) -> None:
        self.ran("handles")

    def test_groups_of_some_of_the_ranks(self) -> None:
        self.ran("subgroups")

    def test_what_makes_no_sense_is_refused(self) -> None:
        self.ran("refusals")

    def test_ranks_that_die(self) -> None:
        self.ran("deaths", killed=1)

    def test_a_rank_that_the_others_are_told_of(self) -> None:
        self.ran("told_dead")

    def test_every_job_has_its_test(self) -> None:
        self.assertEqual([part.split("\n", 1)[0] for part in self.told[1:]], list(JOBS))


if __name__ == "__main__":
    main()
