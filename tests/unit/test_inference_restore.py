import hypothesis
import hypothesis.strategies as st
import numpy as np

from sam_jax.inference.restore import restore_mask


def linear_weights(size_in, size_out):
    """Matrix [size_out, size_in] of linear interpolation: half-pixel centres, edges clamped."""
    weights = np.zeros((size_out, size_in))
    for row in range(size_out):
        place = (row + 0.5) * size_in / size_out - 0.5
        low = int(np.floor(place))
        for index, weight in ((low, 1 - (place - low)), (low + 1, place - low)):
            weights[row, min(max(index, 0), size_in - 1)] += weight
    return weights


def bilinear(values, size_hw):
    rows, columns = (linear_weights(i, o) for i, o in zip(values.shape, size_hw, strict=True))
    return rows @ values.astype(float) @ columns.T


@hypothesis.given(st.data())
def test_equals_the_closed_form(data):
    low_hw = data.draw(st.tuples(st.integers(2, 12), st.integers(2, 12)))
    model_hw = tuple(4 * side for side in low_hw)
    resized_hw = tuple(data.draw(st.integers(1, side)) for side in model_hw)
    original_hw = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    logits = 10 * np.random.default_rng(seed).standard_normal(low_hw).astype(np.float32)

    at_model = bilinear(logits, model_hw)[: resized_hw[0], : resized_hw[1]]
    expected = bilinear(at_model, original_hw)
    mask = restore_mask(logits, model_hw, resized_hw, original_hw)
    assert mask.shape == original_hw
    assert mask.dtype == bool
    # float32 may turn the sign only of what is as good as zero.
    clear = np.abs(expected) > 1e-4
    np.testing.assert_array_equal(mask[clear], expected[clear] > 0)


def test_by_hand_in_one_dimension():
    # Values -1 and 3 at the centres of two halves: the line between them is 0 at a quarter of the
    # way, which is at 2 + 4 * 0.25 = 3 of the 8 columns.
    logits = np.array([[-1.0, 3.0]] * 2, np.float32)
    mask = restore_mask(logits, (8, 8), (8, 8), (8, 8))
    np.testing.assert_array_equal(mask, np.broadcast_to(np.arange(8) >= 3, (8, 8)))


def test_padding_does_not_reach_into_the_mask():
    logits = np.full((4, 4), -5, np.float32)
    logits[:, 2:] = 5
    # The right half is padding: nothing of the image is foreground but what the cells share.
    mask = restore_mask(logits, (16, 16), (16, 8), (40, 20))
    assert not mask.any()
    assert restore_mask(logits, (16, 16), (16, 16), (40, 40))[:, 20:].all()
