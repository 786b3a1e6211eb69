"""A prefill rank: computes prompts, and sends each layer's keys and values as soon as they are there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import List

from model import Model, Share
from processes import TIMEOUT, Parent, Ranks
from worker import Job, PagedCache, Scene, Worker

import crossdock


def work(ranks: Ranks, parent: Parent, scene: Scene, registry: str, key: bytes) -> None:
    model = Model(scene.attention)
    share = Share.of(ranks.rank(), ranks.size(), ranks.all_gather)
    with Worker("prefill", ranks.rank(), scene, registry, key) as worker:
        worker.register()
        parent.tell("ready")
        jobs: List[Job] = parent.receive()
        with ExitStack() as opened:
            sent = [sending for job in jobs for sending in prefill(model, share, worker, job, opened)]
            # The pages may be used again when the decode side has them.
            for sending in sent:
                sending.wait(TIMEOUT).check()


def prefill(model: Model, share: Share, worker: Worker, job: Job, opened: ExitStack) -> List[crossdock.Sending]:
    """One prompt, from its first layer to its first new token."""
    tokens = len(job.prompt)
    pages = opened.enter_context(worker.pool.take(worker.layout.pages_for(tokens)))
    here, there = worker.scene.parallelism("prefill"), worker.scene.parallelism("decode")
    # None where each rank keeps the whole cache and another one brings it: the room's number chooses, on both sides.
    takers = here.destinations(there, worker.rank, spread_by=job.room)
    sent = []
    if takers:
        room = worker.node.send(job.room, tokens, pages, ranks=takers, deadline=TIMEOUT)
        sent.append(opened.enter_context(room))

    def send(layer: int) -> None:
        for sending in sent:
            sending.send(layer)

    first_token = model.forward(job.prompt, 0, PagedCache(worker, pages.ids), share, after_layer=send)
    for sending in sent:
        sending.finish(aux=first_token.to_bytes(4, "little"))
    return sent
