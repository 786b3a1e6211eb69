"""Experts in Python: four processes serve requests of their own, and send each token to the ranks of its experts.

    python examples/serving/experts.py

Needs crossdock's Python package and NumPy. The calls are DeepEP's, of `crossdock.deep_ep.Buffer`: prompts go through
the normal mode, new tokens through the low-latency mode. Every answer has to be that of the same model in one process,
token for token; `moe.py` has that model, and says why its sums are the same to the last bit.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import time
from typing import List

from model import VOCABULARY, Array  # Before NumPy.
from moe import EXPERTS, Chat, MoeModel, OneProcess, partial_sum, to_f32
from processes import Parent, Processes, Ranks

import numpy

from crossdock.deep_ep import Buffer

RANKS = 4
LOCAL = EXPERTS // RANKS
# In one step, by rank: of a prefill all tokens of its prompts, of a decode its requests.
MOST_PREFILL, MOST_DECODE = 256, 8
# By rank. The last one has no request, and experts that the others need.
PROMPTS = [[5, 33], [20], [1, 9, 17], []]


class Experts:
    """The MLPs of one rank: its tokens go to all ranks' experts, and its own experts work for all ranks."""

    def __init__(self, model: MoeModel, ranks: Ranks) -> None:
        self.model, self.rank = model, ranks.rank()
        Buffer.max_tokens_per_rank = MOST_PREFILL
        self.buffer = Buffer(ranks, low_latency_mode=True, explicitly_destroy=True)

    def prefill(self, layer: int, x: Array) -> Array:
        rows, choices, weights = self.model.route(layer, x)
        by_rank, _, by_expert, is_in_rank, _ = self.buffer.get_dispatch_layout(choices, EXPERTS)
        received, local, their_weights, _, handle, _ = self.buffer.dispatch(
            rows,
            num_tokens_per_rank=by_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=by_expert,
            topk_idx=choices,
            topk_weights=weights,
        )
        results = numpy.zeros(received.shape, numpy.uint16)
        for at, row in enumerate(received):
            experts = numpy.where(local[at] >= 0, local[at] + self.rank * LOCAL, -1)
            results[at] = partial_sum(self.model, layer, row, experts, their_weights[at])
        combined, _, _ = self.buffer.combine(results, handle)
        return to_f32(combined)

    def decode(self, layer: int, x: Array) -> Array:
        rows, choices, weights = self.model.route(layer, x)
        received, counts, handle, _, arrive = self.buffer.low_latency_dispatch(
            rows, choices, MOST_DECODE, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        # Here a rank may do something else until the rows have come.
        arrive()
        results = numpy.zeros(received.shape, numpy.uint16)
        for local in range(LOCAL):
            for at in range(counts[local]):
                results[local, at] = self.model.expert(layer, self.rank * LOCAL + local, received[local, at])
        combined, _, _ = self.buffer.low_latency_combine(results, choices, weights, handle)
        return to_f32(combined)


def work(ranks: Ranks, parent: Parent, prompts: List[List[List[int]]], new_tokens: int) -> List[List[int]]:
    model = MoeModel()
    experts = Experts(model, ranks)
    chats = chats_of(prompts[ranks.rank()], new_tokens)
    model.step(chats, experts.prefill)
    parent.tell("prefilled")
    # All ranks make the same calls: also one that is done, as long as another is not.
    while any(ranks.all_gather(any(not chat.is_done() for chat in chats))):
        model.step([chat for chat in chats if not chat.is_done()], experts.decode)
    # None leaves while another may still need it.
    ranks.all_gather("done")
    experts.buffer.destroy()
    return [chat.answer for chat in chats]


def chats_of(prompts: List[List[int]], new_tokens: int) -> List[Chat]:
    """With answers of different lengths."""
    return [Chat(prompt, max(1, new_tokens - 2 * at)) for at, prompt in enumerate(prompts)]


def main() -> None:
    arguments = argparse.ArgumentParser(description="tokens to their experts and back")
    arguments.add_argument("--new-tokens", type=int, default=16)
    new_tokens = arguments.parse_args().new_tokens
    chosen = random.Random(13)
    prompts = [[[chosen.randrange(VOCABULARY) for _ in range(tokens)] for tokens in rank] for rank in PROMPTS]
    # What all ranks share: without it anybody may connect.
    os.environ["CROSSDOCK_KEY"] = secrets.token_hex(32)
    os.environ.setdefault("CROSSDOCK_HOST", "127.0.0.1")
    with Processes() as processes:
        processes.start("rank", work, RANKS, prompts, new_tokens)
        processes.hear()  # that prompts are through
        begun = time.perf_counter()
        told = processes.hear()
        seconds = time.perf_counter() - begun
    print(f"{'rank':<6}{'requests':>8}{'prompt tokens':>15}{'tokens':>8}  equal")
    model = MoeModel()
    alone = OneProcess(model, RANKS)
    are_equal = []
    for rank in range(RANKS):
        chats = chats_of(prompts[rank], new_tokens)
        for chat in chats:
            model.step([chat], alone.prefill)
            while not chat.is_done():
                model.step([chat], alone.decode)
        expected = [chat.answer for chat in chats]
        are_equal.append(told[f"rank-{rank}"] == expected)
        prompt_tokens, tokens = (sum(map(len, some)) for some in (prompts[rank], expected))
        print(f"{rank:<6}{len(chats):>8}{prompt_tokens:>15}{tokens:>8}  {'yes' if are_equal[-1] else 'NO'}")
    print(f"decoded in {seconds * 1000:.0f} ms")
    assert all(are_equal), "an answer is not that of the model in one process"
    print("every answer is that of the same model in one process")


if __name__ == "__main__":
    main()
