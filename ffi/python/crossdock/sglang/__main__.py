"""`python -m crossdock.sglang [ARGUMENT...]`: SGLang's server, with crossdock among its transfer backends."""

import runpy

# As a module of its own, and not this one: processes that SGLang spawns import the main module again, but no
# `__main__.py`.
runpy.run_module("crossdock.sglang.launch", run_name="__main__", alter_sys=True)
