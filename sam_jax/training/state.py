"""State that a training run carries from step to step."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sam_jax.trained_parameters import part_at, with_part


@flax.struct.dataclass
class TrainState:
    """State of a training run, a plain pytree.

    It has no random key, since every key derives from the seed and the step. Its leaves may be
    arrays, their shapes or their shardings, hence no types.

    Attributes:
      step: optimizer steps done, int32.
      params: parameters, trained and others, float32.
      constants: fixed variables of the model, never updated.
      opt_state: the optimizer's, of trained parameters.
      ema_params: running average of the trained parameters, float32; None where none is kept.
    """

    step: Any
    params: Any
    constants: Any
    opt_state: Any
    ema_params: Any = None

    @property
    def variables(self) -> dict:
        """Variables for ``Sam.apply``, with the parameters as they are trained."""
        return {"params": self.params, "constants": self.constants}

    @property
    def evaluated_variables(self) -> dict:
        """Variables for ``Sam.apply``, with the averaged parameters where they are kept."""
        params = self.params
        if self.ema_params is not None:
            params = with_part(params, self.ema_params)
        return {"params": params, "constants": self.constants}

    def averaged_part(self, params: Any) -> Any:
        """The part of a whole model's parameters that is averaged."""
        return part_at(params, self.ema_params)


def init_state(
    variables: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    *,
    keeps_ema: bool = False,
    trained: Any = None,
) -> TrainState:
    """The state before the first step; works under ``jax.eval_shape``.

    An average starts as the parameters themselves.

    Args:
      variables: of the model.
      optimizer: of the trained parameters.
      keeps_ema: whether they are averaged.
      trained: a tree with their paths, see ``trained_parameters.part_at``; None if all are.
    """
    trained_params = part_at(variables["params"], trained)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        constants=variables["constants"],
        opt_state=jax.jit(optimizer.init)(trained_params),
        # Copies, since a step donates the state's buffers and cannot donate one twice.
        ema_params=jax.tree.map(jnp.copy, trained_params) if keeps_ema else None,
    )
