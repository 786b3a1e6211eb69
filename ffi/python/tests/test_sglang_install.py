"""How SGLang comes to know `crossdock.sglang`: `install`, its plugins, and `python -m crossdock.sglang`, whose spawned
processes know it too. The last is tried with a stand-in for SGLang's server, which says what it was told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path
from typing import Any, Dict

from engines.sglang import why_not
from support import run_script, script_environment

REASON = why_not()
if REASON and __name__ != "__main__":
    print(f"test_sglang_install: tried with stand-ins alone: {REASON}", file=sys.stderr)

# What the package asks of SGLang before any class of it is made.
STAND_IN: Dict[str, str] = {
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/arg_groups/__init__.py": "",
    "sglang/srt/arg_groups/choices.py": """
        DISAGG_TRANSFER_BACKEND_CHOICES = ["mooncake"]
        add_disagg_transfer_backend_choices = DISAGG_TRANSFER_BACKEND_CHOICES.extend
    """,
    "sglang/srt/disaggregation/__init__.py": "",
    "sglang/srt/disaggregation/utils.py": """
        import enum
        class TransferBackend(enum.Enum):
            MOONCAKE = "mooncake"
        def get_kv_class(backend, kind):
            return "its own"
    """,
    "sglang/srt/scheduler.py": """
        from sglang.srt.disaggregation.utils import TransferBackend, get_kv_class

        def child(told):
            told.put([TransferBackend("crossdock").name, get_kv_class(TransferBackend.MOONCAKE, None)])
    """,
    "sglang/launch_server.py": """
        import json, multiprocessing, os, sys
        from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES
        from sglang.srt.scheduler import child

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            told = context.Queue()
            process = context.Process(target=child, args=(told,))
            process.start()
            process.join(60)
            print(json.dumps({
                "arguments": sys.argv[1:],
                "choices": DISAGG_TRANSFER_BACKEND_CHOICES,
                "child": told.get(timeout=10),
                "timeout": os.environ["SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT"],
            }))
    """,
}


class Launch(unittest.TestCase):
    def test_the_server_and_what_it_spawns(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in STAND_IN.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(textwrap.dedent(text))
            environment = script_environment()
            environment["PYTHONPATH"] = os.pathsep.join([folder, environment["PYTHONPATH"]])
            arguments = ["--disaggregation-transfer-backend", "crossdock"]
            done = subprocess.run(
                [sys.executable, "-m", "crossdock.sglang", *arguments],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
            )
        self.assertEqual(done.returncode, 0, done.stderr)
        told: Dict[str, Any] = json.loads(done.stdout)
        self.assertEqual(told["arguments"], arguments)
        self.assertEqual(told["choices"], ["mooncake", "crossdock"])
        self.assertEqual(told["child"], ["CROSSDOCK", "its own"])
        self.assertGreater(float(told["timeout"]), 86400)

    def test_without_sglang(self) -> None:
        """The package can be imported; what needs SGLang says so."""
        script = """
            import sys
            sys.modules["sglang"] = None
            import crossdock.sglang
            for ask in (crossdock.sglang.install, lambda: crossdock.sglang.CrossdockKVManager):
                try:
                    ask()
                except ImportError as error:
                    assert "sglang" in str(error), error
                else:
                    raise AssertionError
            assert not hasattr(crossdock.sglang, "anything_else")
        """
        done = run_script(textwrap.dedent(script))
        self.assertEqual(done.returncode, 0, done.stderr)


@unittest.skipIf(REASON, REASON or "")
class Installed(unittest.TestCase):
    """In SGLang's own modules."""

    def run_script(self, script: str) -> None:
        begin = """
            import os, sys
            os.environ["CROSSDOCK_SGLANG_TORCH"] = "0"
            from engines import sglang as wheel
            wheel.prepare()
        """
        done = run_script(textwrap.dedent(begin) + textwrap.dedent(script))
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_what_sglang_finds(self) -> None:
        self.run_script(
            """
            from sglang.srt.managers import disagg_service
            from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES as choices
            from sglang.srt.disaggregation import utils
            import copy, pickle
            import crossdock.sglang as ours

            ours.install()
            ours.install()
            assert choices.count("crossdock") == 1 and choices[0] == "mooncake", choices
            backend = utils.TransferBackend("crossdock")
            assert backend is utils.TransferBackend.CROSSDOCK and backend in list(utils.TransferBackend)
            assert backend != utils.TransferBackend.MOONCAKE and {backend: 1}[backend]
            assert pickle.loads(pickle.dumps(backend)) is backend and copy.deepcopy(backend) is backend

            kinds = utils.KVClassType
            for find in (utils.get_kv_class, disagg_service.get_kv_class):
                assert find(backend, kinds.KVARGS).__name__ == "KVArgs"
                assert find(backend, kinds.MANAGER) is ours.CrossdockKVManager
                assert find(backend, kinds.SENDER) is ours.CrossdockKVSender
                assert find(backend, kinds.RECEIVER) is ours.CrossdockKVReceiver
                assert find(backend, kinds.BOOTSTRAP_SERVER) is ours.CrossdockKVBootstrapServer
                mooncake = find(utils.TransferBackend.MOONCAKE, kinds.MANAGER)
                assert mooncake.__module__.startswith("sglang."), mooncake

            # No call that the scheduler makes is left to an abstract method.
            for name in ("Manager", "Sender", "Receiver", "BootstrapServer"):
                assert not getattr(getattr(ours, f"CrossdockKV{name}"), "__abstractmethods__", None), name
            """
        )

    def test_the_service_starts_the_bootstrap_server(self) -> None:
        self.run_script(
            """
            import time, urllib.request
            from engines.sglang_rank import free_port
            from sglang.srt.managers.disagg_service import start_disagg_service
            import crossdock.sglang as ours

            ours.install()
            wheel.disagg.disaggregation_mode, wheel.disagg.disaggregation_transfer_backend = "prefill", "crossdock"
            wheel.disagg.disaggregation_bootstrap_port = port = free_port()
            server = start_disagg_service()
            assert type(server) is ours.CrossdockKVBootstrapServer
            deadline = time.monotonic() + 20
            while True:
                try:
                    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read() == b"OK"
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            server.close()
            """
        )

    def test_as_a_plugin(self) -> None:
        """SGLang loads it in each of its processes where a distribution names it."""
        self.run_script(
            """
            import pathlib, tempfile
            folder = tempfile.TemporaryDirectory()
            info = pathlib.Path(folder.name, "something-1.dist-info")
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: something\\nVersion: 1\\n")
            (info / "entry_points.txt").write_text("[sglang.srt.plugins]\\ncrossdock = crossdock.sglang:install\\n")
            sys.path.insert(0, folder.name)
            from sglang.srt.plugins import load_plugins
            from sglang.srt.disaggregation.utils import TransferBackend

            load_plugins()
            assert TransferBackend("crossdock").value == "crossdock"
            """
        )

    def test_another_version_of_sglang(self) -> None:
        """Whose classes lack something: `ImportError` names it, before anything is moved."""
        self.run_script(
            """
            from sglang.srt.disaggregation.common import conn
            del conn.CommonKVReceiver._register_kv_args
            import crossdock.sglang as ours
            try:
                ours.CrossdockKVReceiver
            except ImportError as error:
                assert "CommonKVReceiver has no _register_kv_args" in str(error), error
            else:
                raise AssertionError
            """
        )


if __name__ == "__main__":
    unittest.main()
