"""The connector for vLLM: how it is loaded, what of a configuration it refuses, and where it finds blocks."""

from __future__ import annotations

import importlib
import sys
import unittest
from types import SimpleNamespace
from typing import Any, Dict
from unittest import mock

from support import crossdock, torch

from engines import vllm
from engines.vllm_case import Engines, Shape
from engines.vllm_engine import config_of, transfer_of

from crossdock.vllm import _strips
from crossdock.vllm._settings import Settings


class MLAAttentionSpec(SimpleNamespace):
    """As a spec of this name, with anything in it."""


def settings(shape: Shape = Shape(), tp: int = 1, caches: Any = None, **extra: Any) -> Settings:
    config = config_of(transfer_of("kv_both", **extra), shape, tp)
    return Settings.of(config, shape.config(tp) if caches is None else caches)


class Loading(Engines):
    def test_as_vllm_finds_it(self) -> None:
        factory = importlib.import_module(f"{vllm.CONNECTORS}.factory").KVConnectorFactory
        transfer = transfer_of("kv_both")
        kind = factory.get_connector_class(transfer)
        self.assertIs(kind, importlib.import_module("crossdock.vllm").CrossdockConnector)
        # vLLM keeps all tokens of all layers then, and can say so to itself.
        self.assertFalse(factory.supports_hma_config(transfer))
        self.assertFalse(kind.supports_sleep_mode(transfer))
        config = config_of(transfer_of("kv_both", heterogeneous_tp=True), Shape())
        self.assertEqual(kind.get_required_kvcache_layout(config), "LBHNC")
        self.assertIsNone(kind.get_required_kvcache_layout(config_of(transfer, Shape())))
        self.assertIsNone(kind.get_required_kvcache_layout(config_of(config.kv_transfer_config, Shape(is_mla=True))))
        self.assertIn(importlib.import_module("vllm.v1.kv_cache_interface").KVCacheLayout.LBHNC.name, "LBHNC")
        missing = transfer_of("kv_both")
        missing.kv_connector = "AnotherConnector"
        with self.assertRaises(AttributeError):
            factory.get_connector_class(missing)

    def test_without_vllm(self) -> None:
        absent: Dict[str, Any] = {name: module for name, module in sys.modules.items() if "crossdock.vllm" not in name}
        absent[f"{vllm.CONNECTORS}.v1.base"] = None
        with mock.patch.dict("sys.modules", absent, clear=True):
            with self.assertRaisesRegex(ImportError, "a connector that vLLM loads, and vLLM cannot be imported here"):
                importlib.import_module("crossdock.vllm")


class Configurations(Engines):
    def test_what_is_moved(self) -> None:
        usual = settings()
        self.assertEqual((usual.tp, usual.decode_tp, usual.block_tokens, usual.blocks), (1, 1, 4, 32))
        self.assertEqual((usual.splits_heads, usual.is_mla, usual.kv_heads), (False, False, 4))
        other = settings(Shape(is_mla=True), 2, decode_tp=8, lease_seconds=7, load_seconds=1.5, ports="tcp")
        self.assertEqual((other.decode_tp, other.lease_seconds, other.load_seconds, other.ports), (8, 7.0, 1.5, "tcp"))
        # A window of which vLLM keeps all tokens.
        interface = importlib.import_module("vllm.v1.kv_cache_interface")
        spec = interface.FullAttentionSpec(
            block_size=4, num_kv_heads=4, head_size=16, dtype=torch.uint8, sliding_window=128
        )
        settings(caches=SimpleNamespace(num_blocks=8, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)]))

    def test_what_is_not_moved(self) -> None:
        shape = Shape()
        for change in (
            {"pipeline_parallel_size": 2},
            {"decode_context_parallel_size": 2},
            {"prefill_context_parallel_size": 2},
        ):
            with self.subTest(change), self.assertRaisesRegex(crossdock.Unsupported, next(iter(change))):
                Settings.of(config_of(transfer_of("kv_both"), shape, **change), shape.config(1))
        config = config_of(transfer_of("kv_both"), shape)
        config.num_prefill_lookahead_tokens = 2
        with self.assertRaisesRegex(crossdock.Unsupported, "drafter"):
            Settings.of(config, shape.config(1))
        group = SimpleNamespace(kv_cache_spec=MLAAttentionSpec(block_size=4))
        hybrid = SimpleNamespace(num_blocks=8, kv_cache_groups=[group, group])
        with self.assertRaisesRegex(crossdock.Unsupported, "2 groups"):
            settings(caches=hybrid)
        state = SimpleNamespace(num_blocks=8, kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace())])
        with self.assertRaisesRegex(crossdock.Unsupported, "SimpleNamespace"):
            settings(caches=state)
        for tp, decode_tp in ((8, 8), (4, 3), (1, 3)):
            with self.subTest(tp=tp, decode_tp=decode_tp), self.assertRaisesRegex(crossdock.Unsupported, "whole heads"):
                settings(Shape(), tp, heterogeneous_tp=True, decode_tp=decode_tp, caches=shape.config(1))

    def test_options_that_make_no_sense(self) -> None:
        changes: Any = [dict(lease_seconds=value) for value in (0, -1, 86401, "60", True, float("nan"))]
        changes += [dict(load_seconds=0), dict(decode_tp=0), dict(decode_tp="2"), dict(decode_tp=2), dict(host=7)]
        changes += [dict(heterogeneous_tp="false")]
        for change in [*changes, dict(ports=["tcp"])]:
            with self.subTest(change), self.assertRaises(crossdock.BadArgument):
                settings(**change)

    def test_options_that_mean_nothing(self) -> None:
        with self.assertLogs("crossdock.vllm", "WARNING") as logs:
            settings(lease_second=5)
        self.assertIn("lease_second, which mean nothing here", "\n".join(logs.output))

    def test_nodes_that_cannot_be_opened(self) -> None:
        changes: Any = (dict(ports="carrier pigeons"), dict(host="192.0.2.1"), dict(host="nowhere"))
        for change in changes:
            with self.subTest(change), self.assertRaises(crossdock.Error):
                self.engine("kv_both", **change)
        with mock.patch.dict("os.environ", {"CROSSDOCK_KEY": "short"}), self.assertRaises(crossdock.Error):
            self.engine("kv_both")
        with mock.patch.dict("os.environ", {"CROSSDOCK_KEY": ""}), self.assertLogs("crossdock.vllm", "WARNING") as logs:
            settings()
        self.assertIn("anybody who can reach", "\n".join(logs.output))


class Blocks(Engines):
    def cache(self, tensors: Dict[str, Any], of: Settings, rank: int = 0) -> Any:
        return _strips.cache_of(tensors, of, rank)

    def test_where_blocks_are(self) -> None:
        """A strip for each tensor, and for each head where they are apart; its places are those of the tensor."""
        cases = (("LBNHC", False, 3), ("LBHNC", True, 12), ("LHBNC", False, 12), ("BLHNC", True, 12))
        for order, heads, strips in cases:
            shape = Shape(order=order)
            tensors = shape.caches(1)
            cache = self.cache(tensors, settings(shape, heterogeneous_tp=heads))
            self.assertEqual((cache.strips, cache.layout.pages, cache.layout.regions), (strips, 32, 1))
            tensor = tensors["model.layers.1.attn"]
            # Head after head, so that ranks can share them; of tensors whose heads are far apart, layer after layer.
            layer, place = (4 if order == "LHBNC" else 1), tensor[5, 0]
            found = cache.layout.find(layer)
            begin = min(one.data_ptr() for one in tensors.values())
            self.assertEqual(begin + found.offset + 5 * found.stride_bytes, place.data_ptr(), order)
            self.assertEqual(found.page_bytes, tensor[5].numel() if strips == 3 else place.numel())

    def test_keys_and_values_apart(self) -> None:
        """As older backends keep them."""
        of = settings()
        for shape, strips in (((2, 32, 4, 2, 8), 4), ((32, 2, 4, 2, 8), 2)):
            tensors = {f"layer {at}": torch.zeros(shape, dtype=torch.float16) for at in range(2)}
            cache = self.cache(tensors, of)
            self.assertEqual((cache.strips, cache.layout.regions), (strips, 2))
            self.assertEqual(cache.layout.page_bytes, 4 * 2 * 8 * 2 * (1 if strips == 4 else 2))

    def test_blocks_that_kernels_divide(self) -> None:
        cache = self.cache({"layer": torch.zeros(64, 4, 2, 16, dtype=torch.uint8)}, settings())
        self.assertEqual((cache.layout.pages, cache.layout.page_bytes), (32, 2 * 4 * 2 * 16))

    def test_layers_that_share_a_cache(self) -> None:
        tensor = torch.zeros(32, 4, 4, 16, dtype=torch.uint8)
        cache = self.cache({"layer": tensor, "the same": tensor}, settings())
        self.assertEqual((cache.strips, cache.layout.regions), (1, 1))

    def test_what_is_refused(self) -> None:
        usual, split = settings(), settings(heterogeneous_tp=True)
        dense = torch.zeros(32, 4, 4, 16)
        for tensors, of in (
            ([torch.zeros(7, 4)], usual),
            ([torch.zeros(())], usual),
            ([dense, torch.zeros(32, 4, 4, 32)], usual),
            ([torch.zeros(32, 4)[:, ::2]], usual),
            ([dense[:, :, :, ::2]], usual),
            ([dense.permute(0, 2, 1, 3)], split),
            ([torch.zeros(32, 4, 64)], split),
            ([torch.zeros(64, 4, 2, 16)], split),
            ([torch.zeros(32, 4, 4, 16, device="meta")], usual),
        ):
            with self.subTest([tuple(tensor.shape) for tensor in tensors]), self.assertRaises(crossdock.Unsupported):
                self.cache({str(at): tensor for at, tensor in enumerate(tensors)}, of)
        with self.assertRaises(crossdock.LayoutError):
            self.cache({}, usual)


if __name__ == "__main__":
    unittest.main()
