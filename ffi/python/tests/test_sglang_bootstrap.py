"""A bootstrap server that is late, gone, started anew, or told nonsense, under `crossdock.sglang`. As test_sglang."""

from __future__ import annotations

import json
import unittest
import urllib.request
from typing import Any, Dict

from engines.loading import set_up
from engines.sglang import why_not
from engines.sglang_engine import Engine, Request
from engines.sglang_rank import free_port

setUpModule = set_up(__name__, why_not())

HEARTBEAT = {"SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2", "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "1"}


class Bootstrap(unittest.TestCase):
    def start(self, role: str, **options: Any) -> Engine:
        engine = Engine(role, **options)
        self.addCleanup(engine.close)
        engine.ready()
        return engine

    def test_ranks_that_come_late(self) -> None:
        prefill, decode = self.start("prefill", tp=2, absent=1), self.start("decode")
        (rank,) = decode.ranks
        self.assertFalse(rank.ask("try_ensure", address=prefill.address))
        prefill.complete()
        Request(prefill, decode, 3).run([2, 1])

    def test_nobody_is_there(self) -> None:
        decode = self.start("decode")
        (rank,) = decode.ranks
        address = f"127.0.0.1:{free_port()}"
        self.assertFalse(rank.ask("try_ensure", address=address))
        rank.ask("new", room=1, address=address)
        rank.call(1, "init", 0)
        self.assertIn("now it is down", rank.ask("failure", room=1)["reason"])
        self.assertTrue(rank.ask("is_safe", room=1))

    def test_a_rank_that_is_not_registered(self) -> None:
        prefill, decode = self.start("prefill"), self.start("decode")
        request = Request(prefill, decode, 2)
        request.create_decode()
        request.decode[0].call(request.room, "init", 5)
        self.assertIn("Could not fetch bootstrap info", request.failure(request.decode[0]))
        Request(prefill, decode, 2).run()

    def test_the_engine_is_killed_and_started_anew(self) -> None:
        """A request that has no room yet, or one that nobody has begun to serve, has no session that would tell:
        SGLang's heartbeat does. Once it finds nobody, once another rank than before."""
        for is_at_once in (False, True):
            with self.subTest(is_at_once=is_at_once):
                prefill, decode = self.start("prefill"), self.start("decode", env=HEARTBEAT)
                before = Request(prefill, decode, 3)
                before.run([1, 2])
                request = Request(prefill, decode, 3)
                request.create()
                if not is_at_once:
                    request.handshake()
                prefill.ranks[0].kill()
                port = int(prefill.address.rpartition(":")[2])
                if is_at_once:
                    again = self.start("prefill", port=port)
                    request.handshake()
                    request.grant()
                self.assertIn("Lost connection with prefill instance", request.failure(request.decode[0]))
                request.released()
                if not is_at_once:
                    again = self.start("prefill", port=port)
                decode.forget(prefill.address)
                Request(again, decode, 3, target=before.target).run([1, 2])

    def test_what_makes_no_sense(self) -> None:
        """What a rank tells of itself is not believed."""
        prefill, decode = self.start("prefill"), self.start("decode")
        (rank,) = decode.ranks
        good = self.get(prefill, "/route?prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0")
        told = good["crossdock"]
        geometry: Dict[str, Any] = told["geometry"]
        for nonsense, words in (
            (None, "tells nothing of crossdock"),
            (7, "tells nothing of crossdock"),
            ({**told, "version": 2}, "tells nothing of crossdock"),
            ({"version": 1}, "makes no sense: Geometry"),
            ({**told, "geometry": [geometry]}, "makes no sense: Geometry"),
            ({**told, "geometry": {"heads": 1}}, "makes no sense: Geometry"),
            ({**told, "geometry": {**geometry, "heads": 1}}, "one side keeps latents"),
            ({**told, "geometry": {**geometry, "heads": True}}, "heads True"),
            ({**told, "geometry": {**geometry, "layers": 1 << 40}}, "layers"),
            ({**told, "geometry": {**geometry, "draft": 5}}, "draft 5"),
            ({**told, "geometry": {**geometry, "states": [["mamba", None]]}}, "states"),
            ({**told, "geometry": {**geometry, "page_tokens": 0, "page_bytes": 0}}, "pages of 0 tokens"),
            ({**told, "rank": {"tp": 1}}, "makes no sense: Rank"),
            ({**told, "rank": {**told["rank"], "tp": 0}}, "tp=0"),
            ({**told, "rank": {**told["rank"], "pp": 1 << 40}}, "pp="),
            ({**told, "rank": {**told["rank"], "tp_rank": "0"}}, "tp_rank '0'"),
            ({**told, "rank": {**told["rank"], "tp": 1.0}}, "tp 1.0"),
            ({**told, "address": "nowhere"}, "nowhere"),
            ({**told, "address": "\0"}, "NUL"),
            ({**told, "address": 5}, "address 5"),
            ({name: told[name] for name in told if name != "address"}, "address None"),
        ):
            with self.subTest(nonsense=nonsense):
                self.put(prefill, {**good, "crossdock": nonsense})
                request = Request(prefill, decode, 2)
                request.create_decode()
                rank.call(request.room, "init", 0)
                self.assertIn(words, request.failure(rank))
        self.put(prefill, good)
        Request(prefill, decode, 2).run()

    def get(self, prefill: Engine, path: str) -> Any:
        with urllib.request.urlopen(f"http://{prefill.address}{path}", timeout=10) as response:
            return json.loads(response.read())

    def put(self, prefill: Engine, rank: Dict[str, Any]) -> None:
        whole = self.get(prefill, "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1")
        body = {
            **dict(attn_tp_rank=0, attn_cp_rank=0, attn_dp_size=1, attn_dp_rank=0, pp_rank=0),
            **dict(system_dp_size=1, system_dp_rank=0),
            **whole,
            **rank,
        }
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        headers = {"Content-Type": "application/json"}
        ask = urllib.request.Request(f"http://{prefill.address}/route", data=data, headers=headers, method="PUT")
        with urllib.request.urlopen(ask, timeout=10) as response:
            self.assertEqual(response.status, 200)


if __name__ == "__main__":
    unittest.main()
