"""What programs that were written for other libraries do not say: where to listen, with which ports and which key."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from typing import List, Optional

from ._abi import ffi
from .errors import BadArgument

_log = logging.getLogger("crossdock")
# It is reserved for documentation. Nothing is sent there: the kernel only says by which way it would be.
_SOMEWHERE = ("192.0.2.1", 9)


def bind_host() -> str:
    """`CROSSDOCK_HOST`, an IP address of this machine; or that of the way out."""
    named = os.environ.get("CROSSDOCK_HOST")
    if named:
        try:
            return str(ipaddress.ip_address(named))
        except ValueError:
            raise BadArgument(f"CROSSDOCK_HOST is {named!r}", "give an IP address of this machine", 3) from None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        try:
            out.connect(_SOMEWHERE)
            return str(out.getsockname()[0])
        except OSError:
            _log.warning("there is no way out: peers on this machine alone can connect; set CROSSDOCK_HOST otherwise")
            return "127.0.0.1"


def is_address(text: str) -> bool:
    """Whether it is "ip:port" of something that can be dialed, as peers tell it."""
    host, _, port = text.rpartition(":")
    try:
        ipaddress.ip_address(host[1:-1] if host.startswith("[") else host)
        return 0 < int(port) < 65536
    except ValueError:
        return False


def key_of_deployment() -> Optional[bytes]:
    """What all processes share."""
    key = os.environ.get("CROSSDOCK_KEY")
    if key:
        return key.encode()
    _log.warning("CROSSDOCK_KEY is not set: anybody who can reach this process may write its registered memory")
    return None


def ports_of(devices: str) -> str:
    """Peers on this machine are reached through memory in any case. `devices` are as UCX names them, "mlx5_0:1"."""
    named = [f"verbs:{device.strip().partition(':')[0]}" for device in devices.split(",") if device.strip()]
    if not named and rdma_devices():
        named = ["verbs"]
    return ",".join(["shm", *named, "tcp"])


def rdma_devices() -> List[str]:
    """Those that the kernel knows."""
    try:
        return sorted(os.listdir("/sys/class/infiniband"))
    except OSError:
        return []


def require_host_memory(address: int, nbytes: int) -> None:
    """Raises OSError where the first or the last byte cannot be read, as those of a GPU cannot: the kernel looks, which is
    harmless."""
    if nbytes <= 0:
        raise ValueError(f"a memory of {nbytes} bytes")
    reader, writer = os.pipe()
    try:
        for at in (address, address + nbytes - 1):
            try:
                os.write(writer, ffi.buffer(ffi.cast("char *", at), 1))
            except OSError as error:
                raise OSError(error.errno, f"{nbytes} bytes at {address:#x} are no host memory") from None
    finally:
        os.close(reader)
        os.close(writer)
