"""A KV connector for vLLM, loaded by module path:

    --kv-transfer-config '{"kv_connector": "CrossdockConnector", "kv_connector_module_path": "crossdock.vllm",
                           "kv_role": "kv_producer"}'

The decode side pulls: the prefill side serves the blocks of a finished request in a room, whose number and addresses
travel in the request's `kv_transfer_params`; the decode side fetches them into its own blocks, by block numbers.
docs/vllm.md says how to set it up, what is refused, and what was exercised.
"""

from __future__ import annotations

import importlib

try:
    importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")
except ImportError as error:
    raise ImportError(
        f"crossdock.vllm is a connector that vLLM loads, and vLLM cannot be imported here: {error}"
    ) from error

from ._connector import CrossdockConnector, CrossdockHandshake, CrossdockMetadata

__all__ = ["CrossdockConnector", "CrossdockHandshake", "CrossdockMetadata"]
