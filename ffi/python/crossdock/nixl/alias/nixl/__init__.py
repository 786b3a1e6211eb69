"""With the folder above this one in PYTHONPATH, `nixl` is `crossdock.nixl`."""

from crossdock.nixl import install

install()
