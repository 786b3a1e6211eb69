"""Hosts, sessions and protocols, as Mooncake's users name them."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from typing import Tuple

from .._host import ports_of

_log = logging.getLogger("crossdock.mooncake")


def bind_of(hostname: str) -> str:
    """`"ip:port"` of `"host"` or `"host:port"`; what is not numbered takes any free port."""
    host, port = _split(hostname)
    address = _resolved(host or "127.0.0.1")
    return f"[{address}]:{port or 0}" if ":" in address else f"{address}:{port or 0}"


def peer_of(session: str) -> str:
    host, port = _split(session)
    if not port:
        raise ValueError(f"{session!r} is not host:port")
    address = _resolved(host)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _split(name: str) -> Tuple[str, int]:
    if name.startswith("["):
        host, _, rest = name[1:].partition("]")
        return host, int(rest.lstrip(":") or 0)
    if name.count(":") == 1:
        host, _, port = name.partition(":")
        return host, int(port or 0)
    return name, 0


def _resolved(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def ports_for(protocol: str, devices: str) -> str:
    if protocol == "tcp" or os.environ.get("MC_FORCE_TCP"):
        return "shm,tcp"
    if protocol != "rdma":
        raise ValueError(f"protocol {protocol!r}: there are rdma and tcp")
    ports = ports_of(devices)
    if "verbs" not in ports:
        _log.warning("no RDMA device is here: peers on other hosts are reached by TCP")
    return ports
