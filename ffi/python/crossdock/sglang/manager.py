"""One manager for each rank: its cache, its node, and what the other side tells it."""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections import OrderedDict
from typing import Any, Callable, Dict, FrozenSet, List, NamedTuple, Optional, Set, Tuple, Union

from ..errors import Unsupported
from .bootstrap import FIELD
from .cache import Cache, Rank
from .hooks import conn, environ, runtime_context, utils
from .messages import RoomAborted, RoomFailed, RoomOpened, message_of
from .worker import Worker

_log = logging.getLogger("crossdock.sglang")

# How long it is known that a room is over, so that what comes late does not open it anew; and that one was aborted whose
# request has not come, which may be another one that has its number.
_OVER_SECONDS = 30.0
_MOST_OVER = 65536
# How many rooms decode ranks may open whose requests the prefill side has not got yet.
MOST_UNCLAIMED = 16384
# How many numbers of rooms the decode side counts the uses of.
_MOST_COUNTED = 65536
# A shorter time than this for the release of pages is refused, in seconds.
_LONG = 86400.0
_USED = "another request uses the number of this one"


class _Over(NamedTuple):
    """A room that is over on the prefill side."""

    use_count: Optional[int]
    """`None` if no decode rank had opened it."""
    senders: FrozenSet[str]
    """The decode ranks that had."""
    is_expecting: bool
    """Whether there are others, which had not yet."""
    reason: Optional[str]
    """Why it had failed."""
    until: float
    is_begun_anew: bool

    def is_meant(self, message: Union[RoomOpened, RoomAborted]) -> bool:
        """Whether a message that comes now is about the room that is over."""
        if time.monotonic() >= self.until:
            return False
        if self.use_count is not None and message.sender in self.senders:
            return message.use_count <= self.use_count
        # Another engine counts for itself.
        is_alike = self.use_count is None or message.use_count == self.use_count
        return is_alike and self.is_expecting and not self.is_begun_anew


class _Aborted(NamedTuple):
    """A room that a decode rank has aborted before its request has come to the prefill side."""

    message: RoomAborted
    until: float

    def is_meant(self, opened: RoomOpened) -> bool:
        """Whether a decode rank that opens the room now has the same request."""
        known = self.message
        is_late = opened.sender == known.sender and opened.use_count < known.use_count
        return self.is_fresh() and (is_late or opened.use_count == known.use_count)

    def is_fresh(self) -> bool:
        return time.monotonic() < self.until


class CrossdockKVManager(conn.CommonKVManager):  # type: ignore[misc]
    """SGLang's bookkeeping of requests, over a crossdock node. Raises `Unsupported` by name where the cache or the
    engine's parallelism is of a form that is not supported."""

    reports_transfer_latency = True
    # By proof: a page of an aborted room is free when no peer can write it any more.
    supports_deferred_decode_kv_release = True

    def __init__(
        self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: Optional[bool] = False
    ) -> None:
        parallel = runtime_context.get_parallel()
        is_prefill = disaggregation_mode == utils.DisaggregationMode.PREFILL
        _refuse_unsupported(parallel, is_prefill)
        rank = Rank(parallel.attn_tp_size, parallel.attn_tp_rank, parallel.pp_size, args.pp_rank)
        name = f"sglang-{disaggregation_mode.value}-{parallel.attn_dp_rank}-{rank.number}"
        # Before SGLang's own: a prefill rank registers there, and tells its node's address.
        self.cache = Cache(args, rank, bool(is_mla_backend), _page_order())
        self.worker = Worker(name, self.cache, conn.get_local_ip_auto(), _devices(args))
        self.rank = rank
        self.transfer_deadline = float(environ.envs.SGLANG_DISAGGREGATION_WAITING_TIMEOUT.get())
        self._rooms_lock = threading.Lock()
        # Of the statuses, which SGLang reads and then writes, in the scheduler's thread and in those of this manager.
        # It is taken after the lock of the rooms.
        self.status_lock = threading.RLock()
        # Of the prefill side: rooms that have a sender, and whose sender has begun with the ranks that had opened it;
        # that have none yet, with who has aborted them, if one has; and that are over.
        self._begun: Set[int] = set()
        self._taken: Set[int] = set()
        self._unclaimed: OrderedDict[int, Optional[_Aborted]] = OrderedDict()
        self._over: OrderedDict[int, _Over] = OrderedDict()
        # Of the decode side: the uses of each number, and how often in succession a prefill server has not said which
        # ranks it has.
        self._uses: OrderedDict[int, int] = OrderedDict()
        self._misses: Dict[str, int] = {}
        if is_prefill:
            geometry = self.cache.geometry
            self.worker.open(geometry.heads, geometry.token_head_bytes, geometry.first_layer)
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        handlers: Dict[type, Callable[[Any], None]] = (
            {RoomOpened: self._decode_has_opened, RoomAborted: self._decode_has_aborted}
            if is_prefill
            else {RoomFailed: self._prefill_has_failed}
        )
        threading.Thread(
            target=self._listen, args=(self._make_worker_recv(self.server_socket), handlers), daemon=True
        ).start()
        if not is_prefill:
            self.enable_staging = False
            self._start_heartbeat_checker_thread()

    def _register_topology_row(self, url: str, payload: Dict[str, Any]) -> None:
        told = {
            "version": 1,
            "address": self.worker.node.address,
            "rank": vars(self.rank),
            "geometry": self.cache.geometry.told(),
        }
        super()._register_topology_row(url, {**payload, FIELD: told})

    def _listen(self, recv: Callable[[], Optional[List[bytes]]], handlers: Dict[type, Callable[[Any], None]]) -> None:
        while True:
            try:
                frames = recv()
            except conn.zmq.ZMQError as error:
                _log.error("no messages of the other side are heard any more: %s", error)
                return
            if not frames:
                continue
            try:
                message = message_of(frames)
                handler = handlers.get(type(message))
                if handler is None:
                    raise ValueError(f"{frames[0][:32]!r} is not for this side, or of another backend")
                handler(message)
            except Exception as error:
                # One message that makes no sense costs one request, and not all.
                _log.warning("a message was dropped: %s", error)

    def update_status(self, bootstrap_room: int, status: Any) -> None:
        with self.status_lock:
            super().update_status(bootstrap_room, status)

    def take_failure(self, room: int) -> Optional[str]:
        """Why a request that is cleared has failed: another one that has its number must not find it."""
        with self.failure_lock:
            reason: Optional[str] = self.failure_records.pop(room, None)
        return reason

    # The prefill side.

    def _decode_has_opened(self, opened: RoomOpened) -> None:
        room = opened.room
        with self._rooms_lock:
            reason = self._why_refused(opened)
            if reason is not None:
                refused = [opened]
            else:
                reason, refused = _USED, self._keep_opened(opened)
        for one in refused:
            if not one.is_dummy:
                self._tell(room, one.use_count, [(one.endpoint, one.dst_port)], reason)

    def _why_refused(self, opened: RoomOpened) -> Optional[str]:
        over, aborted = self._over.get(opened.room), self._unclaimed.get(opened.room)
        if over is not None and over.is_meant(opened):
            return over.reason or "the request was over already"
        if aborted is not None and aborted.is_meant(opened):
            return f"another rank of the decode side: {aborted.message.reason}"
        if self.request_status.get(opened.room) == conn.KVPoll.Failed:
            with self.failure_lock:
                return str(self.failure_records.get(opened.room, "the request has failed"))
        infos = self.transfer_infos.get(opened.room, {})
        before = infos.get(opened.sender)
        if before is not None and before.use_count > opened.use_count:
            return "the number was used again"
        return _USED if opened.room in self._taken and not _is_one_request(opened, infos) else None

    def _keep_opened(self, opened: RoomOpened) -> List[RoomOpened]:
        """Keeps who has opened a room; tells who had opened it for another request."""
        room, dropped = opened.room, []
        infos = self.transfer_infos.get(room, {})
        if not _is_one_request(opened, infos):
            # Of an earlier use of the number, or of another engine, which may be gone: nobody has begun with it.
            dropped = [info for info in infos.values() if info.sender != opened.sender]
            infos = {}
            with self.status_lock:
                if self.request_status.get(room) == conn.KVPoll.WaitingForInput:
                    self.request_status[room] = conn.KVPoll.Bootstrapping
        infos[opened.sender] = opened
        self.transfer_infos[room] = infos
        if room not in self._begun:
            self._keep_unclaimed(room, None)
        if len(infos) == opened.required_dst_info_num:
            self.resolve_kv_replica_factor(infos)
            self.req_to_decode_prefix_len[room] = max(info.decode_prefix_len for info in infos.values())
            self.update_status(room, conn.KVPoll.WaitingForInput)
        return dropped

    def _keep_unclaimed(self, room: int, aborted: Optional[_Aborted]) -> None:
        self._unclaimed[room] = aborted
        if len(self._unclaimed) > MOST_UNCLAIMED:
            oldest, _ = self._unclaimed.popitem(last=False)
            _log.warning("room %d was dropped: %d requests have not come to the prefill side", oldest, MOST_UNCLAIMED)
            self._drop(oldest)

    def _drop(self, room: int) -> None:
        """What SGLang keeps of a room that has no sender."""
        with self.status_lock:
            for table in (self.transfer_infos, self.request_status, self.req_to_decode_prefix_len):
                table.pop(room, None)

    def _decode_has_aborted(self, aborted: RoomAborted) -> None:
        room = aborted.room
        with self._rooms_lock:
            over, status = self._over.get(room), self.request_status.get(room)
            if over is not None and over.is_meant(aborted):
                return
            infos = self.transfer_infos.get(room, {})
            before = infos.get(aborted.sender)
            if before is not None:
                is_late = before.use_count > aborted.use_count
            else:
                # Of a rank that has not opened it: those of its engine that have count alike.
                is_late = any(info.use_count != aborted.use_count for info in infos.values())
            if is_late:
                return
            # Other ranks of the decode side that wait for it.
            others = [one for one in self._room_notify_targets(room) if one != (aborted.endpoint, aborted.dst_port)]
            if room not in self._begun or status is None:
                self._drop(room)
                self._keep_unclaimed(room, _Aborted(aborted, time.monotonic() + _OVER_SECONDS))
            elif status in (conn.KVPoll.Success, conn.KVPoll.Failed):
                return
            else:
                self.record_failure(room, f"the decode side: {aborted.reason}")
                self.update_status(room, conn.KVPoll.Failed)
        self._tell(room, aborted.use_count, others, f"another rank of the decode side: {aborted.reason}")

    def begin(self, room: int) -> None:
        """A sender is made: decode ranks that were not heard of before mean this one."""
        with self._rooms_lock:
            self._begun.add(room)
            over = self._over.get(room)
            if over is not None:
                self._over[room] = over._replace(is_begun_anew=True)

    def claim(self, room: int) -> Optional[str]:
        """A sender was made. Why the decode side had aborted the room before, if it had."""
        with self._rooms_lock:
            aborted = self._unclaimed.pop(room, None)
        return f"the decode side: {aborted.message.reason}" if aborted is not None and aborted.is_fresh() else None

    def take_opened(self, room: int) -> List[RoomOpened]:
        """Which decode ranks have opened the room of a sender that begins now: it stays with these."""
        with self._rooms_lock:
            self._taken.add(room)
            return list(self.transfer_infos.get(room, {}).values())

    def ended(self, room: int) -> None:
        """A sender is cleared. What comes late for it must not open the room anew."""
        now = time.monotonic()
        with self._rooms_lock:
            if room not in self._begun:
                return
            self._begun.discard(room)
            self._taken.discard(room)
            infos = self.transfer_infos.get(room, {})
            use_count = max((info.use_count for info in infos.values()), default=None)
            is_expecting = not infos or any(info.required_dst_info_num > len(infos) for info in infos.values())
            with self.failure_lock:
                reason = self.failure_records.get(room)
            self._over[room] = _Over(use_count, frozenset(infos), is_expecting, reason, now + _OVER_SECONDS, False)
            self._over.move_to_end(room)
            while len(self._over) > _MOST_OVER or next(iter(self._over.values())).until < now:
                self._over.popitem(last=False)

    def send_kv_status_message(
        self,
        *,
        targets: List[Tuple[str, int]],
        bootstrap_room: int,
        status: Any,
        failure_reason: Optional[str] = None,
    ) -> None:
        """Why a request has failed. Whether it was delivered the rooms tell themselves."""
        if status == conn.KVPoll.Failed:
            infos = list(self.transfer_infos.get(bootstrap_room, {}).values())
            use_count = max((info.use_count for info in infos), default=0)
            self._tell(bootstrap_room, use_count, targets, failure_reason or "the request has failed")

    def _tell(self, room: int, use_count: int, targets: List[Tuple[str, int]], reason: Optional[str]) -> None:
        failed = RoomFailed(room, use_count, self._prefill_unique_rank(), reason or "")
        for endpoint, port in targets:
            try:
                address = conn.NetworkAddress(endpoint, port)
                self._send_multipart_locked(address.to_tcp(), failed.to_zmq(), is_ipv6=address.is_ipv6)
            except Exception as error:
                # It learns of it by the room, too.
                _log.warning("decode rank %s:%d was not told of room %d: %s", endpoint, port, room, error)

    # The decode side.

    def _prefill_has_failed(self, failed: RoomFailed) -> None:
        with self._rooms_lock:
            is_late = self._uses.get(failed.room) != failed.use_count
        # The first reason stays.
        with self.status_lock:
            if not is_late and self.request_status.get(failed.room) != conn.KVPoll.Failed:
                self.apply_prefill_status(
                    bootstrap_room=failed.room,
                    status=conn.KVPoll.Failed,
                    prefill_rank=failed.rank,
                    failure_reason=f"the prefill side: {failed.reason}",
                )

    def next_use(self, room: int) -> int:
        """How often the number was used before. All ranks of a decode engine get the same requests, and count alike."""
        with self._rooms_lock:
            count = self._uses.pop(room, -1) + 1
            self._uses[room] = count
            while len(self._uses) > _MOST_COUNTED:
                self._uses.popitem(last=False)
            return count

    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:
        """Whether nobody can write the pages of a cleared room any more: known, and not concluded from messages."""
        del required_acks
        return self.worker.is_home(bootstrap_room)

    def _on_heartbeat_success(self, bootstrap_addr: str) -> None:
        """The server answers: whether for the same ranks. One that was started anew between two heartbeats would not be
        missed, and its old address be dialed for as long as a request may take. One that does not say is a heartbeat
        that is missed."""
        try:
            is_same = self._has_same_ranks(bootstrap_addr)
        except Exception:
            # SGLang counts from 0 after each answer to its own question.
            misses = self._misses[bootstrap_addr] = self._misses.get(bootstrap_addr, 0) + 1
            if misses < self.max_failures:
                raise
            is_same = False
        self._misses.pop(bootstrap_addr, None)
        if not is_same:
            self._handle_node_failure(bootstrap_addr)

    def _has_same_ranks(self, bootstrap_addr: str) -> bool:
        with self.connection_lock:
            known = {key: list(infos) for key, infos in self.connection_pool.items()}
        for key, infos in known.items():
            # As SGLang makes it.
            address, dp_rank, cp_rank, _ = key.rsplit("_", 3)
            for info in infos if address == bootstrap_addr else ():
                rank = info[FIELD]["rank"]
                query = {"prefill_dp_rank": dp_rank, "prefill_cp_rank": cp_rank}
                query.update(target_tp_rank=rank["tp_rank"], target_pp_rank=rank["pp_rank"])
                answer = conn.requests.get(f"http://{bootstrap_addr}/route", params=query, timeout=(2, 3))
                if answer.status_code != 200:
                    raise ConnectionError(f"{bootstrap_addr} answers {answer.status_code} for {query}")
                if answer.json().get(FIELD) != info[FIELD]:
                    return False
        return True

    def _handle_node_failure(self, failed_bootstrap_addr: str) -> None:
        super()._handle_node_failure(failed_bootstrap_addr)
        self.worker.forget(failed_bootstrap_addr)

    def close(self) -> None:
        """Not one of SGLang's calls: says goodbye to all peers. Its threads end with the process."""
        self.worker.close()


def _devices(args: Any) -> Optional[str]:
    """The RDMA devices that SGLang chose for this rank."""
    if not getattr(args, "ib_device", None):
        return None
    engine = importlib.import_module("sglang.srt.distributed.device_communicators.mooncake_transfer_engine")
    found: Optional[str] = engine.get_ib_devices_for_gpu(args.ib_device, args.gpu_id)
    return found and found.replace(" ", "")


def _page_order() -> str:
    """The order within a page of keys or values, as SGLang's pools choose it."""
    if environ.envs.SGLANG_USE_HND_KVCACHE.get():
        return "hnd"
    return str(environ.envs.SGLANG_AITER_KV_CACHE_LAYOUT.get()).lower()


def _refuse_unsupported(parallel: Any, is_prefill: bool) -> None:
    envs = environ.envs
    refused = {
        "context parallelism (attn_cp_size)": parallel.attn_cp_size > 1,
        "decode context parallelism (dcp_size)": parallel.attn_dcp_size > 1,
        "--enable-kv-cache-sharding": parallel.enable_kv_cache_sharding,
        "DSA cache layer split": parallel.enable_dsa_cache_layer_split,
        "CP-TP group sharing": parallel.enable_cp_tp_group_sharing,
        "--disaggregation-decode-allocation-policy prefill_complete": (
            runtime_context.get_disagg().disaggregation_decode_allocation_policy != "early"
        ),
        "SGLANG_DISAGG_STAGING_BUFFER": envs.SGLANG_DISAGG_STAGING_BUFFER.get(),
        "SGLANG_RUST_SERVER, whose registry keeps nothing of crossdock": is_prefill and envs.SGLANG_RUST_SERVER.get(),
        "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE=0, which hands pages out that a peer can write": (
            not is_prefill and not envs.SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE.get()
        ),
    }
    for what, is_set in refused.items():
        if is_set:
            raise Unsupported(f"crossdock.sglang does not support {what}", "turn it off, or take another backend", 9)
    seconds = envs.SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT.get()
    if not is_prefill and not seconds >= _LONG:
        raise Unsupported(
            f"SGLang would hand the pages of a failed request out after {seconds} seconds, also where a peer that stands "
            "still can write them",
            "set SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT=1000000000, as python -m crossdock.sglang does",
            9,
        )


def _is_one_request(opened: RoomOpened, infos: Dict[str, RoomOpened]) -> bool:
    """Whether a rank opens a room for the request that others have opened it for. An engine that did and is gone may
    have left them."""
    is_full = opened.sender not in infos and len(infos) >= opened.required_dst_info_num
    return not is_full and all(opened.is_with(info) for info in infos.values())
