"""Disaggregated serving in Python: prefill and decode are processes of their own, between which the KV cache moves.

    python examples/serving/main.py

Needs crossdock's Python package and NumPy. A small transformer is served in six scenes: two kinds of attention (GQA, of
which each tensor-parallel rank keeps some KV heads, and MLA, of which each keeps the whole cache), each with one rank
on both sides, one to two, and two to one. Pages have 8 tokens on the prefill side and 4 on the decode side. Every
answer has to be that of the same model in one process, token for token.

The router is this file. Read on in `prefill.py` and `decode.py`, which open the rooms; `worker.py` has what both need.
`model.py` knows nothing of crossdock, and `processes.py` is about processes alone.
"""

from __future__ import annotations

import argparse
import random
import secrets
import time
from typing import Dict, List, NamedTuple

import crossdock
import decode
import prefill
from model import VOCABULARY, Model, in_one_process
from processes import Processes
from worker import Job, Scene

SCENES = [Scene(attention, *tp) for attention in ("gqa", "mla") for tp in ((1, 1), (1, 2), (2, 1))]
PROMPTS = [5, 40, 17, 1, 64, 24]


# By room.
Answers = Dict[int, List[int]]


class Line(NamedTuple):
    """What a scene came to."""

    scene: str
    requests: int
    tokens: int
    pages: int
    milliseconds: float
    is_equal: bool


def main() -> None:
    arguments = argparse.ArgumentParser(description="KV-cache pages between prefill and decode processes")
    arguments.add_argument("--scene", action="append", type=scene_of, help="as gqa:1:2 or mla:2:1; all if left out")
    arguments.add_argument("--requests", type=int, default=len(PROMPTS))
    arguments.add_argument("--new-tokens", type=int, default=24)
    given = arguments.parse_args()
    jobs = requests(given.requests, given.new_tokens)
    print(f"{'scene':<13}{'requests':>8}{'tokens':>8}{'pages moved':>13}{'ms':>8}  equal")
    alone: Dict[str, Answers] = {}
    lines = []
    for one in given.scene or SCENES:
        if one.attention not in alone:
            model = Model(one.attention)
            alone[one.attention] = {job.room: in_one_process(model, job.prompt, job.new_tokens) for job in jobs}
        line = serve(one, jobs, alone[one.attention])
        print(
            f"{line.scene:<13}{line.requests:>8}{line.tokens:>8}{line.pages:>13}{line.milliseconds:>8.0f}  "
            f"{'yes' if line.is_equal else 'NO'}",
            flush=True,
        )
        lines.append(line)
    assert all(line.is_equal for line in lines), "an answer is not that of the model in one process"
    print("every answer is that of the same model in one process")


def scene_of(text: str) -> Scene:
    attention, prefill_tp, decode_tp = text.split(":")
    return Scene(attention, int(prefill_tp), int(decode_tp))


def requests(count: int, new_tokens: int) -> List[Job]:
    """Of different lengths, with answers of different lengths."""
    chosen = random.Random(11)
    jobs = []
    for at in range(count):
        prompt = [chosen.randrange(VOCABULARY) for _ in range(PROMPTS[at % len(PROMPTS)])]
        jobs.append(Job(at + 1, prompt, max(1, new_tokens - at)))
    return jobs


def serve(scene: Scene, jobs: List[Job], alone: Answers) -> Line:
    """Starts the processes of a scene, gives them all requests at once, and compares what they say."""
    key = secrets.token_bytes(32)
    with crossdock.Registry() as registry, Processes() as processes:
        where = (scene, registry.address, key)
        processes.start("prefill", prefill.work, scene.prefill_tp, *where)
        processes.start("decode", decode.work, scene.decode_tp, *where)
        processes.hear()  # that they are ready
        begun = time.perf_counter()
        processes.tell(jobs)
        told = processes.hear()
        seconds = time.perf_counter() - begun
    answers = [told[f"decode-{rank}"] for rank in range(scene.decode_tp)]
    return Line(
        f"{scene.attention}, {scene.prefill_tp} -> {scene.decode_tp}",
        len(jobs),
        sum(len(tokens) for tokens in alone.values()),
        sum(answer.pages for answer in answers),
        seconds * 1000,
        all(answer.tokens == alone for answer in answers),
    )


if __name__ == "__main__":
    main()
