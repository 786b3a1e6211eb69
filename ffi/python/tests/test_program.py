"""Programs that were written for another library, run with this package in its place; and what they start."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path
from typing import List

from support import crossdock, numpy

# From any folder.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(crossdock.__file__).resolve().parents[1])}

# However a child is started, the name means the same in it.
PROGRAM = """
    import multiprocessing
    import subprocess
    import sys

    ASKED = "from {module} import {name}; print({name}.__module__)"


    def child(queue):
        from {module} import {name}

        queue.put({name}.__module__)


    if __name__ == "__main__":
        from {module} import {name}

        print({name}.__module__, *sys.argv[1:])
        for method in ("spawn", "forkserver"):
            context = multiprocessing.get_context(method)
            queue = context.Queue()
            process = context.Process(target=child, args=(queue,))
            process.start()
            print(queue.get(timeout=60))
            process.join()
        print(subprocess.run([sys.executable, "-c", ASKED], check=True, capture_output=True, text=True).stdout, end="")
"""


class Programs(unittest.TestCase):
    def said(self, package: str, module: str, name: str, *arguments: str) -> List[str]:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "program.py")
            with open(path, "w", encoding="utf-8") as file:
                file.write(textwrap.dedent(PROGRAM).format(module=module, name=name))
            given = [path if argument == "PATH" else argument for argument in arguments]
            ran = subprocess.run(
                [sys.executable, "-m", package, *given], cwd=folder, env=ENVIRONMENT, timeout=120,
                capture_output=True, text=True,
            )  # fmt: skip
        self.assertEqual((ran.returncode, ran.stderr), (0, ""))
        return ran.stdout.splitlines()

    @unittest.skipIf(numpy is None, "crossdock.nixl needs NumPy")
    def test_nixl(self) -> None:
        for program in (["PATH"], ["-m", "program"]):
            told = self.said("crossdock.nixl", "nixl._api", "nixl_agent", *program, "word")
            self.assertEqual(told, ["crossdock.nixl._api word"] + ["crossdock.nixl._api"] * 3)

    def test_mooncake(self) -> None:
        for program in (["PATH"], ["-m", "program"]):
            told = self.said("crossdock.mooncake", "mooncake.engine", "TransferEngine", *program, "word")
            self.assertEqual(told, ["crossdock.mooncake word"] + ["crossdock.mooncake"] * 3)

    def test_what_is_no_program(self) -> None:
        for package in ["crossdock.mooncake"] + ["crossdock.nixl"] * (numpy is not None):
            for arguments in ([], ["-m"]):
                ran = subprocess.run(
                    [sys.executable, "-m", package, *arguments], env=ENVIRONMENT, timeout=60,
                    capture_output=True, text=True,
                )  # fmt: skip
                self.assertEqual(ran.returncode, 1)
                self.assertTrue(ran.stderr.startswith(f"usage: python -m {package} PROGRAM.py"), ran.stderr)


if __name__ == "__main__":
    unittest.main()
