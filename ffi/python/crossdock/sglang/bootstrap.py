"""SGLang's bootstrap server, which beside its own answers keeps what crossdock's decode ranks ask for."""

from __future__ import annotations

import json
from typing import Any, Dict, Tuple

from .hooks import conn

# Of a rank's registration, and of the answer about that rank: its node's address and what it keeps of the model.
FIELD = "crossdock"


class CrossdockKVBootstrapServer(conn.CommonKVBootstrapServer):  # type: ignore[misc]
    """Answers SGLang's paths as `CommonKVBootstrapServer` does. `PUT /route` may have a field `crossdock`, which
    `GET /route` for that rank gives back."""

    def __init__(self, host: str, port: int) -> None:
        # By data-parallel, context-parallel, tensor-parallel rank and stage. The loop's thread alone uses it, which
        # begins in the constructor.
        self._told: Dict[Tuple[int, ...], Any] = {}
        super().__init__(host, port)

    async def _handle_route_put(self, request: Any) -> Any:
        response = await super()._handle_route_put(request)
        if response.status == 200:
            data = await request.json()
            of_system = int(data["system_dp_size"]) != 1
            dp_rank = int(data["system_dp_rank" if of_system else "attn_dp_rank"])
            ranks = (dp_rank, int(data["attn_cp_rank"]), int(data["attn_tp_rank"]), int(data["pp_rank"]))
            # A rank that was started anew with another backend tells nothing.
            self._told[ranks] = data.get(FIELD)
        return response

    async def _handle_route_get(self, request: Any) -> Any:
        response = await super()._handle_route_get(request)
        if response.status != 200:
            return response
        names = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
        told = self._told.get(tuple(int(request.query[name]) for name in names))
        if told is None:
            # About the whole engine, or a rank of another backend.
            return response
        return conn.web.json_response({**json.loads(response.text), FIELD: told})
