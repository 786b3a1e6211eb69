"""The prefill end of a request."""

from __future__ import annotations

from typing import Any, List, Optional

from ..errors import Error
from ..kinds import By
from ..room import End, Sending
from .hooks import conn
from .manager import CrossdockKVManager
from .outcomes import Outcomes, failure_of

KVPoll = conn.KVPoll


class CrossdockKVSender(conn.CommonKVSender):  # type: ignore[misc]
    """Page indices are handed to the room chunk by chunk, as they come; the last chunk brings the state and the
    metadata."""

    kv_mgr: CrossdockKVManager
    _early_send_wait_event: Any
    _transfer_start_time: Optional[float]

    def __init__(
        self, mgr: Any, bootstrap_addr: str, bootstrap_room: int, req_has_disagg_prefill_dp_rank: bool = False
    ) -> None:
        self._room: Optional[Sending] = None
        self._outcomes = Outcomes()
        self._is_dummy = False
        self._tokens = 0
        self._sent = 0
        self._is_finished = False
        self._is_cleared = False
        # Why it has failed, once it is cleared.
        self._reason: Optional[str] = None
        mgr.begin(bootstrap_room)
        super().__init__(mgr, bootstrap_addr, bootstrap_room, req_has_disagg_prefill_dp_rank)
        reason = mgr.claim(bootstrap_room)
        if reason is not None:
            mgr.record_failure(bootstrap_room, reason)
            mgr.update_status(bootstrap_room, KVPoll.Failed)

    def init(self, num_kv_indices: int, aux_index: Optional[int] = None) -> None:
        super().init(num_kv_indices, aux_index)
        if self._is_cleared or self.kv_mgr.request_status.get(self.bootstrap_room) in (None, KVPoll.Failed):
            return
        infos = self.kv_mgr.take_opened(self.bootstrap_room)
        real = [info for info in infos if not info.is_dummy]
        self._is_dummy = not real
        if self._is_dummy:
            return
        pages = {info.pages for info in real}
        # As SGLang's other backends: pages that the decode side has no place for are not sent.
        if len(pages) != 1 or num_kv_indices < min(pages):
            return self._fail(f"the decode side expects {sorted(pages)} pages, and {num_kv_indices} are sent")
        self._tokens = pages.pop() * self.kv_mgr.kv_args.page_size
        try:
            self._room = self.kv_mgr.worker.node.send_ahead(
                self.bootstrap_room,
                self._tokens,
                ranks=sorted(info.rank for info in real),
                use_count=real[0].use_count,
                deadline=self.kv_mgr.transfer_deadline,
            )
        except (Error, OverflowError, ValueError) as error:
            self._fail(str(error))

    def send(
        self,
        kv_indices: Any,
        state_indices: Optional[List[Any]] = None,
        num_kv_tokens: Optional[int] = None,
        indices_event: Optional[Any] = None,
    ) -> None:
        del num_kv_tokens
        mgr = self.kv_mgr
        if self.conclude_state is not None or mgr.request_status.get(self.bootstrap_room) in (None, KVPoll.Failed):
            return
        count = len(kv_indices)
        self.curr_idx += count
        is_last = self.curr_idx >= self.num_kv_indices
        if self._is_dummy:
            if is_last:
                mgr.update_status(self.bootstrap_room, KVPoll.Success)
            return
        if self._room is None or self._is_finished:
            return
        for event in (self._early_send_wait_event, indices_event):
            if event is not None:
                event.synchronize()
        self._early_send_wait_event = None
        if self._transfer_start_time is None:
            self._transfer_start_time = conn.time.perf_counter()
        page_size = mgr.kv_args.page_size
        wanted = min(count, (self._tokens - self._sent) // page_size)
        try:
            if wanted:
                self._room.add_pages(kv_indices if wanted == count else kv_indices[:wanted])
                tokens = range(self._sent, self._sent + wanted * page_size)
                self._room.send(mgr.worker.layers, tokens)
                self._sent = tokens.stop
            if is_last:
                self._finish(state_indices)
        except (Error, OverflowError, TypeError, ValueError) as error:
            end = self._room.poll()
            # If the other side has ended the room, why is told to the next poll.
            if end is None or end.by != By.PEER:
                self._fail(str(error) if end is None else end.message)
            return
        mgr.update_status(self.bootstrap_room, KVPoll.Transferring)
        self._record_transfer_indices(kv_indices[:wanted], state_indices if is_last else None)

    def _finish(self, state_indices: Optional[List[Any]]) -> None:
        assert self._room is not None
        for nth, rows in enumerate(state_indices or ()):
            entries = self.kv_mgr.cache.entries(nth, rows)
            if len(entries):
                self._room.add_pages(entries, pool=nth + 1)
        aux = b"" if self.aux_index is None else self.kv_mgr.cache.aux(self.aux_index)
        self._room.finish(aux)
        self._is_finished = True

    def _poll_with_status(self, check_status: Any) -> Any:
        if self.conclude_state is None and self._room is not None:
            self._advance(self._room)
        return super()._poll_with_status(check_status)

    def _advance(self, room: Sending) -> None:
        status = self.kv_mgr.request_status.get(self.bootstrap_room)
        if status in (None, KVPoll.Success):
            return
        if status == KVPoll.Failed:
            # The decode side has said so.
            return self._cancel()
        end: Optional[End] = room.poll()
        if end is None:
            return
        if end.is_delivered:
            self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Success)
        elif self._outcomes.is_told(end):
            self._fail(end.message)

    def _fail(self, reason: str) -> None:
        """Fails the request, and tells the decode ranks why."""
        self.kv_mgr.conclude_failure(bootstrap_room=self.bootstrap_room, failure_reason=reason)
        self._cancel()

    def _cancel(self) -> None:
        if self._room is not None and self._room.poll() is None:
            self._room.cancel()

    def abort(self) -> None:
        """Also clears: SGLang does so after some of its aborts alone."""
        if self._is_cleared:
            return
        if self.conclude_state is None and self.kv_mgr.request_status.get(self.bootstrap_room) != KVPoll.Success:
            self._fail("Aborted by AbortReq.")
        super().abort()
        self.clear()

    def failure_exception(self) -> None:
        self.conclude_state = KVPoll.Failed
        self.clear()
        self.trace_ctx.trace_req_finish()
        raise failure_of(self.bootstrap_room, self._reason)

    def clear(self) -> None:
        """Once: the number may be another request's when it is called again."""
        if self._is_cleared:
            return
        self._is_cleared = True
        room, self._room = self._room, None
        if room is not None:
            if room.poll() is None and self.conclude_state is None:
                # Before it has ended: why, another rank knows.
                self.kv_mgr.conclude_failure(
                    bootstrap_room=self.bootstrap_room, failure_reason="the request was given up"
                )
            # One that has not ended is cancelled.
            room.close()
        self.kv_mgr.ended(self.bootstrap_room)
        with self.kv_mgr.status_lock:
            super().clear()
        if self.conclude_state is None:
            self.conclude_state = KVPoll.Failed
        self._reason = self.kv_mgr.take_failure(self.bootstrap_room)
