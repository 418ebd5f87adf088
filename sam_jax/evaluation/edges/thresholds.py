"""Thresholds at which edge maps are scored."""

import numpy as np

from sam_jax.arrays import Float


def even_thresholds(number: int) -> Float[np.ndarray, "t"]:
    """The benchmark's thresholds, evenly spaced between 0 and 1: 0.01 to 0.99 for 99."""
    return np.arange(1, number + 1) / (number + 1)
