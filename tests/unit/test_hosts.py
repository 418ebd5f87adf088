"""Flags that say where the other processes of a run are."""

import pytest

from sam_jax.errors import ConfigError
from sam_jax.hosts import HostsConfig


@pytest.mark.parametrize(
    ("coordinator", "process", "message"),
    [
        ("127.0.0.1:1", None, "come together"),
        (None, "0/2", "come together"),
        ("127.0.0.1:1", "2/2", "expected I/N"),
        ("127.0.0.1:1", "two", "expected I/N"),
    ],
)
def test_what_is_missing_is_named(
    coordinator: str | None, process: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        HostsConfig.of_flags(False, coordinator, process)


def test_what_flags_say() -> None:
    assert HostsConfig.of_flags(True, None, None) == HostsConfig(True)
    assert HostsConfig.of_flags(False, None, None) == HostsConfig(False)
    found = HostsConfig.of_flags(False, "127.0.0.1:1", "1/2")
    assert found == HostsConfig(True, "127.0.0.1:1", 2, 1)
