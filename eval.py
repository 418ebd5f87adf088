"""Evaluates a run: python eval.py --config configs/demo.py --checkpoint runs/demo [--out FOLDER].

Runs the evaluations of the config's section `evals`; prints and writes scores, plots, examples. The
same command again continues one that stopped. A config without a section `model` takes the
checkpoint's own.
"""

from pathlib import Path

import jax
from absl import app, flags, logging

from configs import command_line
from sam_jax.errors import ConfigError, readable_errors
from sam_jax.evaluation.report import results_folder
from sam_jax.evaluation.run import build_evaluators, model_of
from sam_jax.host_memory import keep_freed_memory
from sam_jax.hosts import HostsConfig, start_devices
from sam_jax.places import check_folder

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's --workdir, or any file or folder of weights.", required=True
)
EMA = flags.DEFINE_bool("ema", True, "The averaged parameters, where a run keeps them.")
STEP = flags.DEFINE_integer("step", None, "Which checkpoint of the run; by default the newest.")
OUT = flags.DEFINE_string("out", None, "Folder for results; by default RUN/eval or FILE_eval.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other hosts of a cluster.")
flags.mark_flag_as_required("config")


@readable_errors()
def main(argv: list[str]) -> None:
    """Evaluates as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    keep_freed_memory()
    start_devices(HostsConfig(DISTRIBUTED.value))
    config = command_line.sections()
    if not config["evals"]:
        raise ConfigError("config.evals is empty: there is nothing to evaluate on")
    model, variables, kernels = model_of(config, CHECKPOINT.value, step=STEP.value, ema=EMA.value)
    evaluators = build_evaluators(config["evals"], model, kernels=kernels, show_progress=True)
    out = Path(OUT.value or results_folder(CHECKPOINT.value))
    for name in evaluators:
        check_folder(out / name)
    variables = jax.device_put(variables)
    for name, evaluate in evaluators.items():
        report = evaluate(variables, out / name)
        if jax.process_index() == 0:
            report.print_table()


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse_flags)
