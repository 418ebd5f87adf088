"""TPU kernels in Pallas. Only ``sam_jax.ops`` imports them; ``ops.dispatch`` chooses them."""
