"""A small decoder-only transformer in float32, which knows nothing of crossdock.

Its numbers are the same however it is spread: each head is computed by itself, of arrays of the same shapes on
whatever rank it is, and the heads' outputs are put side by side before the next projection. Nothing is added up across
ranks, where another order of the same numbers would give another sum.
"""

from __future__ import annotations

import os

# One thread: a product that is split among several may be summed in another order. NumPy looks at it when it is loaded;
# the processes that are started have it from here.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from typing import Callable, Dict, List, NamedTuple, Optional, Protocol, Sequence  # noqa: E402

import numpy  # noqa: E402

Array = numpy.ndarray

SEED = 7
LAYERS, HIDDEN, VOCABULARY, FFN = 4, 64, 256, 128
QUERY_HEADS, KV_HEADS, HEAD = 8, 4, 16
# Of MLA: what is kept of a token is one latent, and one key that tells the position.
LATENT, ROPE = 32, 8


class Cache(Protocol):
    """Where the keys and values of one request are kept."""

    def write(self, layer: int, first: int, parts: Sequence[Array]) -> None:
        """Keeps rows `[tokens, width]` from token `first` on, of each part."""

    def read(self, layer: int, tokens: int) -> List[Array]:
        """The rows of the first tokens, of each part."""


class Share(NamedTuple):
    """The heads that one tensor-parallel rank computes."""

    heads: range
    gather: Callable[[Array], List[Array]]
    """Gives what every rank has given, by rank."""

    @classmethod
    def of(cls, rank: int, ranks: int, gather: Callable[[Array], List[Array]]) -> Share:
        each = QUERY_HEADS // ranks
        return cls(range(rank * each, (rank + 1) * each), gather)


WHOLE = Share.of(0, 1, lambda heads: [heads])


class Gqa:
    """Grouped-query attention: two query heads look at the same keys and values."""

    GROUP = QUERY_HEADS // KV_HEADS

    def __init__(self, random: Callable[..., Array]) -> None:
        self.query = random(LAYERS, QUERY_HEADS, HIDDEN, HEAD)
        self.key = random(LAYERS, KV_HEADS, HIDDEN, HEAD)
        self.value = random(LAYERS, KV_HEADS, HIDDEN, HEAD)

    def heads(self, layer: int, x: Array, first: int, cache: Cache, heads: range) -> List[Array]:
        here = range(heads.start // self.GROUP, heads.stop // self.GROUP)
        keys = [turned(x @ self.key[layer, head], first) for head in here]
        values = [x @ self.value[layer, head] for head in here]
        cache.write(layer, first, [numpy.concatenate(keys, axis=1), numpy.concatenate(values, axis=1)])
        all_keys, all_values = cache.read(layer, first + len(x))
        outputs = []
        for head in heads:
            at = (head // self.GROUP - here.start) * HEAD
            key, value = columns(all_keys, at, HEAD), columns(all_values, at, HEAD)
            query = turned(x @ self.query[layer, head], first)
            outputs.append(attention(query @ key.T, HEAD, first) @ value)
        return outputs


class Mla:
    """Multi-head latent attention: all heads look at the same latents, each through projections of its own."""

    def __init__(self, random: Callable[..., Array]) -> None:
        self.query = random(LAYERS, QUERY_HEADS, HIDDEN, HEAD + ROPE)
        self.latent = random(LAYERS, HIDDEN, LATENT)
        self.position = random(LAYERS, HIDDEN, ROPE)
        self.key = random(LAYERS, QUERY_HEADS, LATENT, HEAD)
        self.value = random(LAYERS, QUERY_HEADS, LATENT, HEAD)

    def heads(self, layer: int, x: Array, first: int, cache: Cache, heads: range) -> List[Array]:
        latent = normed(x @ self.latent[layer])
        cache.write(layer, first, [numpy.concatenate([latent, turned(x @ self.position[layer], first)], axis=1)])
        (rows,) = cache.read(layer, first + len(x))
        latents, positions = columns(rows, 0, LATENT), columns(rows, LATENT, ROPE)
        outputs = []
        for head in heads:
            query = x @ self.query[layer, head]
            # The query meets the latents themselves: no key is ever made of them.
            scores = columns(query, 0, HEAD) @ self.key[layer, head].T @ latents.T
            scores = scores + turned(columns(query, HEAD, ROPE), first) @ positions.T
            outputs.append(attention(scores, HEAD + ROPE, first) @ latents @ self.value[layer, head])
        return outputs


class Model:
    """Random weights, the same wherever it is made."""

    def __init__(self, kind: str) -> None:
        generator = numpy.random.default_rng(SEED)

        def random(*shape: int) -> Array:
            return generator.standard_normal(shape, numpy.float32) / numpy.float32(numpy.sqrt(shape[-2]))

        self.random = random
        self.embedding = generator.standard_normal((VOCABULARY, HIDDEN), numpy.float32)
        self.attends = {"gqa": Gqa, "mla": Mla}[kind](random)
        self.output = random(LAYERS, QUERY_HEADS * HEAD, HIDDEN)
        self.up = random(LAYERS, HIDDEN, FFN)
        self.down = random(LAYERS, FFN, HIDDEN)
        self.head = random(HIDDEN, VOCABULARY)

    def embed(self, tokens: Sequence[int]) -> Array:
        return self.embedding[list(tokens)]

    def attention(self, layer: int, x: Array, first: int, cache: Cache, share: Share) -> Array:
        own = numpy.stack(self.attends.heads(layer, normed(x), first, cache, share.heads), axis=1)
        heads = numpy.concatenate(share.gather(own), axis=1)
        return x + heads.reshape(len(x), QUERY_HEADS * HEAD) @ self.output[layer]

    def mlp(self, layer: int, x: Array) -> Array:
        return x + activated(normed(x) @ self.up[layer]) @ self.down[layer]

    def next_token(self, x: Array) -> int:
        """The likeliest token after the last of these."""
        return int(numpy.argmax(normed(x[-1:]) @ self.head))

    def forward(
        self,
        tokens: Sequence[int],
        first: int,
        cache: Cache,
        share: Share = WHOLE,
        after_layer: Optional[Callable[[int], None]] = None,
    ) -> int:
        """The token that follows these, of which the first has position `first`. Each rank computes all of the MLPs."""
        x = self.embed(tokens)
        for layer in range(LAYERS):
            x = self.attention(layer, x, first, cache, share)
            if after_layer is not None:
                after_layer(layer)
            x = self.mlp(layer, x)
        return self.next_token(x)


class PlainCache:
    """Everything in one place, without pages."""

    def __init__(self) -> None:
        self.layers: Dict[int, List[Array]] = {}

    def write(self, layer: int, first: int, parts: Sequence[Array]) -> None:
        old = [part[:first] for part in self.layers.get(layer, [])]
        self.layers[layer] = [numpy.concatenate(pair) for pair in zip(old, parts)] if old else list(parts)

    def read(self, layer: int, tokens: int) -> List[Array]:
        return [part[:tokens] for part in self.layers[layer]]


def in_one_process(model: Model, prompt: Sequence[int], count: int) -> List[int]:
    """The answer that all scenes are compared with."""
    cache = PlainCache()
    answer = [model.forward(prompt, 0, cache)]
    while len(answer) < count:
        answer.append(model.forward(answer[-1:], len(prompt) + len(answer) - 1, cache))
    return answer


def columns(rows: Array, at: int, width: int) -> Array:
    """Some columns, as an array of their own: what is beside them differs between ranks."""
    return numpy.ascontiguousarray(rows[:, at : at + width])


def normed(x: Array) -> Array:
    return x / numpy.sqrt((x * x).mean(axis=-1, keepdims=True) + numpy.float32(1e-6))


def activated(x: Array) -> Array:
    return x / (1 + numpy.exp(-x))


def turned(x: Array, first: int) -> Array:
    """Rows that know their positions: each pair of channels is turned by an angle (RoPE)."""
    half = x.shape[1] // 2
    speeds = 100.0 ** (-numpy.arange(half) / half)
    angles = (numpy.arange(first, first + len(x))[:, None] * speeds).astype(numpy.float32)
    sine, cosine = numpy.sin(angles), numpy.cos(angles)
    left, right = x[:, :half], x[:, half:]
    return numpy.concatenate([left * cosine - right * sine, left * sine + right * cosine], axis=1)


def attention(scores: Array, width: int, first: int) -> Array:
    """How much each token looks at those up to itself."""
    queries, keys = scores.shape
    is_later = numpy.arange(keys) > numpy.arange(first, first + queries)[:, None]
    scores = numpy.where(is_later, numpy.float32(-numpy.inf), scores / numpy.float32(numpy.sqrt(width)))
    weights = numpy.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
