"""SGLang's server, in which this process and all that it spawns know crossdock."""

import os
import runpy

from crossdock.sglang import install

# After 30 seconds SGLang would hand the pages of a failed request out, whether or not a peer can write them still. Here
# they are home when nobody can, which may be later only where a peer stands still.
os.environ.setdefault("SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT", "1000000000")
# Not below the guard: a spawned process imports this module under another name, before anything of SGLang.
install()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
