"""The other libraries that `transfer.py` compares with: where they are, and how they come there."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Tuple

from transfer_sides import MOONCAKE, NIXL


def peers(cache: Path, installs: bool, say: Callable[[str], None]) -> Dict[str, Tuple[str, Dict[str, str]]]:
    """By name: its Python and what its environment needs. What is not there is told."""
    found: Dict[str, Tuple[str, Dict[str, str]]] = {}
    # Without its dependencies: torch is only for tensors, which do not move here.
    nixl = ["--no-deps", f"nixl-cu12=={NIXL}", f"nixl=={NIXL}"]
    mooncake = [f"mooncake-transfer-engine-non-cuda=={MOONCAKE}"]
    for name, folder, packages, module in (
        ("nixl", cache / f"nixl-{NIXL}", nixl, "nixl._api"),
        ("mooncake", cache / f"mooncake-{MOONCAKE}", mooncake, "mooncake.engine"),
    ):
        python = folder / "bin" / "python"
        environment = borrowed_libraries(cache) if name == "mooncake" else {}

        def fails(*command: str) -> str:
            done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
            return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no words"])[-1]

        problem = ""
        if installs and not python.exists():
            say(f"installing {name}")
            pip = (str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check")
            problem = fails(sys.executable, "-m", "venv", str(folder)) or fails(*pip, "numpy") or fails(*pip, *packages)
        if not python.exists():
            problem = problem or f"it is not in {folder}; --install puts it there"
        problem = problem or fails(str(python), "-c", f"import numpy, {module}")
        if problem:
            say(f"{name} is left out: {problem}\n")
        else:
            found[name] = str(python), environment
    return found


def borrowed_libraries(cache: Path) -> Dict[str, str]:
    """Mooncake is linked with libibverbs, for TCP too. Where the system has none, the one in NIXL's package serves."""
    try:
        ctypes.CDLL("libibverbs.so.1")
        return {}
    except OSError:
        pass
    folder = cache / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    for library in cache.glob(f"nixl-{NIXL}/lib/python3*/site-packages/nixl_cu12.libs/lib*"):
        name = "libibverbs.so.1" if library.name.startswith("libibverbs-") else library.name
        if library.name.startswith(("libibverbs-", "libnl")) and not (folder / name).exists():
            (folder / name).symlink_to(library)
    return {"LD_LIBRARY_PATH": os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")]).strip(os.pathsep)}
