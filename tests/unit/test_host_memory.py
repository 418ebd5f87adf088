"""The C library's allocator: memory that is freed stays, where nobody has said otherwise."""

import json
import platform
import subprocess
import sys

import pytest

from sam_jax import host_memory

# Pages of a large array that come anew the second time.
FAULTS = """
import json, resource, sys
from sam_jax.host_memory import keep_freed_memory
is_kept = sys.argv[1] == "kept" and keep_freed_memory()
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (1 << 26)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([is_kept, *faults]))
"""

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not GNU's"
)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("kept", [True, False])
def test_a_second_array_takes_the_memory_of_the_first(kept: bool) -> None:
    command = [sys.executable, "-c", FAULTS, "kept" if kept else "plain"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    is_kept, first, second = json.loads(said)
    num_pages = (1 << 26) // 65_536  # of the largest size that systems have by default
    assert is_kept == kept
    assert first > num_pages
    assert (second < num_pages / 4) == kept


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_ARENA_MAX", "2"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        ("JAX_PLATFORMS", "cuda"),
        ("JAX_PLATFORMS", "tpu,cpu"),
    ],
)
def test_settings_of_others_and_accelerators_are_left_alone(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*_: object) -> None:
        raise AssertionError("the allocator was set")

    monkeypatch.setattr(host_memory.ctypes, "CDLL", called)
    monkeypatch.setenv(name, value)
    assert not host_memory.keep_freed_memory()


def test_a_plugin_of_jax_means_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS")
    for found in (True, False):
        spec = object() if found else None
        monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda _, s=spec: s)
        assert host_memory._is_on_cpu() != found
