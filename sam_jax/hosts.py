"""The processes of a run: one for each host, or several on one."""

import dataclasses
import functools
import json
import platform
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam_jax.errors import ConfigError, UserError

# A process that is silent for so long is taken for dead, and all others end.
HEARTBEAT_TIMEOUT_SECONDS = 30
# Hosts of a large job come up minutes apart.
JOIN_TIMEOUT_SECONDS = 300


class HostsError(UserError):
    """The other processes of the run cannot be reached."""


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Processes of a distributed run, and where they meet.

    With ``distributed`` alone they come from the scheduler's environment: Slurm, Open MPI, Cloud
    TPU, TPUs of GKE.

    Attributes:
      distributed: whether there are others.
      coordinator: HOST:PORT of the first process, where all meet; None leaves it to the scheduler.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      join_timeout_seconds: how long to wait for all of them at the start.
    """

    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    join_timeout_seconds: int = JOIN_TIMEOUT_SECONDS

    @classmethod
    def of_flags(cls, distributed: bool, coordinator: str | None, process: str | None):
        """The config of a program's flags; ``process`` is I/N, this process and how many there are.

        Raises:
          ConfigError: if one of the two that belong together is missing, or ``process`` is no I/N.
        """
        if coordinator is None and process is None:
            return cls(distributed)
        if coordinator is None or process is None:
            raise ConfigError("--coordinator=HOST:PORT and --process=I/N come together")
        found = re.fullmatch(r"(\d+)/(\d+)", process)
        if not found or int(found[1]) >= int(found[2]):
            raise ConfigError(
                f"--process={process}: expected I/N, this process from 0 and how many there are"
            )
        return cls(True, coordinator, int(found[2]), int(found[1]))


def start_devices(hosts: HostsConfig, cpu_devices: int | None = None) -> None:
    """Splits the CPU into devices and joins the run's other processes.

    Must come before JAX's first use of a device.

    Raises:
      HostsError: if nothing says where the others are, or not all came in time.
    """
    if cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if not hosts.distributed:
        return
    # It would take SIGTERM from the run, which has its own way to agree on it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.num_processes,
            hosts.process_id,
            initialization_timeout=hosts.join_timeout_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise HostsError(
            f"the other processes were not found: {error}\nWhere no scheduler names "
            "them, --coordinator=HOST:PORT --process=I/N does."
        ) from error


def is_first() -> bool:
    """True in the process that logs and writes files for all."""
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """Values of JSON of all processes, in their order; all must call together."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(mine.size)).reshape(-1)
    padded = np.pad(mine, (0, int(lengths.max()) - mine.size))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths.tolist(), strict=True)]


@functools.cache
def host_names() -> tuple[str, ...]:
    """Names of all processes' hosts, in their order; the first call is by all together."""
    return tuple(gathered(platform.node()))
