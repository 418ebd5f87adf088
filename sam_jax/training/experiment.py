"""A training run from a config: its task, data, optimizer and sharding, built from sections."""

import ast
import dataclasses
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from sam_jax.configuration import from_mapping
from sam_jax.data.config import DataConfig
from sam_jax.data.pipeline import TrainIterator, train_iterator
from sam_jax.errors import ConfigError
from sam_jax.losses import LossConfig
from sam_jax.model_config import ModelConfig, build_autoencoder, build_model
from sam_jax.models.lora import ADAPTERS, LoraConfig
from sam_jax.models.masked_autoencoder import AutoencoderConfig
from sam_jax.models.sam import SamConfig
from sam_jax.ops.dispatch import Kernels
from sam_jax.sharding import ShardingConfig
from sam_jax.simulated_user import PromptConfig
from sam_jax.training.compiled_step import CompiledStep, compile_step
from sam_jax.training.embedding_cache import EmbeddingStage, KnownImages
from sam_jax.training.optimizer import OptimizerConfig
from sam_jax.training.tasks.reconstruct import ReconstructTask
from sam_jax.training.tasks.segment import SegmentTask

# What configs train that name no task.
DEFAULT_TASK = "segment"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, initial weights, averaging and reports of a training run.

    Attributes:
      num_steps: optimizer steps of the whole run.
      init_from: weights that a new run starts from, of any form that ``weights.load.load``
        takes: another run (its averaged parameters, where it keeps them), a published or Hugging
        Face checkpoint, a masked autoencoder; None for random ones.
      adapters_from: file of trained adapters to put on top of them, as sam-jax convert
        --only-adapters writes it: adapters to train on if ``lora.rank`` is theirs, merged if that
        is 0; None for none.
      seed: of the parameters, prompts, dropout; the data have a seed of their own.
      remat_rounds: whether rounds of prompting are computed again in the backward pass, see
        ``rounds.run_rounds``.
      trainable: parameters that are trained: "all", "decoder" (the mask decoder), "lora" (adapters,
        see ``lora.LoraConfig``), or regular expressions searched in their paths; several add up.
        The others stay as they are, and take neither gradients nor the optimizer's memory.
      embedding_cache: folder in which image embeddings of a frozen encoder are kept, computed the
        first time that an image comes; None embeds images in every step. Runs may share it.
      ema_decay: what is left of the running average of the parameters at each step, as in 0.9999; 0
        keeps none, and the paper mentions none. Evaluation, prediction and conversion then take the
        average. It starts as the first parameters, which needs no correction of a bias; after n
        steps they weigh ``ema_decay ** n``. Costs 4 bytes per trained parameter, spread like them.
      profile_steps: first and last step that a profile is written of, to ``workdir/profile``, for
        xprof or TensorBoard; None for no profile.
      max_skipped_steps: a run ends, with a diagnosis, after so many steps in a row whose loss or
        gradient was not finite; such a step changes nothing but the count of steps. 1 ends at the
        first, for which the host waits for each step.
      max_stall_seconds: a run ends if one batch, step or checkpoint takes longer, or if nothing is
        computed for so long while it compiles or evaluates: storage that does not answer, or a
        host that is frozen. None waits for ever.
      wandb: PROJECT or ENTITY/PROJECT of Weights & Biases that is told what TensorBoard is; None
        for none. Needs its package.
      log_every: steps between reports.
      eval_every: steps between evaluations; None evaluates at the end only, 0 never.
      eval_before: whether a new run is also evaluated before its first step, with what it starts
        from: later models are compared with that, and it is the best where none is better.
      watch: the figure that the run is judged by, the larger the better, but of a loss: name of an
        evaluation and of a figure in its report, as in "val/mean/box", "val/mean/center_1" or, of
        reconstruction, "val/mean/loss". The model that was best is kept in RUN/best, which is a
        run's folder by itself; None for none, and without evaluations there is none.
      patience: evaluations without a better figure after which the run ends; None for no such end.
    """

    num_steps: int
    init_from: str | None = None
    adapters_from: str | None = None
    seed: int = 0
    remat_rounds: bool = True
    trainable: tuple[str, ...] = ("all",)
    embedding_cache: str | None = None
    ema_decay: float = 0.0
    profile_steps: tuple[int, int] | None = None
    max_skipped_steps: int = 10
    max_stall_seconds: float | None = 1800.0
    wandb: str | None = None
    log_every: int = 50
    eval_every: int | None = None
    eval_before: bool = False
    watch: str | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_steps", 1), ("log_every", 1), ("eval_every", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.patience is not None and (self.patience < 1 or not self.watch):
            raise ValueError(
                f"patience = {self.patience} needs a figure to watch, and at least one evaluation"
            )
        if self.adapters_from is not None and self.init_from is None:
            raise ValueError("adapters_from needs the weights that they are put on, init_from")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and less than 1, got {self.ema_decay}")
        if self.max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps must be at least 1, got {self.max_skipped_steps}")
        if self.max_stall_seconds is not None and self.max_stall_seconds <= 0:
            raise ValueError(f"max_stall_seconds must be positive, got {self.max_stall_seconds}")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The sections of a config that say what a training step is, built."""

    task: SegmentTask | ReconstructTask
    kernels: Kernels
    data: DataConfig
    optimizer: OptimizerConfig
    sharding: ShardingConfig
    train: TrainConfig

    @classmethod
    def of(cls, sections: Mapping[str, Any]) -> "Experiment":
        """The experiment of a config's sections.

        Raises:
          ConfigError: if a section does not fit what it describes.
        """
        check_task(sections)
        model_config = from_mapping(ModelConfig, sections["model"], "model")
        data = from_mapping(
            DataConfig,
            {
                **sections["data"],
                "image_size": model_config.sam.image_encoder.image_size,
                "in_channels": model_config.in_channels,
            },
            "data",
        )
        train = from_mapping(TrainConfig, sections["train"], "train")
        build_task = _TASKS[sections.get("task", DEFAULT_TASK)]
        return cls(
            task=build_task(model_config, data, train, sections),
            kernels=model_config.kernels,
            data=data,
            optimizer=from_mapping(OptimizerConfig, sections["optimizer"], "optimizer"),
            sharding=from_mapping(ShardingConfig, sections["sharding"], "sharding"),
            train=train,
        )

    def compiled_step(self, devices: Sequence[Any] | None = None) -> CompiledStep:
        """The training step on these devices; see ``compile_step``.

        Raises:
          ConfigError: if the config does not fit the devices or the parameters, or trains an
            encoder whose embeddings are kept.
        """
        compiled_step = compile_step(
            self.task,
            num_steps=self.train.num_steps,
            seed=self.train.seed,
            ema_decay=self.train.ema_decay,
            trainable=self.train.trainable,
            optimizer_config=self.optimizer,
            sharding_config=self.sharding,
            kernels=self.kernels,
            devices=devices,
        )
        if isinstance(self.task, SegmentTask):
            _check_trained(self.task, self.train.trainable, compiled_step.trained)
        return compiled_step

    def stage(self) -> EmbeddingStage | None:
        """The stage from the input pipeline's batches to the task's; None where they are."""
        if self.train.embedding_cache is None:
            return None
        assert isinstance(self.task, SegmentTask), "others have no such cache"
        return EmbeddingStage(self.task.model, self.train.embedding_cache, self.kernels)

    def data_iterator(self, process_index: int = 0, process_count: int = 1) -> TrainIterator:
        """The input pipeline: batches of the task, or of the stage where there is one.

        Raises:
          ConfigError: see ``train_iterator``.
        """
        folder = self.train.embedding_cache
        return train_iterator(
            self.data,
            process_index=process_index,
            process_count=process_count,
            known_images=None if folder is None else KnownImages(Path(folder).expanduser()),
        )


def _check_trained(task: SegmentTask, trainable: Sequence[str], trained: Any) -> None:
    """Refuses trained parameters that contradict the cache of embeddings or the adapters."""
    changed = sorted(set(trained) & {"image_encoder", ADAPTERS})
    said = f"train.trainable = {trainable}"
    if task.takes_embeddings and changed:
        raise ConfigError(
            f"train.embedding_cache keeps what a frozen encoder answers, and {said} "
            f"trains {', '.join(changed)}: set train.trainable to ('decoder',), or "
            "train.embedding_cache to None"
        )
    if not task.lora.rank:
        return
    if ADAPTERS not in trained:
        raise ConfigError(
            f"lora.rank = {task.lora.rank} makes adapters that {said} does not "
            "train: add 'lora' to it, or set lora.rank to 0"
        )
    flat = flatten_dict(trained, sep="/")
    layers = {path.rpartition("/")[0] for path in flat if path.startswith(f"{ADAPTERS}/")}
    both = [f"{layer.removeprefix(f'{ADAPTERS}/')}/kernel" for layer in sorted(layers)]
    if both := [kernel for kernel in both if kernel in flat]:
        raise ConfigError(
            f"{said} trains {both[0]}, which has an adapter (lora.targets): name 'lora' "
            "in place of it, or set lora.rank to 0"
        )


def _check_views(data: DataConfig, model: SamConfig) -> None:
    """Refuses options under which an image is never seen twice, so that nothing can be kept of it.

    Flips are no such option: an image has two views then, and both are kept.
    """
    endless = {
        "data.scale_jitter": data.scale_jitter,
        "data.color_jitter": data.color_jitter,
        "model.drop_path_rate": getattr(model.image_encoder, "drop_path_rate", 0.0),
    }
    if found := [f"{name} = {value}" for name, value in endless.items() if value]:
        raise ConfigError(
            f"train.embedding_cache keeps embeddings of images that come again, and under "
            f"{', '.join(found)} none does: turn that off (data.hflip_rate may stay: it makes two "
            "views of each image, and both are kept), or set train.embedding_cache to None"
        )


def check_task(sections: Mapping[str, Any]) -> None:
    """Checks that a config's task, ``DEFAULT_TASK`` where it names none, is one of those there are.

    Raises:
      ConfigError: if not.
    """
    task = sections.get("task", DEFAULT_TASK)
    if task not in _TASKS:
        raise ConfigError(f"config.task is {task!r}; there are {', '.join(_TASKS)}")


def _segment(
    model: ModelConfig, data: DataConfig, train: TrainConfig, sections: Mapping[str, Any]
) -> SegmentTask:
    if data.crop_area_rates is not None:
        raise ConfigError(
            f"data.crop_area_rates = {data.crop_area_rates} makes examples without masks, which "
            'segmentation cannot be trained on; leave it None, or take task = "reconstruct"'
        )
    task = SegmentTask(
        build_model(model),
        prompts=from_mapping(PromptConfig, sections["prompts"], "prompts"),
        losses=from_mapping(LossConfig, sections["losses"], "losses"),
        max_masks=data.max_masks,
        remat_rounds=train.remat_rounds,
        takes_embeddings=train.embedding_cache is not None,
        lora=from_mapping(LoraConfig, sections["lora"], "lora"),
        adapters_from=train.adapters_from,
    )
    if task.takes_embeddings:
        _check_views(data, task.model.config)
    return task


def _reconstruct(
    model: ModelConfig, data: DataConfig, train: TrainConfig, sections: Mapping[str, Any]
) -> ReconstructTask:
    for name in ("embedding_cache", "adapters_from"):
        if (value := getattr(train, name)) is not None:
            raise ConfigError(f"train.{name} = {value!r} is for segmentation; leave it None")
    if data.crop_area_rates is None:
        raise ConfigError(
            "data.crop_area_rates is None: pre-training takes crops of images, as (0.2, 1.0)"
        )
    config = from_mapping(AutoencoderConfig, sections["autoencoder"], "autoencoder")
    return ReconstructTask(build_autoencoder(model, config))


# By the names that configs use.
_TASKS: dict[str, Callable[..., SegmentTask | ReconstructTask]] = {
    "segment": _segment,
    "reconstruct": _reconstruct,
}


def read_config(file: str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a config file.

    Args:
      file: as for train.py: FILE.py, or FILE.py:ARGUMENT for its ``get_config``.
      settings: changes, each SECTION.KEY=VALUE.

    Raises:
      ConfigError: if there is no such file or key, or the file is no config.
    """
    path, _, argument = file.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"--config {path}: there is no such file")
    # A config may import its neighbours, as in `from configs import common`.
    root = str(Path(path).resolve().parents[1])
    if root not in sys.path:
        sys.path.append(root)
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise ConfigError(f"--config {path}: the file has no function get_config")
    try:
        config = get_config(argument) if argument else get_config()
    except TypeError as error:
        raise ConfigError(f"--config {file}: {error}") from error
    for text in settings:
        key, value = _setting(text)
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"--set {text}: {error}") from error
    sections: dict[str, Any] = config.to_dict()
    return sections


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: expected SECTION.KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value
