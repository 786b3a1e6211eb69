"""What the oldest Python that is promised can read."""

import ast
import unittest
from pathlib import Path

import crossdock

OLDEST = (3, 9)


class Syntax(unittest.TestCase):
    def test_the_oldest_python_reads_every_file(self) -> None:
        files = sorted(Path(crossdock.__file__).parent.rglob("*.py"))
        self.assertGreater(len(files), 20)
        for file in files:
            with self.subTest(file=file.name):
                ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=OLDEST)


if __name__ == "__main__":
    unittest.main()
