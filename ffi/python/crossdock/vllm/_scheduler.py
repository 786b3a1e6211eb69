"""The scheduler's side: which requests are served and fetched. It moves nothing and waits for nothing."""

from __future__ import annotations

import logging
import secrets
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ._params import MAX_ROOM, RemotePrefill
from ._settings import Form, Settings

_log = logging.getLogger("crossdock.vllm")

# Rooms of which it is remembered that they were fetched: those of a lease's time, at some hundred requests a second.
_MOST_ROOMS = 1 << 16

# A request that ended otherwise has no blocks to hand over.
_WHOLE = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


class Serve(NamedTuple):
    """Blocks for a decode engine to fetch."""

    room: int
    blocks: List[int]


class Fetch(NamedTuple):
    """Blocks to fetch into."""

    remote: RemotePrefill
    blocks: List[int]
    """None at all only tells the prefill engine that nobody will fetch them."""
    skipped: int
    """How many of the first blocks are here already."""
    refusal: Optional[str] = None
    """Why they cannot be fetched: then they are reported as not loaded, and vLLM does with the request what
    `kv_load_failure_policy` says."""


class _Match(NamedTuple):
    """What was promised to vLLM."""

    remote: RemotePrefill
    computed: int
    """Tokens that are here already."""
    refusal: Optional[str]


class Scheduling:
    """Called by vLLM's scheduler, in its thread alone."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Of all ranks' nodes; none until the workers have told them.
        self._addresses: List[str] = []
        self._form: Form = {}
        self._serves: Dict[str, Serve] = {}
        self._fetches: Dict[str, Fetch] = {}
        # Until blocks are there for them.
        self._matched: Dict[str, _Match] = {}
        # Which request a room is for, oldest room first; `None` once it has been fetched or given up.
        self._rooms: Dict[int, Optional[str]] = {}

    def set_workers(self, addresses: Sequence[str], cache: str) -> None:
        """The addresses of all ranks' nodes, and what they tell of their tensors."""
        self._addresses, self._form = list(addresses), self._settings.form(cache)

    def matched(self, request: Any, computed: int) -> Tuple[int, bool]:
        """How many tokens more than those computed here are fetched, and whether any are. vLLM may ask again for the
        same request."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return 0, False
        try:
            remote = RemotePrefill.of(params)
            if remote.tokens != request.num_prompt_tokens:
                raise ValueError(f"they are for {remote.tokens} tokens, and the prompt has {request.num_prompt_tokens}")
        except ValueError as error:
            _log.error("request %s is prefilled here: its kv_transfer_params do not fit: %s", request.request_id, error)
            params["do_remote_prefill"] = False
            return 0, False
        if not self._claim(remote.room, request.request_id):
            why = "another request has fetched or will fetch what its kv_transfer_params name"
            _log.warning("request %s is prefilled here: %s", request.request_id, why)
            params["do_remote_prefill"] = False
            return 0, False
        self._matched[request.request_id] = _Match(remote, computed, self._misfit(remote))
        count = remote.tokens - computed
        return (count, True) if count > 0 else (0, False)

    def _claim(self, room: int, request: str) -> bool:
        """Whether the room is this request's: the first one's that asks for it, until it is fetched or given up."""
        if self._rooms.setdefault(room, request) != request:
            return False
        while len(self._rooms) > _MOST_ROOMS:
            del self._rooms[next(iter(self._rooms))]
        return True

    def _misfit(self, remote: RemotePrefill) -> Optional[str]:
        """Why it cannot be fetched; `None` if it can be."""
        if not self._addresses:
            return "the workers of this side have not told their addresses"
        settings, tp = self._settings, len(remote.addresses)
        if remote.decode_tp != settings.tp:
            return f"the prefill side serves {remote.decode_tp} ranks (its decode_tp), and this side has {settings.tp}"
        for name, mine in self._form.items():
            theirs = remote.form.get(name)
            if theirs != mine:
                return f"{name} is {theirs!r} on the prefill side, and {mine!r} here"
        if tp != settings.tp and not settings.is_mla and (not settings.splits_heads or settings.kv_heads % tp):
            return f"the prefill side has {tp} ranks, and this side {settings.tp}: set heterogeneous_tp on both sides"
        if remote.blocks != self._blocks_of(remote.tokens):
            return f"{remote.tokens} tokens come in {remote.blocks} blocks of {settings.block_tokens}"
        return None

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._settings.block_tokens)

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        """Blocks are there, for `external` tokens that are fetched."""
        match = self._matched.pop(request.request_id, None)
        if match is None:
            return
        remote, computed, refusal = match
        # Once for each request: after a preemption it is computed here.
        request.kv_transfer_params["do_remote_prefill"] = False
        self._rooms[remote.room] = None
        if not external:
            # Everything is here already, or will be computed here.
            if refusal is None:
                self._fetches[request.request_id] = release_of(remote)
            return
        if external != remote.tokens - computed and refusal is None:
            # As vLLM caps it for outputs that it keeps beside the cache. A room has all of a request to its end.
            refusal = f"{external} tokens are to be fetched of {remote.tokens - computed}"
        skipped = computed // self._settings.block_tokens
        last = skipped + self._blocks_of(external)
        ids = list(blocks.get_block_ids()[0][skipped:last])
        self._fetches[request.request_id] = Fetch(remote, ids, skipped, refusal)

    def finished(self, request: Any, block_ids: Sequence[int]) -> Tuple[bool, Optional[Dict[str, Any]]]:
        """Whether the request's blocks are kept until all workers say that they were fetched, and what the router is
        told."""
        params = request.kv_transfer_params
        self._matched.pop(request.request_id, None)
        if not params:
            return False, None
        if params.get("do_remote_prefill"):
            self._give_up(request)
            return False, None
        if not params.get("do_remote_decode") or request.status.name not in _WHOLE:
            return False, None
        tokens = int(request.num_prompt_tokens)
        count = self._blocks_of(tokens)
        if not self._addresses or request.num_computed_tokens < tokens or len(block_ids) < count:
            what = "its prompt is not computed" if self._addresses else "the workers have not told their addresses"
            _log.error("request %s is not handed over: %s", request.request_id, what)
            return False, None
        room = 1 + secrets.randbelow(MAX_ROOM)
        self._serves[request.request_id] = Serve(room, list(block_ids[:count]))
        settings = self._settings
        remote = RemotePrefill(
            engine_id=settings.engine_id,
            request_id=request.request_id,
            room=room,
            addresses=self._addresses,
            decode_tp=settings.decode_tp,
            tokens=tokens,
            blocks=count,
            form=self._form,
        )
        return True, remote.to_params()

    def _give_up(self, request: Any) -> None:
        """It was given up before blocks were there for it. So vLLM also brings requests that it has refused, with a
        prompt that is not theirs."""
        request.kv_transfer_params["do_remote_prefill"] = False
        try:
            remote = RemotePrefill.of(request.kv_transfer_params)
        except ValueError as error:
            _log.warning("request %s: its kv_transfer_params make no sense: %s", request.request_id, error)
            return
        if not self._claim(remote.room, request.request_id):
            # Blocks that another request fetches are not given up.
            return
        self._rooms[remote.room] = None
        if self._misfit(remote) is None:
            self._fetches[request.request_id] = release_of(remote)

    def take(self) -> Tuple[Dict[str, Serve], Dict[str, Fetch]]:
        """What the workers have to begin in this step."""
        taken = self._serves, self._fetches
        self._serves, self._fetches = {}, {}
        return taken


def release_of(remote: RemotePrefill) -> Fetch:
    """Tells the prefill engine that nobody will fetch its blocks."""
    return Fetch(remote, [], remote.blocks)
