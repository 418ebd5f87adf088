"""Trains a model; the same command again continues a run that stopped.

python train.py --config configs/demo.py --workdir runs/demo [--config.SECTION.KEY=VALUE ...]
"""

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sam_jax.checkpoint import CheckpointConfig, save_config
from sam_jax.configuration import from_mapping
from sam_jax.data.pipeline import DataConfig, train_iterator
from sam_jax.errors import readable_errors
from sam_jax.evaluation.run import EvalConfig, Evaluator
from sam_jax.losses import LossConfig
from sam_jax.models.variants import ModelConfig, build_model
from sam_jax.prompts import PromptConfig
from sam_jax.sharding import ShardingConfig, start_devices
from sam_jax.training import loop
from sam_jax.training.optimizer import OptimizerConfig

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints and logs.", required=True)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other hosts of a cluster.")
flags.mark_flag_as_required("config")


@readable_errors()
def main(argv: list[str]) -> None:
    """Trains as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value.to_dict()
    sharding = from_mapping(ShardingConfig, config["sharding"], "sharding")
    start_devices(sharding, is_distributed=DISTRIBUTED.value)
    model = build_model(from_mapping(ModelConfig, config["model"], "model"))
    data = from_mapping(DataConfig, {**config["data"], "image_size": model.image_size}, "data")
    evals = {n: from_mapping(EvalConfig, e, f"evals.{n}") for n, e in config["evals"].items()}
    save_config(WORKDIR.value, config)
    loop.train(
        workdir=WORKDIR.value,
        model=model,
        data_iterator=train_iterator(
            data, process_index=jax.process_index(), process_count=jax.process_count()
        ),
        config=from_mapping(loop.TrainConfig, config["train"], "train"),
        optimizer_config=from_mapping(OptimizerConfig, config["optimizer"], "optimizer"),
        prompt_config=from_mapping(PromptConfig, config["prompts"], "prompts"),
        loss_config=from_mapping(LossConfig, config["losses"], "losses"),
        sharding_config=sharding,
        checkpoint_config=from_mapping(CheckpointConfig, config["checkpoint"], "checkpoint"),
        evaluators={name: Evaluator(model, evaluation) for name, evaluation in evals.items()},
    )


if __name__ == "__main__":
    # What is wrong with a flag or a --config.key is a message, too.
    app.run(main, flags_parser=readable_errors(AttributeError)(app.parse_flags_with_usage))
