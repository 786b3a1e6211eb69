"""Workers for the tests, over a small cache whose bytes can be told from each other."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
import unittest
from pathlib import Path
from types import TracebackType
from typing import Any, Iterable, List, Optional, Sequence, Type

SOURCE = Path(__file__).resolve().parents[1]

try:
    import crossdock
except ImportError:
    # Not installed: the one beside the tests, for which dev.py has made the native part.
    sys.path.insert(0, str(SOURCE))
    import crossdock


# Set for programs that tests start.
SCRIPT = "CROSSDOCK_TEST_SCRIPT"


def imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        if not os.environ.get(SCRIPT):
            print(f"{name} is not installed: its tests are skipped", file=sys.stderr)
        return None


numpy = imported("numpy")
torch = imported("torch")

KEY = b"a key that all nodes share, 32 b"
LAYERS = 4
PAGE_TOKENS = 16
PAGES = 64
TIMEOUT = 20.0


def small_layout(**options: Any) -> crossdock.Layout:
    usual = dict(
        model_layers=LAYERS,
        kind="mla",
        latent_bytes=48,
        rope_bytes=16,
        dtype="bf16",
        page_tokens=PAGE_TOKENS,
        pages=PAGES,
    )
    return crossdock.Layout("small", **{**usual, **options})


class Case(unittest.TestCase):
    def entered(self, manager: Any) -> Any:
        """What a `with` block around the rest of the test would have."""
        entered = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return entered

    def connected(self, **options: Any) -> None:
        """Two workers, `self.prefill` and `self.decode`, of which the second has dialed the first as `self.peer`."""
        self.prefill = self.entered(Worker("prefill", **options))
        self.decode = self.entered(Worker("decode", **options))
        self.prefill.fill(1)
        self.decode.fill(2)
        self.peer = self.decode.node.connect(self.prefill.node.address)
        self.peer.wait(TIMEOUT)


class Worker:
    """A node with what belongs to it. Everything is closed at the end of a `with` block."""

    def __init__(
        self,
        name: str,
        layout: Optional[crossdock.Layout] = None,
        memory: Optional[Sequence[crossdock.Memory]] = None,
        pools: Optional[Sequence[crossdock.Pool]] = None,
        **options: Any,
    ) -> None:
        self.layout = layout or small_layout()
        regions = range(self.layout.regions)
        self.memory = list(memory or (crossdock.Memory(self.layout.region_bytes(region)) for region in regions))
        self.pools = list(pools or [crossdock.Pool(self.layout)])
        self.node = crossdock.Node(name, self.layout, self.memory, self.pools, key=KEY, **options)
        # Kept: a view of Python is made for each access otherwise.
        self.views = [memory.view for memory in self.memory]

    @property
    def pool(self) -> crossdock.Pool:
        return self.pools[0]

    def page(self, layer: int, page: int, *, part: int = 0, pool: int = 0) -> memoryview:
        place = self.layout.find(layer, part=part, pool=pool)
        begin = place.offset + page * place.stride_bytes
        return self.views[place.region][begin : begin + place.page_bytes]

    def fill(self, seed: int) -> None:
        """Random bytes in all regions."""
        chosen = random.Random(seed)
        for view in self.views:
            view[:] = chosen.getrandbits(8 * len(view)).to_bytes(len(view), "little")

    def close(self) -> None:
        self.node.close()
        self.views.clear()
        for one in [*self.memory, *self.pools, self.layout]:
            one.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()


def same_pages(prefill: Worker, sources: Iterable[int], decode: Worker, targets: Iterable[int], tokens: int) -> bool:
    """Whether the tokens of a request are in both, in all layers of a plain layout."""
    token_bytes = prefill.layout.token_bytes
    for at, (source, target) in enumerate(zip(sources, targets)):
        used = min(PAGE_TOKENS, tokens - at * PAGE_TOKENS) * token_bytes
        for layer in prefill.layout.layers:
            if prefill.page(layer, source)[:used] != decode.page(layer, target)[:used]:
                return False
    return True


def page_numbers(seed: int, count: int) -> List[int]:
    return random.Random(seed).sample(range(PAGES), count)


def run_script(script: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Runs a program that imports this module."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script],
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def script_environment() -> dict[str, str]:
    here = str(Path(__file__).resolve().parent)
    return {**os.environ, SCRIPT: "1", "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
