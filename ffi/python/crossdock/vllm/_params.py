"""`kv_transfer_params`: what the prefill side tells the decode side, by way of the router. It comes from outside, and
is checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Mapping

from .._host import is_address
from ._settings import Form

# Some routers take every number of JSON for a float.
MAX_ROOM = 2**53 - 1
_MAX_RANKS = 1024
_MAX_FACTS = 32


@dataclass(frozen=True)
class RemotePrefill:
    """Blocks that a prefill engine serves."""

    engine_id: str
    request_id: str
    room: int
    addresses: List[str]
    """Of the engine's nodes, by rank."""
    decode_tp: int
    """How many ranks of the decode side may fetch them."""
    tokens: int
    """The prompt's."""
    blocks: int
    form: Form

    def to_params(self) -> Dict[str, Any]:
        """With the names that routers know from vLLM's other connectors. Everything in it can be JSON."""
        host, _, port = self.addresses[0].rpartition(":")
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_id,
            "remote_request_id": self.request_id,
            "remote_host": host.strip("[]"),
            "remote_port": int(port),
            "tp_size": len(self.addresses),
            "crossdock": {
                "room": self.room,
                "addresses": list(self.addresses),
                "decode_tp": self.decode_tp,
                "tokens": self.tokens,
                "blocks": self.blocks,
                "form": dict(self.form),
            },
        }

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> RemotePrefill:
        """Raises ValueError, which says what is wrong."""
        told = params.get("crossdock")
        if not isinstance(told, Mapping):
            raise ValueError("they are not of a crossdock connector")
        addresses = told.get("addresses")
        if not isinstance(addresses, (list, tuple)) or not 0 < len(addresses) <= _MAX_RANKS:
            raise ValueError("there are no addresses, or too many")
        for address in addresses:
            if not isinstance(address, str) or not is_address(address):
                raise ValueError(f"{address!r} is no address")
        return cls(
            engine_id=str(params.get("remote_engine_id", "")),
            request_id=str(params.get("remote_request_id", "")),
            room=_number(told, "room", MAX_ROOM),
            addresses=list(addresses),
            decode_tp=_number(told, "decode_tp", _MAX_RANKS),
            tokens=_number(told, "tokens", 2**31 - 1),
            blocks=_number(told, "blocks", 2**31 - 1),
            form=_form(told.get("form")),
        )


def _number(told: Mapping[str, Any], name: str, most: int) -> int:
    value = told.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ValueError(f"{name} is {value!r}")
    return value


def _form(told: Any) -> Form:
    if not isinstance(told, Mapping) or len(told) > _MAX_FACTS:
        raise ValueError("the form of the cache is not told")
    for name, value in told.items():
        if not isinstance(name, str) or not isinstance(value, (str, int)):
            raise ValueError(f"{name!r} of the cache is {value!r}")
    return dict(told)
