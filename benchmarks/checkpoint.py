"""Saving and restoring a config's whole training state against copying it in memory.

python -m benchmarks.checkpoint --config configs/demo.py [--folder DIR]
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import experiment, limits, report
from benchmarks.timing import Timing
from sam_jax.checkpoint import CheckpointConfig, Checkpointer
from sam_jax.data import train_iterator
from sam_jax.hosts import HostsConfig, start_devices


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times saving until the loop may go on, saving until all is written, and restoring."""
    parser = report.parser("checkpoint", __doc__)
    experiment.add_options(parser)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to time; by default a temporary one"
    )
    args = parser.parse_args(argv)
    run = experiment.load(args)
    start_devices(HostsConfig(), run.sharding.cpu_devices)
    program = run.compiled_step()
    state = program.new_state(jax.random.key(run.train.seed))
    jax.block_until_ready(state)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    iterator = train_iterator(run.data)
    waits, saves, restores = [], [], []
    for number in range(args.repeats):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            checkpointer = Checkpointer(folder, CheckpointConfig())
            start = time.perf_counter()
            checkpointer.save(dataclasses.replace(state, step=state.step + number), iterator)
            waits.append(time.perf_counter() - start)
            checkpointer.close()
            saves.append(time.perf_counter() - start)
            checkpointer = Checkpointer(folder, CheckpointConfig())
            start = time.perf_counter()
            jax.block_until_ready(checkpointer.restore(program.placed_state, iterator))
            restores.append(time.perf_counter() - start)
            checkpointer.close()
    iterator.close()
    copy = limits.host_copy_bytes_per_second() / 2
    rates = [
        report.Rate("saved bytes/s", num_bytes / min(saves), copy),
        report.Rate("restored bytes/s", num_bytes / min(restores), copy),
    ]
    facts = {
        "state_bytes": num_bytes,
        "seconds_the_loop_waits": min(waits),
        "seconds_to_restore": min(restores),
    }
    return report.publish("checkpoint", argv, args, Timing(saves), rates, facts=facts)


if __name__ == "__main__":
    main()
