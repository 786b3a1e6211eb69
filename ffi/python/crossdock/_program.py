"""Runs a program that was written for another library, in which that library's name means a module of this package."""

from __future__ import annotations

import os
import runpy
import sys
from typing import Callable


def run(module: str, install: Callable[[], None], alias: str) -> None:
    """`python -m MODULE PROGRAM.py [ARGUMENT...]`, `-m MODULE [ARGUMENT...]` or `--path`. `alias` is a folder in which the other
    library's name is this package: child processes find it there, however they are started."""
    arguments = sys.argv[1:]
    if not arguments or arguments == ["-m"]:
        sys.exit(f"usage: python -m {module} PROGRAM.py [ARGUMENT...] | -m MODULE [ARGUMENT...] | --path")
    if arguments == ["--path"]:
        print(alias)
        return
    install()
    os.environ["PYTHONPATH"] = os.pathsep.join([alias, *filter(None, [os.environ.get("PYTHONPATH")])])
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    # What multiprocessing spawns takes this process's path, and not the environment's.
    sys.path.insert(1, alias)
    if arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")
