"""With the folder above this one in PYTHONPATH, `mooncake.engine` is `crossdock.mooncake`."""

from crossdock.mooncake import install

install()
