"""The registry, which tells where the peers are: crossdock's own server, or etcd."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, Optional, Union
from urllib.parse import urlencode

from ._abi import check, check_closed, ffi, forked, lib, milliseconds, process, text_bytes, text_or_null, told_text

# So that a list is seldom asked for twice.
_USUAL_CAPACITY = 1 << 16


class _Held:
    """Something with a handle that is closed."""

    __slots__ = ("_handle", "_pid", "_is_closed", "__weakref__")

    _close: Any

    def _begin(self, handle: int) -> None:
        self._handle = handle
        self._pid = process.pid
        self._is_closed = False

    def _here(self) -> None:
        if self._pid != process.pid:
            raise forked(self)

    def _shut(self) -> None:
        if not self._is_closed:
            self._here()
            self._is_closed = True
            check_closed(self._close(self._handle))

    def __exit__(self, *_: object) -> None:
        self._shut()

    def __del__(self) -> None:
        # Not where its making has failed.
        if not getattr(self, "_is_closed", True) and self._pid == process.pid:
            self._close(self._handle)


class Registry(_Held):
    """A registry's server in this process, at `address`."""

    __slots__ = ("address",)

    _close = staticmethod(lib.crossdock_registry_close)

    def __init__(self, bind: str = "127.0.0.1:0", *, token: Optional[str] = None) -> None:
        """Listens at "ip:port"; port 0 takes any free one. With a token, callers must present it."""
        handle = ffi.new("crossdock_registry *")
        check(lib.crossdock_registry_start(text_bytes(bind), text_or_null(token), handle))
        self._begin(handle[0])
        self.address = told_text(lib.crossdock_registry_address, self._handle)

    def close(self) -> None:
        """Stops it."""
        self._shut()

    def __enter__(self) -> Registry:
        return self


class Registration(_Held):
    """A worker that is kept registered, by a thread of its own."""

    __slots__ = ()

    _close = staticmethod(lib.crossdock_registration_close)

    def __init__(self, handle: int) -> None:
        """For the client."""
        self._begin(handle)

    def wait(self, timeout: float) -> None:
        """Waits until the registry has taken the worker, so many seconds."""
        self._here()
        check(lib.crossdock_registration_wait(self._handle, milliseconds(timeout)))

    def ready(self) -> None:
        """Says that the worker has warmed up, and returns at once."""
        self._here()
        check(lib.crossdock_registration_ready(self._handle))

    def close(self) -> None:
        """Takes the worker out of the registry."""
        self._shut()

    def __enter__(self) -> Registration:
        return self


class RegistryClient(_Held):
    """A client of the registry at `server`: "host:port", or "etcd://host:port". Nothing is sent yet."""

    __slots__ = ()

    _close = staticmethod(lib.crossdock_registry_disconnect)

    def __init__(self, server: str, *, token: Optional[str] = None, call_timeout: Optional[float] = None) -> None:
        """A call takes at most `call_timeout` seconds, 5 if left out."""
        handle = ffi.new("crossdock_registry_client *")
        time = milliseconds(call_timeout)
        check(lib.crossdock_registry_connect(text_bytes(server), text_or_null(token), time, handle))
        self._begin(handle[0])

    def register(self, worker: Mapping[str, Any]) -> Registration:
        """Keeps a worker registered, and returns at once. Its fields are those of `docs/bootstrap.md`: `node`,
        `incarnation`, `role`, `address`, `ttl_ms`, and what else it names. An incarnation may be given as a number."""
        self._here()
        fields = dict(worker)
        if isinstance(fields.get("incarnation"), int):
            fields["incarnation"] = f"{fields['incarnation']:016x}"
        handle = ffi.new("crossdock_registration *")
        check(lib.crossdock_registry_register(self._handle, text_bytes(json.dumps(fields)), handle))
        return Registration(handle[0])

    def find(
        self, query: Union[Mapping[str, Any], str, None] = None, *, count: int = 0, timeout: float = 0.0
    ) -> List[Dict[str, Any]]:
        """The workers that match, as `{"role": "decode", "tp_rank": 0}`; all without a query. With a `count`, waits until
        so many match, for at most `timeout` seconds."""
        self._here()
        text = query if query is None or isinstance(query, str) else urlencode(query)
        found: List[Dict[str, Any]] = self._asked(
            lib.crossdock_registry_find, text_or_null(text), count, timeout=timeout
        )
        return found

    def wait_for_group(self, group: str, timeout: float) -> Dict[str, Any]:
        """Waits until all ranks of a group are there and ready, and tells the group."""
        self._here()
        found: Dict[str, Any] = self._asked(lib.crossdock_registry_wait_for_group, text_bytes(group), timeout=timeout)
        return found

    def _asked(self, call: Any, *arguments: Any, timeout: float) -> Any:
        return json.loads(told_text(call, self._handle, *arguments, milliseconds(timeout), capacity=_USUAL_CAPACITY))

    def close(self) -> None:
        """Lets the client go. Registrations that were started with it go on."""
        self._shut()

    def __enter__(self) -> RegistryClient:
        return self
