"""What NIXL's agents have and this library's have not."""

from __future__ import annotations

from typing import Any

from ._bindings import DEFAULT_COMM_PORT, nixlNotSupportedError


class Absent:
    """Each call raises `nixlNotSupportedError`, with what to do instead."""

    def send_local_metadata(self, ip_addr: str = "", port: int = DEFAULT_COMM_PORT) -> None:
        raise _no_server("send_local_metadata")

    def send_partial_agent_metadata(self, *_: Any, **__: Any) -> None:
        raise _no_server("send_partial_agent_metadata")

    def fetch_remote_metadata(
        self, remote_agent: str, ip_addr: str = "", port: int = DEFAULT_COMM_PORT, label: str = ""
    ) -> None:
        raise _no_server("fetch_remote_metadata")

    def invalidate_local_metadata(self, ip_addr: str = "", port: int = DEFAULT_COMM_PORT) -> None:
        raise _no_server("invalidate_local_metadata")

    def get_remote_descs(self, *_: Any, **__: Any) -> None:
        raise _no_view("get_remote_descs")

    def prep_mem_view(self, *_: Any, **__: Any) -> int:
        raise _no_view("prep_mem_view")

    def release_mem_view(self, mvh: int) -> None:
        raise _no_view("release_mem_view")


def _no_server(what: str) -> nixlNotSupportedError:
    return nixlNotSupportedError(f"{what}: there is no server for metadata; hand get_agent_metadata() over yourself")


def _no_view(what: str) -> nixlNotSupportedError:
    return nixlNotSupportedError(f"{what}: views of memory for GPU kernels are not there")
