"""Sums over the pixels of enlarged logits: the kernel against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.ops import mask_sums_kernel
from sam_jax.ops.cells import MaskGrid, to_cells
from sam_jax.ops.mask_sums import mask_sums

OPTIONS = {"alpha": 0.25, "gamma": 2.0}


@pytest.mark.parametrize("mask_grid", [MaskGrid((8, 16), 4), MaskGrid((24, 16), 2)])
def test_the_kernel_sums_what_the_plain_form_sums(mask_grid: MaskGrid) -> None:
    """Values and gradients, two images with padding, three candidates."""
    rng = np.random.default_rng(0)
    b, p, m = 2, 2, 3
    gh, gw = mask_grid.grid
    logits = to_cells(jnp.asarray(rng.normal(0, 4, (b, p, m, 4 * gh, 4 * gw)), jnp.float32))
    height, width = mask_grid.image_size
    masks = mask_grid.of_masks(jnp.asarray(rng.random((b, p, height, width)) < 0.4))
    area = mask_grid.area(jnp.array([[height, width - 5], [height - 9, width]]))
    weights = jnp.asarray(rng.normal(size=(3, b, p, m)), jnp.float32)

    def total(logits, form, **options):
        sums = form(logits, masks, area, mask_grid, **OPTIONS, **options)
        return sum(jnp.vdot(w, x) for w, x in zip(weights, sums[:3], strict=True)), sums

    def values_and_gradients(form, **options):
        function = lambda logits: total(logits, form, **options)  # noqa: E731
        (_, sums), gradient = jax.jit(jax.value_and_grad(function, has_aux=True))(logits)
        return *sums[:3], gradient, sums.errors

    expected = values_and_gradients(mask_sums)
    found = values_and_gradients(mask_sums_kernel.mask_sums, interpret=True)
    for ours, theirs in zip(found[:4], expected[:4], strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    np.testing.assert_array_equal(found[4], expected[4])


def test_the_kernel_takes_grids_that_fill_its_registers() -> None:
    assert mask_sums_kernel.supports(MaskGrid((64, 64), 4))
    assert not mask_sums_kernel.supports(MaskGrid((7, 9), 4))
