"""Images as the model takes them, and embeddings that are kept."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.inference.images import ImageEmbeddings, model_input
from sam_jax.weights.files import WeightsError, write_safetensors

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def test_model_input_is_padded_at_the_bottom_and_right() -> None:
    padded, hw = model_input(RGB, (10, 20))
    assert hw == (10, 14)
    assert not padded[:, 14:].any()
    assert padded[:, :14].any()


def embeddings() -> ImageEmbeddings:
    return ImageEmbeddings(
        jnp.arange(24, dtype=jnp.float32).reshape(2, 2, 2, 3),
        np.array([[5, 7], [9, 3]]),
        np.array([[4, 6], [8, 2]]),
        (8, 8),
    )


def test_embeddings_are_kept(tmp_path: Path) -> None:
    written = embeddings()
    written.save(tmp_path / "e.safetensors")
    read = ImageEmbeddings.load(tmp_path / "e.safetensors")
    for field in ("features", "original_hw", "resized_hw"):
        np.testing.assert_array_equal(getattr(read, field), getattr(written, field))
    assert read.model_hw == (8, 8)
    assert len(read[1:]) == 1
    np.testing.assert_array_equal(read[1:].features, written.features[1:])
    np.testing.assert_array_equal(read[[1, 0]].original_hw, written.original_hw[::-1])


def test_a_file_of_something_else_is_no_embeddings(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"features": np.zeros(3)})
    with pytest.raises(WeightsError, match="holds no image embeddings"):
        ImageEmbeddings.load(tmp_path / "x.safetensors")
