"""Cost of a training run on devices that need not be there, by compiling its real step."""

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from sam_jax import hlo
from sam_jax.errors import ConfigError, UserError
from sam_jax.training.compiled_step import CompiledStep
from sam_jax.training.experiment import Experiment

LOCAL = "local"
# Fraction of the peak at which each of our kernels does the operations it declares, by the schedule
# of its instructions (benchmarks/kernels.py); the compiler's estimates of whole programs leave
# kernels out. First on a v5e and each of a v5p's two cores, then on a v6e, whose matrix products
# are three times as fast and all else hardly. Losses and norms are no matrix products.
KERNEL_PEAK_RATES = {
    "window_attention": (0.097, 0.026),
    "window_attention_backward": (0.106, 0.035),
    "norm_partition": (0.032, 0.010),
    "norm_partition_backward": (0.014, 0.005),
    "unpartition_add_norm": (0.027, 0.008),
    "unpartition_add_norm_backward": (0.015, 0.004),
    # On a v6e counting took too long: a third is assumed, as others have.
    "flash_attention": (0.36, 0.12),
    "flash_attention_keys_backward": (0.47, 0.16),
    "flash_attention_queries_backward": (0.48, 0.16),
    "mask_embedding": (0.068, 0.023),
    "mask_embedding_backward": (0.111, 0.036),
    "token_to_image_attention": (0.75, 0.31),
    # Assumed on a v5e, where its instructions alone, without stalls, give more than the peak.
    "token_to_image_attention_backward": (0.90, 0.48),
    "image_to_token_attention": (0.42, 0.13),
    "image_to_token_attention_backward": (0.51, 0.19),
    "predict_masks": (0.73, 0.25),
    "predict_masks_backward": (0.74, 0.34),
    "mask_statistics": (0.020, 0.005),
    "mask_statistics_backward": (0.032, 0.008),
}
_OTHER_KERNELS_PEAK_RATES = (0.1, 0.03)
# Parts of a step by a word in the source of their instructions; the first word found counts.
_PARTS = {
    "image_encoder": "image encoder",
    "pixel_decoder": "pixel decoder",
    "prompt_encoder": "prompt encoder",
    "mask_decoder": "mask decoder",
    "rounds": "losses, clicks",
    "": "optimizer, others",
}
# Fraction of a device's memory that the runtime keeps for itself.
_RESERVED_RATE = 0.03


@dataclasses.dataclass(frozen=True)
class Chip:
    """Hardware of one device of a slice, from its vendor's public specification.

    Attributes:
      name: as in a topology.
      memory_bytes: HBM.
      peak_flops: matrix products in bfloat16, per second.
      memory_rate: bytes of HBM per second.
      link_rate: bytes per second that it can send to other devices, all links together.
      clock_rate: cycles per second, in which the compiler counts; None if it is not published.
      core: which of ``KERNEL_PEAK_RATES`` is for its cores.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    memory_rate: float
    link_rate: float
    clock_rate: float | None
    core: int = 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 16 * 2**30, 197e12, 819e9, 200e9, 1.5e9),
        Chip("v5p", 95 * 2**30, 459e12, 2765e9, 600e9, 1.75e9),
        # Its clock rate is derived from the peak.
        Chip("v6e", 32 * 2**30, 918e12, 1640e9, 448e9, 1.75e9, core=1),
    )
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
      params, ema, optimizer, constants, batch: arguments of the step, exactly.
      working: set aside by the compiler for activations, gradients and the like.
      program: the code itself.
      available: memory of a device for them; None if it is not known.
    """

    params: int
    ema: int
    optimizer: int
    constants: int
    batch: int
    working: int
    program: int
    available: float | None

    @property
    def total(self) -> int:
        """Bytes in all, at the peak."""
        state = self.divided + self.constants
        return state + self.batch + self.working + self.program

    @property
    def divided(self) -> int:
        """Bytes that shrink with the number of devices that share a copy of the state."""
        return self.params + self.ema + self.optimizer

    @property
    def fits(self) -> bool | None:
        """True if a device has enough memory; None if that is not known."""
        return None if self.available is None else self.total <= self.available


@dataclasses.dataclass(frozen=True)
class Plan:
    """Cost report of one compiled training step.

    Attributes:
      topology: the devices, as asked for.
      num_devices, mesh: how many, and how they are arranged.
      batch_size: images of a step on all devices.
      remat: of the encoder's blocks.
      memory: per device.
      work_flops: FLOPs of the step, per device, counted by hand and without recomputation.
      moved_bytes: bytes of device memory that the compiled step reads and writes, per device.
      collectives: transfers of a step.
      part_seconds: seconds of computation in each part, by the compiler's estimate, and our own for
        our kernels; None without an estimate.
      roofline_seconds: ``work_flops`` at the device's peak, None without a known device.
      transfer_seconds: all collectives one after the other, None without a known device.
      num_steps: of the whole run.
      compile_seconds: how long compiling took.
    """

    topology: str
    num_devices: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    memory: Memory
    work_flops: float
    moved_bytes: float
    collectives: Sequence[hlo.Collective]
    part_seconds: Mapping[str, float] | None
    roofline_seconds: float | None
    transfer_seconds: float | None
    num_steps: int
    compile_seconds: float

    @property
    def compute_seconds(self) -> float | None:
        """Seconds of computation in all parts of a step; None without an estimate."""
        return None if self.part_seconds is None else sum(self.part_seconds.values())

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """Seconds of a step with all transfers hidden behind the computation, and with none."""
        if self.compute_seconds is None or self.transfer_seconds is None:
            return None
        hidden = max(self.compute_seconds, self.transfer_seconds)
        return hidden, self.compute_seconds + self.transfer_seconds

    @property
    def run_hours(self) -> tuple[float, float] | None:
        """Least and most hours of all steps, without evaluation, checkpoints and waits for data."""
        if self.step_seconds is None:
            return None
        low, high = (seconds * self.num_steps / 3600 for seconds in self.step_seconds)
        return low, high

    @property
    def device_hours(self) -> tuple[float, float] | None:
        """Least and most hours of the run, times its devices."""
        if self.run_hours is None:
            return None
        low, high = (hours * self.num_devices for hours in self.run_hours)
        return low, high

    @property
    def mfu(self) -> tuple[float, float] | None:
        """Model FLOPs utilisation: the work's share of what the devices could do meanwhile."""
        if self.step_seconds is None or self.roofline_seconds is None:
            return None
        low, high = self.step_seconds
        peak_seconds = self.roofline_seconds
        return peak_seconds / high, peak_seconds / low

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends in a step."""
        return sum(c.sent_bytes for c in self.collectives)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        memory = dataclasses.asdict(self.memory) | {
            "total": self.memory.total,
            "fits": self.memory.fits,
        }
        return dataclasses.asdict(self) | {
            "memory": memory,
            "compute_seconds": self.compute_seconds,
            "step_seconds": self.step_seconds,
            "run_hours": self.run_hours,
            "chip_hours": self.device_hours,
            "mfu": self.mfu,
            "sent_bytes": self.sent_bytes,
        }


class TopologyError(UserError):
    """The devices of a plan cannot be described here."""


def devices_of(topology: str) -> tuple[Sequence[Any], Chip | None]:
    """The devices that a topology names, and what they are; those of this machine for "local".

    Raises:
      TopologyError: if the name is none, or the TPU compiler is not installed.
    """
    if topology == LOCAL:
        return jax.devices(), None
    name, _, arrangement = topology.partition(":")
    if name not in CHIPS or not arrangement:
        raise TopologyError(
            f"--topology {topology}: expected {LOCAL!r}, or a TPU and how its chips are arranged, "
            f"as in v5e:16x16 or v5p:4x4x4; the TPUs are {', '.join(CHIPS)}"
        )
    # No TPU is here: do not look for one, and share the compiler with other programs. Which host
    # is named does not matter, but naming one keeps the compiler quiet.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    }.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if math.prod(int(n) for n in arrangement.split("x") if n.isdigit()) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:
        # Any exception: the compiler's library raises types of its own.
        missing = "not installed" in str(error)
        hint = "the TPU compiler is missing: pip install 'sam-jax[tpu]'" if missing else str(error)
        raise TopologyError(f"--topology {topology}: {hint}") from error
    return described.devices, CHIPS[name]


def plan(experiment: Experiment, topology: str = LOCAL, *, batch_size: int | None = None) -> Plan:
    """Compiles an experiment's training step for devices and reads what it will cost there.

    Args:
      experiment: the whole training.
      topology: see ``devices_of``.
      batch_size: images of a step; by default the experiment's.

    Raises:
      ConfigError: if the experiment does not fit the devices.
      TopologyError: see ``devices_of``.
    """
    devices, chip = devices_of(topology)
    compiled_step = experiment.compiled_step(devices)
    batch_size = batch_size or experiment.data.batch_size
    compiled_step.check_batch(batch_size)
    batch = compiled_step.placed_batch(batch_size)
    start = time.perf_counter()
    try:
        compiled = compiled_step.step.lower(compiled_step.placed_state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "hbm" not in str(error).lower():
            raise
        first = next(line for line in str(error).splitlines() if line.strip())
        raise ConfigError(f"it does not fit the devices' memory: {first}") from error
    compile_seconds = time.perf_counter() - start
    return _read(experiment, topology, chip, compiled_step, batch, compiled, compile_seconds)


def _read(
    experiment: Experiment,
    topology: str,
    chip: Chip | None,
    compiled_step: CompiledStep,
    batch: dict[str, Any],
    compiled: Any,
    compile_seconds: float,
) -> Plan:
    batch_size, num_devices = jax.tree.leaves(batch)[0].shape[0], compiled_step.mesh.size
    text = compiled.as_text()
    instructions = list(hlo.instructions(text))
    transfers = hlo.collectives(text)
    flops = compiled_step.task.flops(batch_size, compiled_step.trained)
    if chip is None:
        chip = _measured_chip(compiled_step)
    memory = _memory(compiled_step, batch, compiled, chip)
    transfer = sum(c.sent_bytes for c in transfers) / chip.link_rate if chip.link_rate else None
    return Plan(
        topology=topology,
        num_devices=num_devices,
        mesh=dict(compiled_step.mesh.shape),
        batch_size=batch_size,
        remat=compiled_step.task.remat,
        memory=memory,
        work_flops=flops / num_devices,
        moved_bytes=float(sum(i.moved_bytes * i.trips for i in instructions)),
        collectives=transfers,
        part_seconds=part_seconds(instructions, chip),
        roofline_seconds=flops / num_devices / chip.peak_flops,
        transfer_seconds=transfer,
        num_steps=experiment.train.num_steps,
        compile_seconds=compile_seconds,
    )


def part_seconds(instructions: Sequence[hlo.Instruction], chip: Chip) -> dict[str, float] | None:
    """Seconds of each part of the step, by its instructions' source; None without a clock rate."""
    if chip.clock_rate is None:
        return None
    parts = [
        next(part for word, part in _PARTS.items() if word in instruction.source)
        for instruction in instructions
    ]
    # A step has some of the parts only, by its task.
    seconds = {part: 0.0 for part in _PARTS.values() if part in parts}
    for instruction, part in zip(instructions, parts, strict=True):
        rates = KERNEL_PEAK_RATES.get(instruction.kernel_name, _OTHER_KERNELS_PEAK_RATES)
        once = instruction.cycles / chip.clock_rate
        if instruction.is_kernel:
            moving = instruction.moved_bytes / chip.memory_rate
            once += max(instruction.kernel_flops / (rates[chip.core] * chip.peak_flops), moving)
        seconds[part] += instruction.trips * once
    return seconds


def _measured_chip(compiled_step: CompiledStep) -> Chip:
    """A device of this machine, with the memory it reports and its measured rate of products."""
    device = compiled_step.mesh.devices.flat[0]
    stats = device.memory_stats() or {}
    size = 2048 if device.platform == "cpu" else 8192
    matrix = jax.device_put(jnp.ones((size, size), compiled_step.task.dtype), device)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        seconds.append(time.perf_counter() - start)
    peak = 2 * size**3 / min(seconds)
    # Devices that one CPU poses as share its cores.
    share = compiled_step.mesh.size if device.platform == "cpu" else 1
    return Chip(
        device.device_kind, stats.get("bytes_limit") or math.inf, peak / share, 0.0, 0.0, None
    )


def _memory(compiled_step: CompiledStep, batch: Any, compiled: Any, chip: Chip) -> Memory:
    planned = compiled.memory_analysis()
    state = compiled_step.placed_state
    return Memory(
        params=_bytes_on_a_device(state.params),
        ema=_bytes_on_a_device(state.ema_params),
        optimizer=_bytes_on_a_device(state.opt_state),
        constants=_bytes_on_a_device((state.constants, state.step)),
        batch=_bytes_on_a_device(batch),
        working=planned.temp_size_in_bytes
        + max(planned.output_size_in_bytes - planned.alias_size_in_bytes, 0),
        program=planned.generated_code_size_in_bytes,
        available=None
        if math.isinf(chip.memory_bytes)
        else chip.memory_bytes * (1 - _RESERVED_RATE),
    )


def _bytes_on_a_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def fewest_devices(made: Plan) -> int | None:
    """The fewest devices that hold the state between them, with as many images on each as planned.

    Pieces are halves, quarters, and so on. None if not even all of them suffice, or memory is not
    known.
    """
    memory = made.memory
    if memory.available is None:
        return None
    pieces = made.mesh["fsdp"]
    state = memory.divided * pieces
    rest = memory.total - memory.divided
    count = 1
    while state / count + rest > memory.available:
        count *= 2
        if count > 2**14:
            return None
    return count * made.mesh["tensor"]


def largest_batch(made: Plan) -> int | None:
    """Largest batch that should fit, if working memory grows in proportion to it.

    A guess on the safe side: part of it does not grow. None if memory is not known.
    """
    memory = made.memory
    if memory.available is None:
        return None
    images = made.batch_size * made.mesh["tensor"] / made.num_devices
    growing = (memory.working + memory.batch) / images
    free = memory.available - (memory.total - memory.working - memory.batch)
    return max(int(free // growing), 0) * made.num_devices // made.mesh["tensor"]


def write_json(plans: Sequence[Plan], path: Path) -> None:
    """Writes plans as a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([made.as_dict() for made in plans], indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def print_plans(plans: Sequence[Plan], console: Console | None = None) -> None:
    """Prints plans beside each other, and what the estimates rest on."""
    console = console or Console(highlight=False)
    first = plans[0]
    table = Table(title=f"a training step on {first.num_devices} devices ({first.topology})")
    table.add_column("")
    for made in plans:
        table.add_column(f"batch {made.batch_size}, remat {made.remat}", justify="right")
    rows = [(heading, [cell(made) for made in plans]) for heading, cell in _ROWS]
    for heading, cells in rows:
        if any(cells):
            table.add_row(heading, *cells)
    console.print(table)
    for made in plans:
        console.print(_transfer_table(made))
    console.print(
        "Memory is the compiler's. Computation is the sum of its estimated cycles, loops by their "
        "trips, and for our own kernels, which it counts for nothing, what their instructions "
        "take, or their memory if that is more. Transfers are what must be sent at the links' full "
        "rate; the step's range has them all hidden, or none. MFU counts products by hand, nothing "
        "twice, no padding. Input, evaluation and checkpoints are left out. None of it was "
        "measured on a device.",
        style="dim",
    )


def _transfer_table(made: Plan) -> Table:
    table = Table(title=f"transfers of a step, batch {made.batch_size}, remat {made.remat}")
    for heading in ("kind", "count", "each", "among", "sent by a device"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    shown = made.collectives[:12]
    for c in shown:
        group = "" if c.group_size is None else str(c.group_size)
        table.add_row(c.kind, str(c.count), _size(c.num_bytes), group, _size(c.sent_bytes))
    if rest := made.collectives[12:]:
        count, sent = sum(c.count for c in rest), sum(c.sent_bytes for c in rest)
        table.add_row("others", str(count), "", "", _size(sent))
    return table


def _range(pair: tuple[float, float] | None, text: str) -> str:
    if pair is None:
        return "not known"
    low, high = (text.format(x) for x in pair)
    return low if low == high else f"{low} to {high}"


def _size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return "not known"
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def _seconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{1e3 * seconds:.0f} ms"


def _seconds_of(part: str, made: Plan) -> str:
    if made.part_seconds is None:
        return _seconds(None)
    return _seconds(made.part_seconds[part]) if part in made.part_seconds else ""


def _fits(made: Plan) -> str:
    return {True: "yes", False: "NO", None: "not known"}[made.memory.fits]


def _count(number: int | None) -> str:
    return "not known" if number is None else f"about {number}"


_ROWS: tuple[tuple[str, Callable[[Plan], str]], ...] = (
    ("mesh", lambda p: " x ".join(f"{axis} {size}" for axis, size in p.mesh.items())),
    ("parameters, per device", lambda p: _size(p.memory.params)),
    ("average of parameters", lambda p: _size(p.memory.ema)),
    ("optimizer", lambda p: _size(p.memory.optimizer)),
    ("batch", lambda p: _size(p.memory.batch)),
    ("activations, gradients", lambda p: _size(p.memory.working)),
    ("program", lambda p: _size(p.memory.program)),
    ("peak of all", lambda p: _size(p.memory.total)),
    ("a device has", lambda p: _size(p.memory.available)),
    ("fits", _fits),
    ("largest batch", lambda p: _count(largest_batch(p))),
    ("fewest devices", lambda p: _count(fewest_devices(p))),
    ("products, per device", lambda p: f"{p.work_flops / 1e12:.2f} TFLOP"),
    ("memory moved", lambda p: _size(p.moved_bytes)),
    ("sent to others", lambda p: _size(p.sent_bytes)),
    ("products at the peak", lambda p: _seconds(p.roofline_seconds)),
    ("computation", lambda p: _seconds(p.compute_seconds)),
    *((f"  {part}", functools.partial(_seconds_of, part)) for part in _PARTS.values()),
    ("transfers", lambda p: _seconds(p.transfer_seconds)),
    ("step", lambda p: _range(p.step_seconds, "{:.3f} s")),
    ("MFU", lambda p: _range(p.mfu, "{:.1%}")),
    ("steps of the run", lambda p: f"{p.num_steps:,}"),
    ("hours", lambda p: _range(p.run_hours, "{:.1f}")),
    (
        "device hours",
        lambda p: _range(p.device_hours, "{:,.0f}"),
    ),
    ("compiled in", lambda p: f"{p.compile_seconds:.0f} s"),
)
