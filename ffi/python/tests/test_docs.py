"""The blocks of docs/python.md, in their order, as one program."""

from __future__ import annotations

import contextlib
import io
import re
import unittest
from typing import Any, Dict, List, Tuple

from support import SOURCE, numpy, torch

PAGE = SOURCE.parents[1] / "docs" / "python.md"


def blocks() -> List[Tuple[int, str]]:
    """With the lines where they begin."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)) + 1, block.group(1)) for block in found]


@unittest.skipUnless(PAGE.is_file(), "the page is not beside the package")
class Page(unittest.TestCase):
    def test_every_block_runs(self) -> None:
        absent = [name for name, module in (("numpy", numpy), ("torch", torch)) if module is None]
        names: Dict[str, Any] = {"__name__": "page"}
        self.assertGreater(len(blocks()), 10)
        for line, block in blocks():
            if any(block.startswith(f"import {name}\n") for name in absent):
                continue
            # So that a traceback tells the line of the page.
            code = compile("\n" * (line - 1) + block, str(PAGE), "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, names)


if __name__ == "__main__":
    unittest.main()
