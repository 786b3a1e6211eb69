"""One rank of an SGLang engine, without its scheduler: a program that makes SGLang's manager over a cache in host
memory, and senders or receivers as it is told, line by line. `Rank` is its other end, for tests."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import time
from typing import Any, Dict, List, Optional, Sequence, TextIO, Tuple

from . import sglang as wheel
from .sglang_nursery import Nursery

FAILED, BOOTSTRAPPING, WAITING, TRANSFERRING, SUCCESS = range(5)
TIMEOUT = 30.0

USUAL: Dict[str, Any] = dict(
    backend="crossdock",
    kind="mla",
    layers=3,
    heads=4,
    head_bytes=32,
    page_tokens=4,
    pages=48,
    tp=1,
    tp_rank=0,
    pp=1,
    pp_rank=0,
    dp=1,
    dp_rank=0,
    dtype="bfloat16",
    order="nhd",
    draft=[],
    states=[],
    seed=5,
    env={},
)
AUX = (64, 48, 128)
AUX_ROWS = 16


class Rank:
    """A rank's process."""

    def __init__(self, role: str, port: int, **options: Any) -> None:
        self.options = {**USUAL, "role": role, "port": port, **options}
        self.process = Nursery.get().child(self.options["env"], TIMEOUT)
        self.address = f"127.0.0.1:{port}"
        self.tell(self.options)

    def tell(self, what: Any) -> None:
        self.process.write(json.dumps(what).encode() + b"\n")

    def answer(self, timeout: float = TIMEOUT) -> Any:
        who = f"{self.options['role']} {self.options['tp_rank']}"
        try:
            line = self.process.line(timeout)
        except TimeoutError:
            raise AssertionError(f"no answer of {who}") from None
        if line is None:
            raise AssertionError(f"{who} has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RankError(answer["error"])
        return answer["result"]

    def ask(self, op: str, **what: Any) -> Any:
        self.tell({"op": op, **what})
        return self.answer()

    def call(self, room: int, method: str, *args: Any, **named: Any) -> Any:
        return self.ask("call", room=room, method=method, args=args, named=named)

    def wait(self, room: int, *states: int, timeout: float = TIMEOUT) -> int:
        """Polls until the room is in one of the states, or has failed."""
        return int(self.ask("wait", room=room, states=states, timeout=timeout))

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self.process.close()

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RankError(Exception):
    """What a rank's call has raised."""


def pages(numbers: Sequence[int], is_list: bool = False) -> Dict[str, Any]:
    """An array of page indices, as the scheduler passes them, or a list of arrays without dimensions."""
    return {"list" if is_list else "pages": list(numbers)}


class Cache:
    """The buffers of a rank, and what they should hold."""

    def __init__(self, options: Dict[str, Any]) -> None:
        import numpy

        self.numpy = numpy
        self.options = options
        tp, pp = options["tp"], options["pp"]
        stages = [options["layers"] // pp + (at < options["layers"] % pp) for at in range(pp)]
        self.first_layer = sum(stages[: options["pp_rank"]])
        self.layers = range(self.first_layer, self.first_layer + stages[options["pp_rank"]])
        self.is_mla = options["kind"] == "mla"
        all_heads = 1 if self.is_mla else options["heads"]
        self.local_heads = 1 if self.is_mla else max(1, all_heads // tp)
        first = 0 if self.is_mla else options["tp_rank"] * all_heads // tp
        self.heads = slice(first, first + self.local_heads)
        self.parts = 1 if self.is_mla else 2
        is_prefill = options["role"] == "prefill"
        shape = (self.parts, options["layers"], options["pages"], options["page_tokens"], all_heads)
        self.whole = self._random(options["seed"], (*shape, options["head_bytes"]))
        mine = self.whole[:, self.layers.start : self.layers.stop, :, :, self.heads]
        filled = mine if is_prefill else self._random(900 + options["tp_rank"], mine.shape)
        # One allocation for each buffer, as the engine makes them.
        self.kv = [
            self._ordered(filled[part, layer]).copy() for part in range(self.parts) for layer in range(len(self.layers))
        ]
        # Of a draft model, in the same pages; every rank has it whole.
        draft = enumerate(options["draft"], options["seed"] + 20)
        self.draft_sent = [self._random(seed, (options["pages"], nbytes)) for seed, nbytes in draft]
        self.kv += [one.copy() if is_prefill else one * 0 for one in self.draft_sent]
        self.aux_sent = [self._random(options["seed"] + 1 + at, (AUX_ROWS, nbytes)) for at, nbytes in enumerate(AUX)]
        self.aux = [one.copy() if is_prefill else self.numpy.zeros_like(one) for one in self.aux_sent]
        # Components, their tensors, their rows; of those with heads the share of this rank.
        self.states_sent = [
            [self._state(options["seed"] + 50 + at, **state) for at in range(state.get("tensors", 2))]
            for state in options["states"]
        ]
        self.states = [[one.copy() if is_prefill else one * 0 for one in state] for state in self.states_sent]
        self.expected = [one.copy() for one in self._all()]

    def _random(self, seed: int, shape: Tuple[int, ...]) -> Any:
        return self.numpy.random.default_rng(seed).integers(0, 256, shape, "uint8")

    def _state(self, seed: int, rows: int, bytes: int, heads: bool = False, **_: Any) -> Any:
        if not heads:
            return self._random(seed, (rows, bytes))
        options = self.options
        whole = self._random(seed, (rows, options["page_tokens"], options["heads"], bytes))
        return self._ordered(whole[:, :, self.heads]).reshape(rows, -1).copy()

    def _ordered(self, pages: Any) -> Any:
        """Token after token, or head after head."""
        return pages if self.options["order"] == "nhd" else pages.swapaxes(1, 2)

    def _all(self) -> List[Any]:
        return [*self.kv, *self.aux, *(one for state in self.states for one in state)]

    def args(self) -> Any:
        """What the scheduler describes the cache by."""
        from sglang.srt.disaggregation.base.conn import KVArgs, StateType

        options = self.options
        args = KVArgs()
        args.engine_rank = options["tp_rank"] + options["dp_rank"] * options["tp"]
        args.kv_data_ptrs = [one.ctypes.data for one in self.kv]
        args.kv_data_lens = [one.nbytes for one in self.kv]
        args.kv_item_lens = [one[0].nbytes for one in self.kv]
        args.kv_layer_ids = []
        args.kv_cache_dtype_str = options["dtype"]
        args.aux_data_ptrs = [one.ctypes.data for one in self.aux]
        args.aux_data_lens = [one.nbytes for one in self.aux]
        args.aux_item_lens = [one[0].nbytes for one in self.aux]
        args.state_types = [StateType(state["type"]) for state in options["states"]]
        args.state_data_ptrs = [[one.ctypes.data for one in state] for state in self.states]
        args.state_data_lens = [[one.nbytes for one in state] for state in self.states]
        args.state_item_lens = [[one[0].nbytes for one in state] for state in self.states]
        args.state_layer_ids = [[] for _ in self.states]
        args.state_dim_per_tensor = [[] for _ in self.states]
        args.state_slice_outer_counts = [[] for _ in self.states]
        args.state_conv_shard_groups = [[] for _ in self.states]
        args.swa_kv_cache_layout = (
            options["order"] if any(state.get("heads") for state in options["states"]) else None
        )
        args.is_hybrid_mla_backend = False
        args.mla_compression_ratios = None
        args.ib_device = ""
        args.gpu_id = 0
        args.page_size = options["page_tokens"]
        args.system_dp_rank = options["dp_rank"]
        args.rust_http_port = None
        args.pp_rank = options["pp_rank"]
        args.num_draft_entries = len(self.draft_sent)
        # The decode side's scheduler sets none of these.
        if options["role"] == "prefill":
            args.prefill_start_layer = self.layers.start
            args.prefill_end_layer = self.layers.stop
            if not self.is_mla:
                args.kv_head_num = self.local_heads
                args.total_kv_head_num = options["heads"]
        for name, value in options.get("args", {}).items():
            setattr(args, name, value)
        return args

    def expect(self, sources: Sequence[int], targets: Sequence[int], aux: Any = None, states: Any = ()) -> None:
        """From now on, these pages are to hold what the prefill side has in those."""
        at = 0
        for part in range(self.parts):
            for layer in self.layers:
                whole = self.whole[part, layer][:, :, self.heads]
                self.expected[at][list(targets)] = self._ordered(whole)[list(sources)]
                at += 1
        for sent in self.draft_sent:
            self.expected[at][list(targets)] = sent[list(sources)]
            at += 1
        for sent in self.aux_sent:
            if aux is not None:
                self.expected[at][aux[1]] = sent[aux[0]]
            at += 1
        for nth, component in enumerate(self.states_sent):
            for sent in component:
                if nth < len(states):
                    self.expected[at][states[nth][1]] = sent[states[nth][0]]
                at += 1

    def wrong(self) -> List[int]:
        """The buffers that do not hold what they should, every byte of them."""
        found = zip(self._all(), self.expected)
        return [at for at, (is_there, should_be) in enumerate(found) if not (is_there == should_be).all()]


class Stages:
    """Stands in for the process group of the pipeline stages, by a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def broadcast_object(self, told: Any, src: int) -> Any:
        del src
        if told is not None:
            with open(self._path + ".new", "w") as file:
                json.dump(told, file)
            os.replace(self._path + ".new", self._path)
            return told
        deadline = time.monotonic() + TIMEOUT
        while not os.path.exists(self._path):
            assert time.monotonic() < deadline, "the first stage does not come"
            time.sleep(0.02)
        with open(self._path) as file:
            return json.load(file)


class Program:
    def __init__(self, options: Dict[str, Any]) -> None:
        self.options = options
        is_prefill = options["role"] == "prefill"
        for name, value in dict(
            attn_tp_size=options["tp"],
            attn_tp_rank=options["tp_rank"],
            attn_dp_size=options["dp"],
            attn_dp_rank=options["dp_rank"],
            num_dp_ranks=options["dp"],
            pp_size=options["pp"],
            pp_rank=options["pp_rank"],
            load_balance_method=options.get("balance", "follow_bootstrap_room"),
        ).items():
            setattr(wheel.parallel, name, value)
        wheel.parallel.__dict__.update(options.get("parallel", {}))
        if options["pp"] > 1:
            wheel.parallel.pp_group = Stages(f"{options['meeting']}/{options['dp_rank']}-{options['tp_rank']}")
        wheel.disagg.disaggregation_bootstrap_port = options["port"]
        wheel.disagg.disaggregation_mode = options["role"]
        self.rooms: Dict[int, Any] = {}
        self.cache = Cache(options)
        from sglang.srt.disaggregation import utils

        if options["backend"] == "mooncake":
            import crossdock.mooncake

            crossdock.mooncake.install()
            from sglang.srt.distributed.device_communicators import mooncake_transfer_engine as engine

            engine.init_mooncake_transfer_engine("127.0.0.1", 0, None)
        else:
            import crossdock.sglang

            crossdock.sglang.install()
        backend = utils.TransferBackend(options["backend"])
        kinds = utils.KVClassType
        if options.get("server"):
            self.server = utils.get_kv_class(backend, kinds.BOOTSTRAP_SERVER)("127.0.0.1", options["port"])
            listening(options["port"])
        mode = utils.DisaggregationMode(options["role"])
        manager = utils.get_kv_class(backend, kinds.MANAGER)
        self.manager = manager(self.cache.args(), mode, wheel.server_args, self.cache.is_mla)
        self.sender_or_receiver = utils.get_kv_class(backend, kinds.SENDER if is_prefill else kinds.RECEIVER)

    def run(self, op: str, room: int = 0, **what: Any) -> Any:
        if op == "new":
            made = self.sender_or_receiver(self.manager, what["address"], room, *what.get("args", ()))
            self.rooms[what.get("name", room)] = made
            return None
        if op == "rename":
            self.rooms[what["name"]] = self.rooms.pop(room)
            return None
        if op == "ports":
            return self.manager.worker.node.ports
        if op == "try_ensure":
            return bool(self.manager.try_ensure_parallel_info(what["address"]))
        if op == "tell":
            # What a peer would have sent.
            sys.modules["crossdock.sglang.manager"].__dict__.update(what.get("limits", {}))
            from crossdock.sglang.messages import message_of

            message = message_of([one.encode() for one in what["frames"]])
            return getattr(self.manager, what["to"])(message)
        if op == "ensure":
            deadline = time.monotonic() + TIMEOUT
            while not self.manager.try_ensure_parallel_info(what["address"]):
                assert time.monotonic() < deadline, "the prefill side is not registered"
                time.sleep(0.05)
            return None
        if op == "call":
            args = [self._argument(one) for one in what["args"]]
            named = {name: self._argument(one) for name, one in what["named"].items()}
            return self._told(getattr(self.rooms[room], what["method"])(*args, **named))
        if op == "dp_ranks":
            return dict(self.sender_or_receiver.query_prefill_dp_ranks(what["address"], [room]))
        if op == "is_safe":
            return bool(self.rooms[room].is_abort_release_safe() and self.manager.is_abort_release_safe(room, 1))
        if op == "wait":
            deadline = time.monotonic() + what["timeout"]
            # As the scheduler asks while it waits for the decode side.
            has_stages = self.options["role"] == "prefill" and self.options["pp"] > 1 and not self.options["pp_rank"]
            is_consensus = has_stages and WAITING in what["states"] and self.options["backend"] == "crossdock"
            poll = self.rooms[room].poll_pp_consensus if is_consensus else self.rooms[room].poll
            while True:
                status = int(poll())
                if status in what["states"] or status == FAILED:
                    return status
                assert time.monotonic() < deadline, f"room {room} is still {status}"
                time.sleep(0.002)
        if op == "failure":
            try:
                self.rooms[room].failure_exception()
            except Exception as error:
                return {"kind": type(error).__name__, "reason": getattr(error, "failure_reason", str(error))}
            return None
        if op == "manager":
            found = self.manager
            for name in what["name"].split("."):
                found = getattr(found, name)
            return self._told(found(*what["args"]) if "args" in what else found)
        if op == "expect":
            return self.cache.expect(**what)
        if op == "wrong":
            return self.cache.wrong()
        raise ValueError(op)

    def _argument(self, given: Any) -> Any:
        if isinstance(given, dict) and "pages" in given:
            return self.cache.numpy.array(given["pages"], "int32")
        if isinstance(given, dict) and "list" in given:
            return [self.cache.numpy.array(one, "int64") for one in given["list"]]
        if isinstance(given, list):
            return [self._argument(one) for one in given]
        return given

    @staticmethod
    def _told(value: Any) -> Any:
        if isinstance(value, (dict, set, list, tuple)):
            # Of SGLang's tables.
            return len(value)
        if hasattr(value, "transfer_total_bytes"):
            return [value.transfer_total_bytes, value.transfer_latency_s]
        return value


def serve(lines: TextIO, answers: TextIO) -> None:
    import logging

    logging.basicConfig(stream=sys.stderr, level=os.environ.get("CROSSDOCK_TEST_LOG", "WARNING"))
    os.environ.setdefault("CROSSDOCK_KEY", "a key that all nodes share, 32 b")
    os.environ.setdefault("MOONCAKE_PROTOCOL", "tcp")
    os.environ.setdefault("SGLANG_LOCAL_IP_NIC", "lo")
    os.environ.setdefault("SGLANG_HOST_IP", "127.0.0.1")
    os.environ.setdefault("SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT", "1000000000")
    program: Optional[Program] = None
    for line in lines:
        told = json.loads(line)
        try:
            if program is None:
                program, result = Program(told), None
            else:
                result = program.run(**told)
            answers.write(json.dumps({"result": result}) + "\n")
        except Exception as error:
            if os.environ.get("CROSSDOCK_TEST_STDERR"):
                logging.exception("%s", told.get("op"))
            answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        answers.flush()
    if program is not None and hasattr(program.manager, "close"):
        program.manager.close()


def listening(port: int) -> None:
    """Waits until somebody is."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, f"nobody listens at port {port}"
            time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def some_pages(seed: int, count: int) -> List[int]:
    return random.Random(seed).sample(range(int(USUAL["pages"])), count)
