"""The model with experts in its MLPs' place, of which each token chooses two.

Activations are rounded to bfloat16 where crossdock moves them: on the way to the experts, on the way back, and where
results are summed. So the same sums in one process, below, have the same bits.
"""

from __future__ import annotations

from typing import Callable, List, NamedTuple, Sequence, Tuple

from model import FFN, HIDDEN, LAYERS, WHOLE, Array, Model, PlainCache, activated, normed  # Before NumPy.

import numpy

EXPERTS, TOP_K = 8, 2

# Sums the experts' results for the tokens of a layer: (layer, x) to what is added to x.
Mlp = Callable[[int, Array], Array]


class Chat:
    """A request that goes on."""

    def __init__(self, prompt: Sequence[int], new_tokens: int) -> None:
        self.prompt, self.new_tokens = list(prompt), new_tokens
        self.cache = PlainCache()
        self.answer: List[int] = []

    def is_done(self) -> bool:
        return len(self.answer) >= self.new_tokens

    def next_input(self) -> Tuple[List[int], int]:
        """The tokens that the model has not seen, and the position of the first."""
        if not self.answer:
            return self.prompt, 0
        return self.answer[-1:], len(self.prompt) + len(self.answer) - 1


class MoeModel(Model):
    def __init__(self) -> None:
        super().__init__("gqa")
        self.router = self.random(LAYERS, HIDDEN, EXPERTS)
        self.expert_up = self.random(LAYERS, EXPERTS, HIDDEN, FFN)
        self.expert_down = self.random(LAYERS, EXPERTS, FFN, HIDDEN)

    def route(self, layer: int, x: Array) -> Tuple[Array, Array, Array]:
        """The rows that go to experts (bits of bfloat16), which they go to, and with which weights.

        The weights are rounded to bfloat16, too: its products with results, of bfloat16 as well, then are exact in
        float32, and a fused multiply-add, of which NumPy has none, gives what a product and a sum give.
        """
        rows = normed(x)
        # Row by row, here and in `expert`: a product of more rows at once may be summed in another order.
        scores = numpy.array([row[None] @ self.router[layer] for row in rows], numpy.float32).reshape(len(x), EXPERTS)
        choices = numpy.argsort(-scores, axis=1, kind="stable")[:, :TOP_K].astype(numpy.int64)
        chosen = numpy.exp(numpy.take_along_axis(scores, choices, axis=1) - scores.max(axis=1, keepdims=True))
        weights = chosen / (chosen[:, :1] + chosen[:, 1:])
        return to_bf16(rows), choices, to_f32(to_bf16(weights))

    def expert(self, layer: int, expert: int, row: Array) -> Array:
        """What an expert makes of one row: both are bits of bfloat16."""
        hidden = activated(to_f32(row)[None] @ self.expert_up[layer, expert])
        return to_bf16(hidden @ self.expert_down[layer, expert])[0]

    def step(self, chats: Sequence[Chat], mlp: Mlp) -> None:
        """One more token for each of them. Their attention is computed one by one, their experts' work at once."""
        inputs = [chat.next_input() for chat in chats]
        states = [self.embed(tokens) for tokens, _ in inputs]
        ends = numpy.cumsum([len(tokens) for tokens, _ in inputs], dtype=numpy.int64)
        for layer in range(LAYERS):
            for at, (chat, (_, first)) in enumerate(zip(chats, inputs)):
                states[at] = self.attention(layer, states[at], first, chat.cache, WHOLE)
            # Also without any: the other ranks wait for this one.
            x = numpy.concatenate([numpy.zeros((0, HIDDEN), numpy.float32), *states])
            states = numpy.split(x + mlp(layer, x), ends)[: len(chats)]
        for chat, x in zip(chats, states):
            chat.answer.append(self.next_token(x))


class OneProcess(NamedTuple):
    """The sums that crossdock makes, without it."""

    model: MoeModel
    ranks: int

    def prefill(self, layer: int, x: Array) -> Array:
        """As the normal mode: each rank sums its own experts' results, rounded once; then the ranks' sums are summed in
        their order."""
        rows, choices, weights = self.model.route(layer, x)
        summed = numpy.zeros(x.shape, numpy.float32)
        for token, row in enumerate(rows):
            for rank in range(self.ranks):
                local = numpy.where(choices[token] // (EXPERTS // self.ranks) == rank, choices[token], -1)
                if (local >= 0).any():
                    summed[token] += to_f32(partial_sum(self.model, layer, row, local, weights[token]))
        return to_f32(to_bf16(summed))

    def decode(self, layer: int, x: Array) -> Array:
        """As the latency mode: the weighted sum over the choices in their order, rounded once."""
        rows, choices, weights = self.model.route(layer, x)
        summed = numpy.zeros(x.shape, numpy.float32)
        for token, row in enumerate(rows):
            for expert, weight in zip(choices[token], weights[token]):
                summed[token] += weight * to_f32(self.model.expert(layer, expert, row))
        return to_f32(to_bf16(summed))


def partial_sum(model: MoeModel, layer: int, row: Array, experts: Array, weights: Array) -> Array:
    """What one rank gives back for a row in the normal mode: of the choices that are its own, the others being -1."""
    summed = numpy.zeros(HIDDEN, numpy.float32)
    for expert, weight in zip(experts, weights):
        if expert >= 0:
            summed += weight * to_f32(model.expert(layer, expert, row))
    return to_bf16(summed)


def to_bf16(values: Array) -> Array:
    """The bits of the nearest bfloat16, the even one of two."""
    bits = numpy.ascontiguousarray(values, numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(numpy.uint16)


def to_f32(bits: Array) -> Array:
    return (numpy.asarray(bits).astype(numpy.uint32) << 16).view(numpy.float32)
