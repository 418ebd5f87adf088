"""The compiled program of a training run: what is on which device, and the step."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from sam_jax.errors import ConfigError
from sam_jax.ops.dispatch import Kernels
from sam_jax.parallel import Parallel
from sam_jax.sharding import (
    BATCH_AXES,
    TENSOR_AXIS,
    WEIGHTS_AXIS,
    ShardingConfig,
    batch_sharding,
    make_mesh,
    replicated,
    tree_shardings,
)
from sam_jax.trained_parameters import select_trained
from sam_jax.training.optimizer import OptimizerConfig, build_optimizer
from sam_jax.training.state import TrainState, init_state
from sam_jax.training.step import build_train_step
from sam_jax.training.task import Task, task_shapes

# Weights are all-gathered before a product. By default XLA pipelines pieces of both (a windowed
# einsum): a hundred times as many transfers, and half as many cycles again.
_COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A run's functions, and where their arguments lie.

    Attributes:
      task: what is trained.
      parallel: the devices, and what they share.
      trained: shapes of the trained parameters, which are a part of ``state_shapes.params``.
      optimizer: of those.
      state_shapes: shapes and types of the training state.
      state_shardings: where it lies.
      seed: of what the steps draw.
      accumulate_steps: parts into which a batch is cut.
      step: jitted; state and a batch's fields by name in, state and metrics out. The state that
        goes in is gone afterwards.
    """

    task: Task
    parallel: Parallel
    trained: Any
    optimizer: optax.GradientTransformation
    state_shapes: TrainState
    state_shardings: TrainState
    seed: int
    accumulate_steps: int
    step: Any

    @property
    def mesh(self) -> Mesh:
        """Mesh of all devices."""
        assert self.parallel.mesh is not None
        return self.parallel.mesh

    @property
    def keeps_ema(self) -> bool:
        """True if the state has averaged parameters."""
        return self.state_shapes.ema_params is not None

    @property
    def param_specs(self) -> Any:
        """Partition of each parameter over the devices."""
        return jax.tree.map(lambda sharding: sharding.spec, self.state_shardings.params)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of every field of a batch."""
        return batch_sharding(self.mesh)

    @property
    def placed_state(self) -> TrainState:
        """Shapes, types and shardings of the state in one tree."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.state_shapes,
            self.state_shardings,
        )

    def check_batch(self, batch_size: int) -> None:
        """Checks that a batch divides evenly by devices and accumulation steps.

        Raises:
          ConfigError: if not.
        """
        num_shares, num_parts = self.parallel.num_batch, self.accumulate_steps
        if batch_size % (num_shares * num_parts):
            raise ConfigError(
                f"a batch of {batch_size} images does not divide by {num_shares} devices that see "
                f"different images and optimizer.accumulate_steps = {num_parts}: data.batch_size "
                f"must be a multiple of {num_shares * num_parts}"
            )

    def global_batch(self, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's share of the images as part of the arrays over all devices."""
        return {
            name: jax.make_array_from_process_local_data(self.batch_sharding, local[name])
            for name in self.task.batch_spec(1)
        }

    def placed_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, types and shardings of a batch."""
        return {
            name: jax.ShapeDtypeStruct(field.shape, field.dtype, sharding=self.batch_sharding)
            for name, field in self.task.batch_spec(batch_size).items()
        }

    def new_state(self, key: jax.Array) -> TrainState:
        """The state before the first step, from random parameters, made where it lies."""
        return jax.jit(
            lambda key: self._init_state(self.task.init(key)),
            out_shardings=self.state_shardings,
        )(key)

    def state_from(self, variables: Any) -> TrainState:
        """The state before the first step, from the variables of the model, wherever they lie."""
        # From the host: arrays that were read onto one device cannot be resharded onto others.
        on_host = jax.device_get(variables)
        return jax.jit(self._init_state, out_shardings=self.state_shardings)(on_host)

    def _init_state(self, variables: Any) -> TrainState:
        return init_state(variables, self.optimizer, keeps_ema=self.keeps_ema, trained=self.trained)


def compile_step(
    task: Task,
    *,
    num_steps: int,
    seed: int,
    ema_decay: float,
    optimizer_config: OptimizerConfig,
    sharding_config: ShardingConfig,
    trainable: Sequence[str] = ("all",),
    kernels: Kernels = "auto",
    devices: Sequence[Any] | None = None,
) -> CompiledStep:
    """The program of a run on these devices, which may be ones that are only described.

    Args:
      task: what is trained.
      num_steps, seed, ema_decay: see ``experiment.TrainConfig``.
      optimizer_config, sharding_config: the experiment.
      trainable: see ``trained_parameters.select_trained``.
      kernels: see ``ops.dispatch.Target``.
      devices: by default all there are.

    Raises:
      ConfigError: if the config does not fit the devices or the parameters.
    """
    mesh = make_mesh(sharding_config, devices)
    parallel = Parallel(
        mesh, BATCH_AXES, TENSOR_AXIS, WEIGHTS_AXIS, sharding_config.reduce_dtype, kernels
    )
    variables = task_shapes(task)
    params = variables["params"]
    trained = select_trained(params, trainable)
    optimizer = build_optimizer(params, optimizer_config, num_steps, trained=trained)
    state_shapes = jax.eval_shape(
        lambda v: init_state(v, optimizer, keeps_ema=ema_decay > 0, trained=trained),
        variables,
    )
    shardings = tree_shardings(state_shapes, mesh, sharding_config)
    step = jax.jit(
        build_train_step(
            task,
            optimizer,
            seed=seed,
            parallel=parallel,
            param_specs=jax.tree.map(lambda sharding: sharding.spec, shardings.params),
            accumulate_steps=optimizer_config.accumulate_steps,
            ema_decay=ema_decay,
            trained=trained,
        ),
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=_COMPILER_OPTIONS.get(parallel.platform),
    )
    return CompiledStep(
        task,
        parallel,
        trained,
        optimizer,
        state_shapes,
        shardings,
        seed,
        optimizer_config.accumulate_steps,
        step,
    )
