"""Trains a model: python train.py --config configs/demo.py --workdir runs/demo [--config.X.Y=Z].

The same command again continues a run that stopped.
"""

# ruff: noqa: E402 - signals count while JAX is imported, which takes seconds
from sam_jax.training.stop_signals import StopSignals

STOP_SIGNALS = StopSignals(catches=__name__ == "__main__")

import contextlib

import jax
from absl import app, flags, logging

from configs import command_line
from sam_jax.checkpoint import CheckpointConfig
from sam_jax.configuration import from_mapping
from sam_jax.errors import readable_errors
from sam_jax.evaluation.run import build_evaluators
from sam_jax.hosts import HostsConfig, start_devices
from sam_jax.training import loop
from sam_jax.training.experiment import Experiment

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints and logs.", required=True)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the others, as the scheduler says.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if none says so.")
PROCESS = flags.DEFINE_string("process", None, "I/N: which process of how many, with coordinator.")
flags.mark_flag_as_required("config")


@readable_errors()
def main(argv: list[str]) -> None:
    """Trains as the flags say."""
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    config = command_line.sections()
    experiment = Experiment.of(config)
    hosts = HostsConfig.of_flags(DISTRIBUTED.value, COORDINATOR.value, PROCESS.value)
    start_devices(hosts, experiment.sharding.cpu_devices)
    evals = build_evaluators(config["evals"], experiment.task.model, kernels=experiment.kernels)
    data = experiment.data_iterator(jax.process_index(), jax.process_count())
    with contextlib.closing(data):  # which says what of the data was left out
        loop.train(
            workdir=WORKDIR.value,
            compiled_step=experiment.compiled_step(),
            config=experiment.train,
            batch_size=experiment.data.batch_size,
            data_iterator=data,
            checkpoint_config=from_mapping(CheckpointConfig, config["checkpoint"], "checkpoint"),
            evaluators=evals,
            sections=config,
            stage=experiment.stage(),
            stop_signals=STOP_SIGNALS,
        )


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
