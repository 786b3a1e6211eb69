"""NIXL's Python API over crossdock: the names, arguments and answers of `nixl._api`, as far as vLLM and SGLang call it.

A program that says `from nixl._api import nixl_agent` runs unchanged after `crossdock.nixl.install()`, with `python -m
crossdock.nixl program.py ...`, or with the folder that `python -m crossdock.nixl --path` prints in front of its
PYTHONPATH, which its child processes then have too. docs/nixl.md says what is there, what is refused and what is
different.

Host memory alone is moved as long as there is no CUDA port. NumPy is needed. `CROSSDOCK_KEY` holds the key that all
processes share; `CROSSDOCK_HOST` is the IP address at which an agent listens.
"""

from __future__ import annotations

import logging as _logging
import os
import sys
import types

from . import _api, _bindings
from ._api import (
    nixl_agent,
    nixl_agent_config,
    nixl_backend_handle,
    nixl_prepped_dlist_handle,
    nixl_thread_sync_t,
    nixl_xfer_handle,
)
from ._bindings import DEFAULT_COMM_PORT

__all__ = [
    "DEFAULT_COMM_PORT",
    "alias_path",
    "install",
    "nixl_agent",
    "nixl_agent_config",
    "nixl_backend_handle",
    "nixl_prepped_dlist_handle",
    "nixl_thread_sync_t",
    "nixl_xfer_handle",
]


def install() -> None:
    """Makes `nixl`, `nixl._api`, `nixl._bindings` and `nixl.logging` mean this package, for the programs of this
    process that import them from now on."""
    package = sys.modules[__name__]
    log = types.ModuleType("nixl.logging")
    setattr(log, "get_logger", lambda name: _logging.getLogger(f"nixl.{name.lstrip('_')}"))
    for name, module in (("", package), ("._api", _api), ("._bindings", _bindings), (".logging", log)):
        sys.modules[f"nixl{name}"] = module
    setattr(package, "logging", log)


def alias_path() -> str:
    """A folder for PYTHONPATH, in which `nixl` is this package."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "alias")
