"""Runs a program as one of several processes on CPUs, which compile together.

JAX compiles in the first process, and the others wait for its machine code: none of them comes to
the first step so much earlier that it gives up waiting. They find it by a name into which JAX puts
the number of a CPU's process, and for which that number is nothing here.

One that is frozen is missed after a third of the time that others are given.
"""

import runpy
import sys

from jax._src import cache_key

from sam_jax import hosts

if __name__ == "__main__":
    cache_key._hash_accelerator_config = lambda *_: None  # type: ignore[assignment]
    hosts.HEARTBEAT_TIMEOUT_SECONDS = 10
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
