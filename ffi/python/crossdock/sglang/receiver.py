"""The decode end of a request."""

from __future__ import annotations

import logging
from typing import Any, Dict, List, Optional

from ..errors import Error
from ..kinds import Outcome
from ..peer import Peer, Source
from ..room import Receiving
from .bootstrap import FIELD
from .cache import Rank, geometry_of, mismatch, rank_of, sources_of
from .hooks import conn
from .manager import CrossdockKVManager
from .messages import RoomAborted, RoomOpened
from .outcomes import Outcomes, failure_of

_log = logging.getLogger("crossdock.sglang")

KVPoll = conn.KVPoll


class CrossdockKVReceiver(conn.CommonKVReceiver):  # type: ignore[misc]
    """Opens a room over the pages that the scheduler has allocated, in one call, and tells the prefill ranks that it
    has."""

    kv_mgr: CrossdockKVManager

    def __init__(self, mgr: Any, bootstrap_addr: str, bootstrap_room: Optional[int] = None) -> None:
        self._room: Optional[Receiving] = None
        self._outcomes = Outcomes()
        self._aux_index: Optional[int] = None
        self.bootstrap_infos: Optional[List[Dict[str, Any]]] = None
        self._is_cleared = False
        # Why it has failed, once it is cleared.
        self._reason: Optional[str] = None
        # Here, where all ranks of the engine come, and not where one of them may have failed.
        self._use_count = mgr.next_use(bootstrap_room)
        super().__init__(mgr, bootstrap_addr, bootstrap_room)

    def _register_kv_args(self) -> bool:
        """Nothing is registered with the prefill ranks: whether they keep what this one needs is asked here."""
        try:
            for info in self.bootstrap_infos or ():
                self._meet(info)
        except (Error, ArithmeticError, ValueError) as error:
            self._fail(str(error))
            return False
        except (KeyError, TypeError) as error:
            self._fail(f"what a prefill rank tells of itself makes no sense: {error!r}")
            return False
        return True

    def _meet(self, info: Dict[str, Any]) -> None:
        where = f"prefill rank {info['rank_ip']}:{info['rank_port']}"
        if not isinstance(info["rank_ip"], str) or type(info["rank_port"]) is not int:
            raise ValueError(f"{where} has no address")
        told = info.get(FIELD)
        if not isinstance(told, dict) or told.get("version") != 1:
            raise ValueError(f"{where} tells nothing of crossdock: it runs another backend, or another version of it")
        mgr, here = self.kv_mgr, self.kv_mgr.cache
        there, rank, address = geometry_of(told.get("geometry")), rank_of(told.get("rank")), told.get("address")
        if not isinstance(address, str):
            raise ValueError(f"{where} tells the address {repr(address)[:80]}")
        why = mismatch(here.geometry, mgr.rank, there, rank)
        if why is not None:
            raise ValueError(f"{where}: {why}")
        mgr.worker.open(there.heads, there.token_head_bytes, there.first_layer if mgr.rank.pp > 1 else 0)
        self._peer(rank, address)

    def _peer(self, rank: Rank, address: str) -> Peer:
        return self.kv_mgr.worker.peer((self.bootstrap_addr, self.prefill_dp_rank, rank.number), address)

    def send_metadata(
        self,
        kv_indices: Any,
        aux_index: Optional[int] = None,
        state_indices: Optional[List[Any]] = None,
        decode_prefix_len: Optional[int] = None,
        destination: Any = conn.KVTransferDestination.DEVICE,
        device_kv_indices: Optional[Any] = None,
    ) -> None:
        if self.conclude_state is not None:
            return
        if self.bootstrap_infos is None:
            return self._fail(f"the prefill ranks of {self.bootstrap_addr} are not known")
        if destination != conn.KVTransferDestination.DEVICE or device_kv_indices is not None:
            raise NotImplementedError("crossdock.sglang writes the pages of the KV pool, and no host pool's")
        mgr = self.kv_mgr
        try:
            sources = self._sources()
            given = state_indices or [None] * len(mgr.cache.geometry.states)
            more_pages = [mgr.cache.entries(nth, rows) for nth, rows in enumerate(given)]
            self._room = mgr.worker.node.receive(
                sources,
                self.bootstrap_room,
                len(kv_indices) * mgr.kv_args.page_size,
                kv_indices,
                more_pages=more_pages,
                use_count=self._use_count,
                deadline=mgr.transfer_deadline,
            )
        except (Error, ArithmeticError, TypeError, ValueError) as error:
            return self._fail(str(error))
        self._aux_index = aux_index
        bringing = {source.rank for source in sources}
        for info in self.bootstrap_infos:
            opened = RoomOpened(
                room=self.bootstrap_room,
                use_count=self._use_count,
                endpoint=mgr.local_ip,
                dst_port=mgr.rank_port,
                rank=mgr.rank.number,
                is_dummy=rank_of(info[FIELD]["rank"]).number not in bringing,
                required_dst_info_num=self.required_dst_info_num,
                pages=len(kv_indices),
                decode_prefix_len=decode_prefix_len or 0,
            )
            if not self._send_bootstrap_message(
                bootstrap_info=info, message=opened.to_zmq(), operation="send_metadata"
            ):
                # Those that were told before need not wait.
                self.ensure_abort_notified()
                self.invalidate_cached_bootstrap_infos()
                return self._cancel()
        self.init_time = conn.time.time()

    def _sources(self) -> List[Source]:
        """Of the prefill ranks that SGLang pairs this one with, those that bring something."""
        mgr = self.kv_mgr
        told = {rank_of(info[FIELD]["rank"]).number: info[FIELD] for info in self.bootstrap_infos or ()}
        ranks = [rank_of(one["rank"]) for one in told.values()]
        stages = {rank.pp_rank: told[rank.number]["geometry"]["layers"] for rank in ranks}
        layers = [stages[stage] for stage in sorted(stages)]
        heads = next(iter(told.values()))["geometry"]["heads"]
        found = sources_of(ranks, layers, heads, mgr.rank, self.bootstrap_room)
        if not {rank for rank, _ in found} <= told.keys():
            raise ValueError(f"ranks {[rank for rank, _ in found]} bring it, and SGLang pairs {sorted(told)}")
        return [
            Source(self._peer(rank_of(told[rank]["rank"]), told[rank]["address"]), rank, parts) for rank, parts in found
        ]

    def _poll(self) -> Any:
        if self.conclude_state is None and self._room is not None:
            self._advance(self._room)
        status = super()._poll()
        if status == KVPoll.Failed:
            self._cancel()
            # Other prefill ranks than the one that has said so.
            self.ensure_abort_notified()
        return status

    def _advance(self, room: Receiving) -> None:
        mgr, number = self.kv_mgr, self.bootstrap_room
        if mgr.request_status.get(number) in (None, KVPoll.Success, KVPoll.Failed):
            return
        end = room.poll()
        if end is None:
            if room.arrivals:
                mgr.update_status(number, KVPoll.Transferring)
            return
        try:
            if not end.is_delivered:
                if end.outcome in (Outcome.PEER_LOST, Outcome.EXPIRED):
                    # It may have been started anew, elsewhere.
                    self.invalidate_cached_bootstrap_infos()
                if self._outcomes.is_told(end):
                    self._fail(end.message)
                return
            if not room.is_home:
                return
            if self._aux_index is not None:
                if len(end.aux) != mgr.cache.aux_bytes:
                    return self._fail(
                        f"{len(end.aux)} bytes of metadata came, and {mgr.cache.aux_bytes} are kept here: an optional "
                        "metadata buffer is enabled on one side only"
                    )
                mgr.cache.put_aux(self._aux_index, end.aux)
        except (Error, ValueError) as error:
            return self._fail(str(error))
        mgr.update_status(number, KVPoll.Success)

    def _fail(self, reason: str) -> None:
        """Fails the request, and tells the prefill ranks why."""
        self.kv_mgr.record_failure(self.bootstrap_room, reason)
        self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
        self.conclude_state = KVPoll.Failed
        self._cancel()
        self.ensure_abort_notified()

    def _cancel(self) -> None:
        if self._room is not None and self._room.poll() is None:
            self._room.cancel()

    def _send_abort_notification(self, *, force_arm: bool = False) -> None:
        """Tells the prefill ranks why. What they would acknowledge, that they write no more, the room itself tells."""
        del force_arm
        mgr = self.kv_mgr
        with mgr.failure_lock:
            known = self._reason if self._is_cleared else mgr.failure_records.get(self.bootstrap_room)
        reason = known or "the request has failed on the decode side"
        aborted = RoomAborted(self.bootstrap_room, self._use_count, mgr.local_ip, mgr.rank_port, reason)
        # Another backend's ranks would not understand it.
        for info in [one for one in self.bootstrap_infos or () if isinstance(one.get(FIELD), dict)]:
            try:
                socket, lock = self._connect_to_bootstrap_server(info)
                with lock:
                    socket.send_multipart(aborted.to_zmq())
            except conn.zmq.ZMQError as error:
                # It learns of it by the room, too.
                _log.debug("prefill rank %s:%s was not told: %s", info["rank_ip"], info["rank_port"], error)

    def abort(self) -> None:
        if not self._is_cleared:
            super().abort()
            self._cancel()

    def failure_exception(self) -> None:
        self.conclude_state = KVPoll.Failed
        self.clear()
        raise failure_of(self.bootstrap_room, self._reason)

    def is_abort_release_safe(self) -> bool:
        """Whether nobody can write the request's pages any more."""
        if self._room is not None and not self._room.is_home:
            return False
        return self.kv_mgr.is_abort_release_safe(self.bootstrap_room, 0)

    def _clear(self) -> None:
        """Once: SGLang clears what has failed again when its pages are home, and the number may be another request's
        then."""
        if self._is_cleared:
            return
        room, self._room = self._room, None
        if room is not None:
            if room.poll() is None:
                if self.conclude_state is None:
                    self._fail("the request was given up")
                room.cancel()
            self.kv_mgr.worker.drain(self.bootstrap_room, room)
        with self.kv_mgr.status_lock:
            super()._clear()
        self._is_cleared, self._reason = True, self.kv_mgr.take_failure(self.bootstrap_room)
