"""What a training run carries from step to step."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """A plain pytree; there is no key in it, since every key derives from the seed and the step.

    Its leaves may be arrays, their shapes or their shardings, hence no types.

    Attributes:
      step: optimizer steps done, int32.
      params: trained parameters, float32.
      constants: fixed variables of the model, never updated.
      opt_state: the optimizer's.
    """

    step: Any
    params: Any
    constants: Any
    opt_state: Any

    @property
    def variables(self) -> dict:
        """What ``Sam.apply`` takes."""
        return {"params": self.params, "constants": self.constants}


def init_state(variables: Mapping[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; works under ``jax.eval_shape``."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        constants=variables["constants"],
        opt_state=jax.jit(optimizer.init)(variables["params"]),
    )
