"""`python -m crossdock.nixl PROGRAM.py ...` or `-m MODULE ...` runs a program for which, and for whose child processes,
`nixl` is this package."""

from __future__ import annotations

import os
import runpy
import sys

from crossdock import nixl

_USAGE = "usage: python -m crossdock.nixl PROGRAM.py [ARGUMENT...] | -m MODULE [ARGUMENT...] | --path"


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments == ["-m"]:
        sys.exit(_USAGE)
    if arguments == ["--path"]:
        print(nixl.alias_path())
        return
    nixl.install()
    paths = [nixl.alias_path(), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
