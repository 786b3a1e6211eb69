"""What the tests share that load the modules of engines: whether these can be had, and what stands in for others."""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest
from pathlib import Path
from typing import Any, Callable, Optional, Sequence


def not_installed(engine: str, needed: Sequence[str]) -> Optional[str]:
    """Which packages an engine's modules import and are not here; `None` if there is none."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)}: not installed, and {engine}'s modules need them" if missing else None


def set_up(tests: str, reason: Optional[str]) -> Callable[[], None]:
    """The `setUpModule` of a module of tests, which passes it over if there is a reason. It is said at once, too: without
    `--verbose`, unittest only counts what was passed over."""
    if reason and tests != "__main__":
        print(f"{tests}: skipped: {reason}", file=sys.stderr)

    def pass_over() -> None:
        if reason:
            raise unittest.SkipTest(reason)

    return pass_over


def stand_in(name: str, path: Optional[Path] = None, **members: Any) -> None:
    """A module with these members, and the packages around it; with a path, one whose own modules are found there."""
    module = types.ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    module.__dict__.update(members)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            stand_in(parent)
        setattr(sys.modules[parent], last, module)
