"""Makes `crossdock/_native` from a cargo build, as maturin makes it for a wheel: for tests without one.

python ffi/python/dev.py target/debug/libcrossdock_ffi.so
"""

import sys
from pathlib import Path

import cffi
from cffi import recompiler

INIT = """__all__ = ["lib", "ffi"]

from .ffi import ffi

lib = ffi.dlopen({library!r})
"""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    library = Path(sys.argv[1]).resolve(strict=True)
    # The crate's build script leaves it in the root of the target directory.
    headers = [parent / "header.h" for parent in library.parents]
    header = next((header for header in headers if header.is_file()), None)
    if header is None:
        sys.exit(f"no header.h in any folder above {library}: build it with cargo first")
    ffi = cffi.FFI()
    ffi.cdef(header.read_text())
    native = Path(__file__).resolve().parent / "crossdock" / "_native"
    native.mkdir(exist_ok=True)
    recompiler.make_py_source(ffi, "ffi", str(native / "ffi.py"))
    (native / "__init__.py").write_text(INIT.format(library=str(library)))
    print(f"{native}: the library at {library}, with the declarations of {header}")


main()
