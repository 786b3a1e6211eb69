"""A decode rank: opens a room for each request, and goes on with those whose pages have come, one token a step."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Set

from model import Model, Share
from processes import TIMEOUT, Parent, Ranks
from worker import Job, PagedCache, Scene, Worker

import crossdock


class Answers(NamedTuple):
    """What a rank tells in the end."""

    tokens: Dict[int, List[int]]
    """By room."""
    pages: int
    """That the prefill side has filled here: one for each layer."""


def work(ranks: Ranks, parent: Parent, scene: Scene, registry: str, key: bytes) -> Answers:
    model = Model(scene.attention)
    share = Share.of(ranks.rank(), ranks.size(), ranks.all_gather)
    with Worker("decode", ranks.rank(), scene, registry, key) as worker:
        peers = worker.connect("prefill")
        parent.tell("ready")
        requests = {job.room: Request(worker, peers, job) for job in parent.receive()}
        moved = sum(request.pages for request in requests.values()) * len(worker.layout.layers)
        serve(requests, model, share, worker.node, ranks)
        assert worker.pool.stats().free == worker.layout.pages, "pages were lost"
        return Answers({room: request.tokens for room, request in requests.items()}, moved)


def serve(requests: Dict[int, Request], model: Model, share: Share, node: crossdock.Node, ranks: Ranks) -> None:
    """All requests until their answers are complete."""
    arrived: Set[int] = set()
    running: List[int] = []
    left = len(requests)
    while left:
        # Who has something to do only asks what has happened.
        events = node.events() if running or arrived else node.wait(TIMEOUT)
        arrived.update(event.subject.tag for event in events if event.kind == crossdock.EventKind.ENDED)
        # Ranks may hear of rooms in different orders, but have to compute the same: what has come to all of them.
        joining = set.intersection(*ranks.all_gather(arrived))
        arrived -= joining
        for room in sorted(joining):
            requests[room].begin()
        running += sorted(joining)
        for room in running:
            requests[room].step(model, share)
        done = [room for room in running if requests[room].is_done()]
        for room in done:
            requests[room].close()
            running.remove(room)
        left -= len(done)


class Request:
    """One request on this rank."""

    def __init__(self, worker: Worker, peers: List[crossdock.Peer], job: Job) -> None:
        self.worker, self.job = worker, job
        self.tokens: List[int] = []
        here, there = worker.scene.parallelism("decode"), worker.scene.parallelism("prefill")
        sources = [
            crossdock.Source(peers[rank], rank, parts)
            for rank, parts in there.sources(here, worker.rank, spread_by=job.room)
        ]
        self.pages = worker.layout.pages_for(len(job.prompt))
        self.receiving = worker.node.receive(
            sources, job.room, len(job.prompt), worker.pool.take(self.pages), deadline=TIMEOUT, tag=job.room
        )

    def begin(self) -> None:
        """The room has ended: the prompt is here, and the first token of the answer."""
        with self.receiving as room:
            end = room.wait(TIMEOUT).check()
            # Until then the prefill side could still write them.
            room.wait_pages(TIMEOUT)
            self.held = [room.take_pages()]
        self.cache = PagedCache(self.worker, self.held[0].ids)
        self.tokens.append(int.from_bytes(end.aux, "little"))

    def is_done(self) -> bool:
        return len(self.tokens) >= self.job.new_tokens

    def step(self, model: Model, share: Share) -> None:
        """One more token."""
        if self.is_done():
            return
        position = len(self.job.prompt) + len(self.tokens) - 1
        if position // self.worker.page_tokens == len(self.cache.pages):
            self.held.append(self.worker.pool.take(1))
            self.cache.add(self.held[-1].ids)
        self.tokens.append(model.forward(self.tokens[-1:], position, self.cache, share))

    def close(self) -> None:
        """The pages are the pool's again."""
        for pages in self.held:
            pages.close()
