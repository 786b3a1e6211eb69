"""`python -m crossdock.nixl PROGRAM.py ...` or `-m MODULE ...` runs a program for which, and for whose child processes, `nixl`
is this package."""

from crossdock import _program, nixl


def main() -> None:
    _program.run("crossdock.nixl", nixl.install, nixl.alias_path())


if __name__ == "__main__":
    main()
