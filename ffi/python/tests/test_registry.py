"""The registry: workers are registered, found, and waited for."""

from __future__ import annotations

import unittest
from typing import Any, Dict

from support import TIMEOUT, Case, Worker, crossdock

from crossdock import Registry, RegistryClient


def worker(name: str, **fields: Any) -> Dict[str, Any]:
    usual = dict(node=name, incarnation=0x5EED, role="decode", address="10.0.0.7:7000", ttl_ms=10000)
    return {**usual, **fields}


class Registered(Case):
    def setUp(self) -> None:
        self.registry = self.entered(Registry(token="secret"))
        self.client = self.entered(RegistryClient(self.registry.address, token="secret"))

    def test_found_and_gone(self) -> None:
        self.assertEqual(self.client.find(), [])
        with self.client.register(worker("decode-0", labels={"zone": "a b"})) as registration:
            registration.wait(TIMEOUT)
            found = self.client.find({"role": "decode", "label.zone": "a b"}, count=1, timeout=TIMEOUT)
            self.assertEqual([one["node"] for one in found], ["decode-0"])
            self.assertEqual((found[0]["address"], int(found[0]["incarnation"], 16)), ("10.0.0.7:7000", 0x5EED))
            self.assertEqual(self.client.find("role=prefill"), [])
        self.assertEqual(self.client.find(), [])

    def test_one_that_warms_up(self) -> None:
        with self.client.register(worker("decode-0", warm_up_ms=60000)) as registration:
            registration.wait(TIMEOUT)
            self.assertEqual(self.client.find({"state": "ready"}), [])
            registration.ready()
            self.assertEqual(len(self.client.find({"state": "ready"}, count=1, timeout=TIMEOUT)), 1)

    def test_a_group(self) -> None:
        alike = dict(group="decode", tp_size=2, page_tokens=16, dtype="bf16", model="small")
        members = [
            self.entered(self.client.register(worker(f"decode-{rank}", member={**alike, "tp_rank": rank})))
            for rank in range(2)
        ]
        group = self.client.wait_for_group("decode", TIMEOUT)
        self.assertEqual(group["group"], "decode")
        self.assertEqual(len(members), 2)

    def test_many_are_told_whole(self) -> None:
        names = [f"decode-{at:03}" for at in range(300)]
        labels = {"text": "x" * 250}
        registrations = [self.client.register(worker(name, labels=labels)) for name in names]
        found = self.client.find(count=len(names), timeout=TIMEOUT)
        self.assertEqual([one["node"] for one in found], names)
        for registration in registrations:
            registration.close()
            registration.close()

    def test_refused(self) -> None:
        with RegistryClient(self.registry.address, token="wrong", call_timeout=1.0) as stranger:
            with self.assertRaises(crossdock.RegistryError):
                stranger.find()
        with self.assertRaises(crossdock.Error) as caught:
            self.client.find(count=1, timeout=0.05)
        self.assertTrue(caught.exception.is_retryable)
        for wrong in (dict(address="nowhere"), dict(incarnation="none"), dict(node="a/b")):
            with self.subTest(wrong), self.assertRaises(crossdock.BadArgument):
                self.client.register(worker("decode-0", **wrong))
        with self.assertRaises(crossdock.BadArgument):
            self.client.find({"rolle": "decode"})
        self.registry.close()
        with self.assertRaises(crossdock.RegistryError):
            self.client.find()
        self.client.close()
        with self.assertRaises(crossdock.BadHandle):
            self.client.find()

    def test_a_node_is_found_and_dialed(self) -> None:
        with Worker("prefill-0") as prefill, Worker("decode-0") as decode:
            mine = worker(
                "prefill-0", role="prefill", address=prefill.node.address, incarnation=prefill.node.incarnation
            )
            with self.client.register(mine):
                (found,) = self.client.find({"role": "prefill"}, count=1, timeout=TIMEOUT)
                peer = decode.node.connect(found["address"])
                self.assertEqual(peer.wait(TIMEOUT).incarnation, int(found["incarnation"], 16))
                peer.close()


if __name__ == "__main__":
    unittest.main()
