"""The scenes of examples/serving, small, each as the program that a user starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path
from typing import Tuple

from support import SOURCE, TIMEOUT, crossdock, numpy, script_environment

FOLDER = SOURCE.parents[1] / "examples" / "serving"


@unittest.skipUnless(FOLDER.is_dir(), "the example is not beside the package")
@unittest.skipIf(numpy is None, "NumPy is not installed")
class Serving(unittest.TestCase):
    def ran(self, program: str, *arguments: str) -> Tuple[int, str, str]:
        """Its code and what it says; nothing of it is left then."""
        # The package that the tests themselves have.
        path = os.pathsep.join([str(Path(crossdock.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(FOLDER / program), *arguments],
            env={**script_environment(), "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=3 * TIMEOUT)
            self.assertTrue(is_gone(process.pid), "a process of the example is left")
        finally:
            if not is_gone(process.pid, 0):
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return process.returncode, out, err

    def test_pages_between_sides_that_are_spread_differently(self) -> None:
        scenes = {"gqa:1:2": 2, "gqa:2:1": 1, "mla:1:2": 2, "mla:2:1": 1}
        given = [word for scene in scenes for word in ("--scene", scene)]
        code, out, err = self.ran("main.py", *given, "--requests", "3", "--new-tokens", "6")
        self.assertEqual((code, err), (0, ""), out)
        # 5, 40 and 17 tokens in pages of 4, four layers, once for each rank of the decode side.
        moved = (2 + 10 + 5) * 4
        lines = [line.split() for line in out.splitlines()[1 : 1 + len(scenes)]]
        told = [(int(line[-3]), line[-1]) for line in lines]
        self.assertEqual(told, [(ranks * moved, "yes") for ranks in scenes.values()])

    def test_a_child_that_fails_is_told_in_its_words(self) -> None:
        code, _, err = self.ran("main.py", "--scene", "gqa:1:3")
        self.assertEqual(code, 1)
        self.assertRegex(err, r"(?s)RuntimeError: decode-\d failed:.*crossdock\.errors\.LayoutError")

    def test_experts(self) -> None:
        code, out, err = self.ran("experts.py", "--new-tokens", "4")
        self.assertEqual((code, err), (0, ""), out)
        self.assertEqual([line.split()[-1] for line in out.splitlines()[1:5]], ["yes"] * 4)


def is_gone(group: int, within: float = TIMEOUT) -> bool:
    """Whether no process of a group is left, within so many seconds: Python's own helpers end a moment later."""
    deadline = time.monotonic() + within
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)


if __name__ == "__main__":
    unittest.main()
