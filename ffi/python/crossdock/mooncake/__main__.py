"""`python -m crossdock.mooncake PROGRAM.py ...` or `-m MODULE ...` runs a program for which, and for whose child processes,
`mooncake.engine` is this package."""

from crossdock import _program, mooncake

if __name__ == "__main__":
    _program.run("crossdock.mooncake", mooncake.install, mooncake.alias_path())
