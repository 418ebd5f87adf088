"""Evaluates a run: python eval.py --config configs/demo.py --checkpoint runs/demo [--out FOLDER].

Runs every evaluation of the config's section `evals`, by the code that training calls, prints the
scores and writes them, curves and examples to a folder for each.
"""

from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from PIL import Image

from sam_jax.checkpoint import restore_variables
from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError, readable_errors
from sam_jax.evaluation.run import EvalConfig, Evaluator
from sam_jax.models.variants import ModelConfig, build_model

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The run's --workdir.", required=True)
STEP = flags.DEFINE_integer("step", None, "Which checkpoint of the run; by default the newest.")
OUT = flags.DEFINE_string("out", None, "Folder for the results; by default `eval` in the run's.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other hosts of a cluster.")
flags.mark_flag_as_required("config")


@readable_errors()
def main(argv: list[str]) -> None:
    """Evaluates as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    config = CONFIG.value.to_dict()
    if not config["evals"]:
        raise ConfigError("config.evals is empty: there is nothing to evaluate on")
    model = build_model(from_mapping(ModelConfig, config["model"], "model"))
    evaluators = {
        name: Evaluator(
            model, from_mapping(EvalConfig, section, f"evals.{name}"), show_progress=True
        )
        for name, section in config["evals"].items()
    }
    variables = restore_variables(CHECKPOINT.value, STEP.value)
    for name, evaluate in evaluators.items():
        report = evaluate(variables)
        if jax.process_index() > 0:
            continue
        folder = Path(OUT.value or Path(CHECKPOINT.value) / "eval") / name
        report.print_table()
        report.write_json(folder / "report.json")
        for title, picture in report.pictures.items():
            Image.fromarray(picture).save(folder / f"{title}.png")


if __name__ == "__main__":
    app.run(main)
