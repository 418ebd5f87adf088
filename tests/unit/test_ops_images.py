"""Normalisation and padding of images."""

import jax.numpy as jnp
import numpy as np

from sam_jax.ops.images import normalize_images, valid_area


def test_valid_area_by_hand() -> None:
    ours = valid_area(jnp.array([[1, 3], [2, 2], [0, 4]]), (2, 4))
    expected = [
        [[1, 1, 1, 0], [0, 0, 0, 0]],
        [[1, 1, 0, 0], [1, 1, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
    ]
    np.testing.assert_array_equal(ours, np.array(expected, bool))


def test_normalize_images_by_hand() -> None:
    """ImageNet's mean and deviation in 8-bit units, RGB; the published model's numbers."""
    images = np.zeros((1, 2, 3, 3), np.uint8)
    images[0, 0, 1] = 255, 116, 104
    ours = normalize_images(jnp.asarray(images), jnp.array([[2, 3]]))
    assert ours.dtype == jnp.float32
    black = [-123.675 / 58.395, -116.28 / 57.12, -103.53 / 57.375]
    bright = [131.325 / 58.395, -0.28 / 57.12, 0.47 / 57.375]
    np.testing.assert_allclose(ours[0, 0, 0], black, rtol=1e-6)
    np.testing.assert_allclose(ours[0, 0, 1], bright, rtol=1e-5)


def test_padding_is_zero_after_normalisation_whatever_it_held() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 6, 3), np.uint8)
    image_hw = jnp.array([[3, 6], [4, 2]])
    ours = normalize_images(jnp.asarray(images), image_hw)
    assert (ours[0, 3:] == 0).all()
    assert (ours[1, :, 2:] == 0).all()
    whole = normalize_images(jnp.asarray(images), jnp.full((2, 2), jnp.array([4, 6])))
    np.testing.assert_array_equal(ours[0, :3], whole[0, :3])
    np.testing.assert_array_equal(ours[1, :, :2], whole[1, :, :2])
