"""vLLM's own NIXL connectors, unmodified, over `crossdock.nixl`: pull and push, with vLLM's own scheduler and block
pool, and the transport of its offloading between peers.

The modules come from vLLM's wheel, see engines/vllm.py; all of it happens in a process of its own, in which `nixl` is
`crossdock.nixl`. Stood in for beside what is named there: the platform (a CPU), the attention backend, and what an
older PyTorch lacks. Not exercised: a running server and its processes, a model, GPUs, hybrid models.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import unittest
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

from engines.loading import not_installed, stand_in
from support import numpy, script_environment, torch

# Set in that process.
INSIDE = "CROSSDOCK_TEST_NIXL_VLLM"
WHEEL = "CROSSDOCK_VLLM_WHEEL"
CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"
PARTS = (
    "base_scheduler base_worker connector metadata pull_scheduler pull_worker push_scheduler push_worker scheduler "
    "stats tp_mapping utils worker"
)
P2P = "vllm.v1.kv_offload.tiering.p2p.data"
MODULES = (
    CONNECTOR,
    *(f"{CONNECTOR}.{part}" for part in PARTS.split()),
    f"{CONNECTOR.rpartition('.')[0]}.ssm_conv_transfer_utils",
    "vllm.distributed.nixl_utils",
    "vllm.utils.network_utils",
    *(P2P, f"{P2P}.base", f"{P2P}.nixl"),
)


def why_not() -> Optional[str]:
    if numpy is None or torch is None:
        return "vLLM's modules need NumPy and PyTorch"
    if not os.environ.get(WHEEL):
        return f"{WHEEL} names no folder with vLLM's wheel"
    return not_installed("vLLM", ("zmq", "msgspec", "psutil", "urllib3"))


REASON = why_not()


class Outside(unittest.TestCase):
    def test_in_a_process_of_its_own(self) -> None:
        if REASON:
            print(f"test_nixl_vllm: skipped: {REASON}", file=sys.stderr)
            self.skipTest(REASON)
        done = subprocess.run(
            [sys.executable, "-m", "unittest", "-v", "test_nixl_vllm"],
            cwd=os.path.dirname(os.path.abspath(__file__)),
            env={**script_environment(), INSIDE: "1", "CROSSDOCK_HOST": "127.0.0.1", "CROSSDOCK_NIXL_TIMEOUT": "5"},
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stderr, "Ran 5 tests")


def load() -> None:
    """Makes vLLM's connectors importable."""
    import crossdock.nixl
    from engines import vllm

    crossdock.nixl.install()
    # The installed ones, if there are any.
    if importlib.util.find_spec("regex") is None:
        sys.modules["regex"] = re
    if importlib.util.find_spec("packaging") is None:
        stand_in("packaging.version", Version=str)
    if not hasattr(torch.Tensor, "untyped_storage"):
        torch.Tensor.untyped_storage = lambda tensor: tensor.storage().untyped()
    if not hasattr(torch.Tensor, "nbytes"):
        torch.Tensor.nbytes = property(lambda tensor: tensor.numel() * tensor.element_size())
    vllm.MODULES += MODULES
    usual = vllm._standins

    def standins() -> Dict[str, Dict[str, Any]]:
        names = usual()
        names["vllm.platforms"]["current_platform"].__dict__.update(
            is_rocm=lambda: False,
            get_nixl_supported_devices=dict,
            get_nixl_memory_type=lambda: None,
            discover_numa_topology=list,
            set_device=lambda number: None,
        )
        names["vllm.distributed.parallel_state"]["get_tensor_model_parallel_world_size"] = lambda: vllm.ranks.size
        names["vllm.config.utils"]["hash_factors"] = lambda factors: repr(sorted(factors.items()))
        names["vllm.v1.worker.utils"] = {"select_common_block_size": lambda size, *_: size}
        return names

    vllm._standins = standins
    absent = vllm.load()
    assert absent is None, absent
    # The harness tells what this connector's workers were to fetch, which NIXL's does not say.
    importlib.import_module(CONNECTOR).NixlConnectorMetadata.fetches = {}
    worker = sys.modules[f"{CONNECTOR}.base_worker"]
    backend = SimpleNamespace(get_name=lambda: "STANDIN")
    setattr(worker, "get_current_attn_backends", lambda *_: [backend])
    setattr(worker, "get_current_attn_backends_and_specs", lambda *_: ([backend], [None]))


if os.environ.get(INSIDE):
    load()
    from engines import vllm, vllm_engine
    from engines.vllm_case import Engines, following, prompt_of
    from engines.vllm_engine import Shape

    _config_of = vllm_engine.config_of

    def transfer_of(role: str, *, policy: str = "fail", connector: str = "NixlConnector", **extra: Any) -> Any:
        transfer.number += 1
        return importlib.import_module("vllm.config.kv_transfer").KVTransferConfig(
            kv_connector=connector,
            kv_role=role,
            kv_buffer_device="cpu",
            engine_id=f"{role}-{transfer.number}",
            kv_load_failure_policy=policy,
            kv_connector_extra_config=extra,
        )

    def config_of(transfer: Any, shape: Shape, tp: int = 1, **parallel: int) -> Any:
        config = _config_of(transfer, shape, tp, **parallel)
        config.model_config.__dict__.update(
            enable_sleep_mode=False,
            dtype=shape.dtype,
            get_head_size=lambda: shape.head_bytes,
            get_total_num_hidden_layers=lambda: shape.layers,
        )
        order = SimpleNamespace(name=shape.order)
        config.cache_config.__dict__.update(block_size=shape.block_tokens, get_resolved_kv_cache_layout=lambda: order)
        vllm.ranks.size = tp
        envs = importlib.import_module("vllm.envs")
        setattr(envs, "VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
        setattr(envs, "VLLM_NIXL_SIDE_CHANNEL_PORT", free_port())
        return config

    def free_port() -> int:
        import socket

        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            return int(taken.getsockname()[1])

    transfer = SimpleNamespace(number=0)
    setattr(vllm_engine, "transfer_of", transfer_of)
    setattr(vllm_engine, "config_of", config_of)

    class Connectors(Engines):
        def test_pulled(self) -> None:
            self.pair()
            for seed, count in enumerate((1, 4, 5, 30, 70)):
                with self.subTest(tokens=count):
                    self.hand_over(f"request {seed}", prompt_of(seed, count))

        def test_pulled_by_two_ranks(self) -> None:
            # Heads in one piece each: vLLM splits no others.
            shape = Shape(order="LBHNC")
            self.prefill, self.decode = self.engine("kv_producer", shape), self.engine("kv_consumer", shape, tp=2)
            self.hand_over("request", prompt_of(1, 50))

        def test_pushed_of_latent_caches(self) -> None:
            self.pair(Shape(is_mla=True), connector="NixlPushConnector")
            self.hand_over("request", prompt_of(1, 50))

        def test_a_prefill_engine_that_is_gone(self) -> None:
            self.pair(policy="recompute")
            self.hand_over("before", prompt_of(1, 20))
            params = self.prefilled("lost", prompt_of(2, 20))
            self.prefill.close()
            self.decode.add("lost", prompt_of(2, 20), params, most=3)
            self.until(lambda: "lost" in self.decode.over, self.decode)
            self.assertEqual(self.decode.tokens["lost"], following(prompt_of(2, 20), 3))
            self.assertTrue(self.decode.bad)
            self.decode.bad.clear()
            self.prefill = self.engine("kv_producer", policy="recompute")
            self.hand_over("after", prompt_of(3, 20))

        def test_offloading_between_peers(self) -> None:
            kind = importlib.import_module(f"{P2P}.nixl").NixlTransport
            blocks = [numpy.full((16, 512), number, numpy.uint8) for number in range(2)]
            sides = [kind(f"engine {number}", memoryview(one)) for number, one in enumerate(blocks)]
            for side in sides:
                self.addCleanup(side.close)
            sides[0].add_remote_peer("peer", sides[1].get_agent_metadata(), blocks[1].ctypes.data, 16, 512)
            number = sides[0].write_blocks("peer", [1, 2, 3], [7, 9, 8])
            done: List[int] = []
            self.until(lambda: done.extend(sides[0].poll("peer").done) or done, self.nobody)
            self.assertEqual(done, [number])
            self.assertEqual((blocks[1] == 0).all(axis=1).nonzero()[0].tolist(), [7, 8, 9])
            self.assertIsNone(sides[0].write_blocks("peer", [99], [0]))
            self.assertIsNone(sides[0].write_blocks("nobody", [0], [0]))

        nobody = SimpleNamespace(step=lambda: None)

    # This is what it has started.
    del Outside


if __name__ == "__main__":
    unittest.main()
