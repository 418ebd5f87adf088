"""The host's memory allocator, set for programs that compute on a CPU."""

import ctypes
import importlib.util
import os
import platform

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_TOP_PAD_BYTES = 1 << 28
# What a user has set is left alone.
_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_")


def keep_freed_memory() -> bool:
    """Has the C library keep memory that was freed for the next array, where that is faster.

    XLA frees the arrays of a program on a CPU when it ends. Large ones go back to the system, and
    the next program's come from there page by page: a third of the time of decoding 64 prompts on
    two cores. Threads then share one heap, which programs of few large arrays do not notice.

    It is for inference, whose calls are alike. Kept memory that no later array fits into is lost: a
    training step with arrays of many sizes grew from 5 to 13 GiB, so that train.py does without,
    though it was half as fast again.

    It is for processes whose JAX computes on a CPU, and must come before JAX first uses a device,
    whose threads make heaps of their own. It does nothing where there is an accelerator, the C
    library is not GNU's, or the environment sets the allocator.

    Returns:
      whether it did anything.
    """
    if any(name.startswith(_SETTINGS) for name in os.environ):
        return False
    if platform.libc_ver()[0] != "glibc" or not _is_on_cpu():
        return False
    library = ctypes.CDLL(None)
    settings = (
        (_M_ARENA_MAX, 1),
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, -1),
        (_M_TOP_PAD, _TOP_PAD_BYTES),
    )
    return all(library.mallopt(name, value) == 1 for name, value in settings)


def _is_on_cpu() -> bool:
    """True if JAX will compute on a CPU, as far as that is known before it starts."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
