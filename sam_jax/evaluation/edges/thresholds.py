"""Thresholds at which edge maps are scored."""

import numpy as np

from sam_jax.arrays import Float


def even_thresholds(number: int) -> Float[np.ndarray, "t"]:
    """The benchmark's thresholds, evenly spaced between 0 and 1: 0.01 to 0.99 for 99."""
    # By this formula, since 8 bits meet some of them exactly: 85 / 255 is one third, and is not
    # reached where rounding makes the threshold a little more.
    return np.linspace(1 / (number + 1), 1 - 1 / (number + 1), number)
