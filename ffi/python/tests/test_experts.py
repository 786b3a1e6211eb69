"""Tokens to their experts and back, by ranks that are threads."""

import struct
import threading
import unittest
from array import array
from typing import Callable, List

from crossdock._abi import BAD_HANDLE, OK, ffi, lib
from crossdock.errors import BadArgument, BadHandle, OutOfOrder
from crossdock.experts import Group, Slot

RANKS, EXPERTS, TOP_K, HIDDEN, TOKENS = 4, 8, 2, 128, 10


def bf16(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0] >> 16)


def f32(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])


def choices_of(rank: int) -> "array[int]":
    chosen: List[int] = []
    for token in range(TOKENS):
        first = (3 * rank + 5 * token) % EXPERTS
        chosen += [first, -1 if token % 4 == 3 else (first + 3) % EXPERTS]
    return array("q", chosen)


def value_of(rank: int, token: int) -> float:
    return float(rank * TOKENS + token)


def rows_of(rank: int) -> "array[int]":
    return array("H", [bf16(value_of(rank, token)) for token in range(TOKENS) for _ in range(HIDDEN)])


def expected(rank: int, token: int) -> float:
    chosen = choices_of(rank)[token * TOP_K : (token + 1) * TOP_K]
    return value_of(rank, token) * sum(expert + 1 for expert in chosen if expert >= 0)


def on_every_rank(groups: List[Group], work: Callable[[Group, int], None]) -> None:
    failed: List[BaseException] = []

    def run(group: Group, rank: int) -> None:
        try:
            work(group, rank)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(group, rank)) for rank, group in enumerate(groups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


class Experts(unittest.TestCase):
    def groups(self, ranks: int = RANKS, slots: int = 2) -> List[Group]:
        made = Group.in_process(
            max_tokens=[TOKENS] * ranks, experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, slots=slots, verify=True
        )
        for group in made:
            self.addCleanup(group.close)
        return made

    def check(self, rank: int, combined: "array[int]") -> None:
        for token in range(TOKENS):
            found, wanted = f32(combined[token * HIDDEN]), expected(rank, token)
            self.assertAlmostEqual(found, wanted, delta=2 + wanted / 64)

    def latency(self, slot: Slot, group: Group, rank: int, route: bool) -> None:
        outputs = group.latency_outputs()
        if route:
            slot.dispatch(rows_of(rank), choices_of(rank))
            kept = slot.route()
            again = group.read_route(bytes(kept))
            slot.abandon()
            slot.dispatch(rows_of(rank), route=again)
        else:
            report = slot.dispatch(rows_of(rank), choices_of(rank))
            self.assertGreater(report.logical_bytes, 0)
        slot.receive(outputs)
        values = outputs.values.cast("H")
        for expert in range(outputs.experts):
            results = slot.results(expert)
            self.assertEqual(len(results), outputs.counts[expert] * HIDDEN)
            first = expert * outputs.rows * HIDDEN
            for at in range(len(results)):
                results[at] = bf16(f32(values[first + at]) * (group.info.first_expert + expert + 1))
        ranges = outputs.ranges()
        self.assertEqual(len(ranges), outputs.experts * RANKS * 2)
        self.assertEqual(ranges[RANKS * 2 - 1], outputs.counts[0])
        slot.combine()
        combined = array("H", bytes(TOKENS * HIDDEN * 2))
        slot.finish(combined, array("f", [1.0] * TOKENS * TOP_K))
        self.check(rank, combined)
        self.assertEqual((slot.lost(), len(slot.waits())), ([], RANKS))

    def test_a_step_in_the_latency_mode(self) -> None:
        def work(group: Group, rank: int) -> None:
            for step in range(4):
                self.latency(group.slot(step % 2), group, rank, step >= 2)

        on_every_rank(self.groups(), work)

    def test_a_step_in_the_throughput_mode(self) -> None:
        def work(group: Group, rank: int) -> None:
            slot, outputs = group.slot(), group.throughput_outputs()
            weights = array("f", [float(at) for at in range(TOKENS * TOP_K)])
            slot.dispatch(rows_of(rank), choices_of(rank), weights)
            slot.receive(outputs)
            self.assertEqual(outputs.count, outputs.ranges()[-1])
            self.assertEqual(sum(outputs.counts()), sum(1 for at in range(outputs.count * TOP_K) if outputs.experts[at] >= 0))
            self.assertTrue(all(count % 16 == 0 for count in outputs.counts(16)))
            values, results = outputs.values.cast("H"), slot.results()
            back = array("f", bytes(outputs.count * TOP_K * 4))
            for row in range(outputs.count):
                factor = 0
                for choice in range(row * TOP_K, (row + 1) * TOP_K):
                    if outputs.experts[choice] >= 0:
                        factor += group.info.first_expert + outputs.experts[choice] + 1
                        back[choice] = outputs.weights[choice]
                for at in range(row * HIDDEN, (row + 1) * HIDDEN):
                    results[at] = bf16(f32(values[at]) * factor)
            slot.combine(back)
            combined, came_back = array("H", bytes(TOKENS * HIDDEN * 2)), array("f", bytes(TOKENS * TOP_K * 4))
            slot.finish(combined, came_back, [array("H", bytes(TOKENS * HIDDEN * 2))])
            self.check(rank, combined)
            wanted = [weight if choices_of(rank)[at] >= 0 else 0.0 for at, weight in enumerate(weights)]
            self.assertEqual(list(came_back), wanted)

        on_every_rank(self.groups(), work)

    def test_ranks_meet_at_their_addresses(self) -> None:
        groups = [
            Group(
                rank,
                max_tokens=[TOKENS] * 2,
                experts=4,
                top_k=1,
                hidden=HIDDEN,
                key=b"a key of these tests",
                name=f"rank {rank}",
            )
            for rank in range(2)
        ]
        addresses = [group.address for group in groups]

        def work(group: Group, rank: int) -> None:
            group.meet(addresses, timeout=30)
            slot, outputs = group.slot(), group.latency_outputs("fp8")
            with self.assertRaisesRegex(BadArgument, "bytes of rows"):
                slot.dispatch(array("H", [0] * 10), [0], count=1)
            # To the other's second expert, made FP8 on the way: the largest value is 448 times the scale.
            slot.dispatch(array("H", [bf16(2.0)] * HIDDEN), [3 - 2 * rank], form="fp8")
            slot.receive(outputs)
            self.assertEqual((list(outputs.counts), outputs.values[outputs.rows * HIDDEN]), ([0, 1], 0x7E))
            scale = struct.unpack_from("<f", outputs.scales, outputs.rows * 4)[0]
            self.assertAlmostEqual(scale * 448, 2.0, places=5)
            slot.results(1)[:] = array("H", [bf16(5.0)] * HIDDEN)
            slot.combine()
            combined = array("H", bytes(HIDDEN * 2))
            slot.finish(combined, [0.5])
            self.assertEqual(f32(combined[0]), 2.5)
            self.assertEqual((group.info.rank, group.info.local_experts, group.masked()), (rank, 2, []))
            outputs.close()

        on_every_rank(groups, work)
        for group in groups:
            group.close()
        with self.assertRaises(BadHandle):
            groups[0].address

    def test_calls_in_another_order_are_refused(self) -> None:
        (group,) = self.groups(ranks=1)
        slot, outputs = group.slot(), group.latency_outputs()
        with self.assertRaises(OutOfOrder):
            slot.receive(outputs)
        by_rank, by_expert, is_in = group.spread(choices_of(0))
        self.assertEqual((by_rank, sum(by_expert), len(is_in)), ([TOKENS], 18, TOKENS))
        with self.assertRaisesRegex(BadArgument, "must be -1 or below 8"):
            slot.dispatch(rows_of(0), [8] * TOKENS * TOP_K)
        with self.assertRaisesRegex(BadArgument, "choices"):
            slot.dispatch(rows_of(0), [1])

    def test_results_outlive_their_group(self) -> None:
        (group,) = self.groups(ranks=1)
        slot, outputs = group.slot(), group.latency_outputs()
        slot.dispatch(rows_of(0), choices_of(0))
        slot.receive(outputs)
        views, handle = [slot.results(0), slot.all_results(outputs)], group.handle()
        group.close()
        with self.assertRaises(BadHandle):
            slot.results(0)
        while views:
            # Left, and not freed.
            self.assertEqual(lib.crossdock_group_masked(handle, ffi.NULL, 0, ffi.new("size_t *")), OK)
            views[-1][0] = views[-1][len(views[-1]) - 1] = 7
            self.assertEqual(views[-1][0], 7)
            views.pop()
        self.assertEqual(lib.crossdock_group_masked(handle, ffi.NULL, 0, ffi.new("size_t *")), BAD_HANDLE)

    def test_views_outlive_their_outputs(self) -> None:
        (group,) = self.groups(ranks=1)
        outputs = group.latency_outputs()
        values = outputs.values
        del outputs
        group.close()
        self.assertEqual(values[5], 0)


if __name__ == "__main__":
    unittest.main()
