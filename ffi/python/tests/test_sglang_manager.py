"""Parts of SGLang's manager over crossdock, by themselves: what its threads do at the same time, and what goes wrong
between them. With SGLang's own modules, in a process of their own."""

from __future__ import annotations

import textwrap
import unittest

from engines.loading import set_up
from engines.sglang import why_not
from support import run_script

setUpModule = set_up(__name__, why_not())

BEGIN = """
    import logging, os, threading
    os.environ["CROSSDOCK_SGLANG_TORCH"] = "0"
    from engines import sglang as wheel
    wheel.prepare()
    from crossdock.sglang.hooks import conn
    from crossdock.sglang.manager import CrossdockKVManager

    class Manager(CrossdockKVManager):
        deferred_bootstrap = None

        def __init__(self):
            self.status_lock = threading.RLock()
            self.request_status = {}
            self._deferred_ack_targets, self._staging_outstanding = {}, {}
            self._deferred_ack_poisoned_rooms = set()
            self.connection_lock = threading.Lock()
            self._misses, self.max_failures = {}, 2
            self.lost = []

        def _handle_node_failure(self, address):
            self.lost.append(address)
"""


class Parts(unittest.TestCase):
    def run_script(self, script: str) -> None:
        done = run_script(textwrap.dedent(BEGIN) + textwrap.dedent(script))
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_a_failure_is_not_overwritten(self) -> None:
        """SGLang reads a status, and then writes it: another thread comes in between."""
        self.run_script(
            """
            other_is_done = threading.Event()

            class Slow(dict):
                def get(self, *args):
                    found = super().get(*args)
                    if threading.current_thread() is scheduler:
                        other_begins.set()
                        other_is_done.wait(0.3)
                    return found

            manager = Manager()
            manager.request_status = Slow({7: conn.KVPoll.WaitingForInput})
            other_begins = threading.Event()
            scheduler = threading.Thread(target=manager.update_status, args=(7, conn.KVPoll.Transferring))
            scheduler.start()
            assert other_begins.wait(10)
            manager.update_status(7, conn.KVPoll.Failed)
            other_is_done.set()
            scheduler.join(10)
            assert manager.request_status[7] == conn.KVPoll.Failed, manager.request_status
            """
        )

    def test_a_server_that_does_not_say_which_ranks_it_has(self) -> None:
        """Once is a heartbeat that is missed. Another answer than before is a server that was started anew."""
        self.run_script(
            """
            told = {"rank": {"tp_rank": 0, "pp_rank": 0}}

            class Answer:
                def __init__(self, status_code, told=None):
                    self.status_code, self.told = status_code, told

                def json(self):
                    if self.told is None:
                        raise ValueError("no JSON")
                    return {"crossdock": self.told}

            def get(url, params, timeout):
                answer = answers.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                return answer

            conn.requests.get = get
            good, bad = Answer(200, told), [Answer(500), Answer(200), conn.requests.ConnectionError("refused")]
            for one in bad:
                manager = Manager()
                manager.connection_pool = {"host:1_0_0_None": [{"crossdock": told}]}
                answers = [good, one, good, one, one, good, Answer(200, {**told, "address": "other"})]
                found = []
                while answers:
                    try:
                        manager._on_heartbeat_success("host:1")
                        found.append(len(manager.lost))
                    except Exception:
                        found.append("missed")
                assert found == [0, "missed", 0, "missed", 1, 1, 2], found
                manager._on_heartbeat_success("host:2")
                assert manager.lost == ["host:1"] * 2
            """
        )

    def test_the_end_of_the_listener_is_logged(self) -> None:
        self.run_script(
            """
            told = []

            class Keep(logging.Handler):
                def emit(self, record):
                    told.append((record.levelname, record.getMessage()))

            logging.getLogger("crossdock.sglang").addHandler(Keep())
            def recv():
                raise conn.zmq.ZMQError(9)
            Manager()._listen(recv, {})
            (level, words), = told
            assert level == "ERROR" and "no messages" in words, told
            """
        )


if __name__ == "__main__":
    unittest.main()
