"""The interactive rounds, watched through a decoder that records what it is asked."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax.losses import LossConfig, mask_losses, round_loss
from sam_jax.models.mask_decoder import MaskPrediction
from sam_jax.ops.packed_masks import MaskLayout
from sam_jax.ops.resize import resize_bilinear
from sam_jax.simulated_user import PromptConfig
from sam_jax.training.rounds import run_rounds

IMAGE_HW = (24, 40)
MASK_LAYOUT = MaskLayout((2, 3), 4)
SIZE = MASK_LAYOUT.image_size  # eight rows and columns of padding
LOW = (8, 12)
NUM_OBJECTS = 6


@pytest.fixture(scope="module")
def masks():
    masks = np.zeros((2, NUM_OBJECTS, *SIZE), bool)
    rng = np.random.default_rng(0)
    for image in range(2):
        for number in range(NUM_OBJECTS):
            y, x = rng.integers(0, 12, 2)
            masks[image, number, y : y + 9, x : x + 13] = True
    return MASK_LAYOUT.of_masks(jnp.asarray(masks))


KEYS = jax.random.split(jax.random.key(5), (2, NUM_OBJECTS))


class Recorder:
    """A decoder with random answers; keeps, in order, what each round asked."""

    def __init__(self):
        self.rounds = []

    def __call__(self, prompts, multimask_output, seeds):
        num_candidates = 3 if multimask_output else 1
        logits_key, iou_key = jax.random.split(jax.random.key(seeds[0, 0]))
        shape = (2, NUM_OBJECTS, num_candidates)
        answer = MaskPrediction(
            low_res_logits=4 * jax.random.normal(logits_key, (*shape, *LOW)),
            iou_predictions=jax.random.uniform(iou_key, shape),
        )
        jax.debug.callback(self.keep, prompts, answer, ordered=True)
        return answer

    def keep(self, *asked_and_answered):
        self.rounds.append(jax.tree.map(np.asarray, asked_and_answered))


@pytest.fixture(scope="module")
def recorded(masks):
    recorder = Recorder()

    @jax.jit
    def run(masks):
        return run_rounds(
            recorder,
            KEYS,
            masks,
            jnp.array([IMAGE_HW, IMAGE_HW]),
            MASK_LAYOUT,
            PromptConfig(),
            LossConfig(),
            remat=False,
        )

    results = run(masks)
    jax.effects_barrier()
    return recorder.rounds, results


def test_eleven_rounds_and_only_the_first_has_three_candidates(recorded):
    rounds, results = recorded
    candidates = [answer.iou_predictions.shape[-1] for _, answer in rounds]
    assert candidates == [3] + [1] * 10
    assert results.iou.shape == (11, 2, NUM_OBJECTS)


def test_the_first_prompt_is_a_point_on_the_mask_or_a_box(recorded, masks):
    prompts, _ = recorded[0][0]
    is_point = np.asarray(prompts.point_valid[..., 0])
    np.testing.assert_array_equal(is_point, ~np.asarray(prompts.box_valid))
    assert 0 < is_point.sum() < is_point.size
    assert not prompts.point_valid[..., 1:].any()
    assert prompts.mask_logits is None
    truth = MASK_LAYOUT.to_masks(masks)
    for image, number in np.argwhere(is_point):
        x, y = np.asarray(prompts.point_coords[image, number, 0], int)
        assert truth[image, number, y, x]
        assert prompts.point_labels[image, number, 0] == 1


def test_eight_corrections_one_mask_round_among_them_and_one_last(recorded):
    rounds, _ = recorded
    counts = np.stack([p.point_valid.sum(-1) for p, _ in rounds])
    added = np.diff(counts, axis=0)
    assert set(np.unique(added)) <= {0, 1}
    np.testing.assert_array_equal(added.sum(axis=0), 8)
    np.testing.assert_array_equal(added[-1], 0)
    without_click = np.argmin(added, axis=0)
    assert (without_click < 9).all()
    assert len(np.unique(without_click)) > 1, "the place differs from object to object"


def test_earlier_points_and_the_box_stay(recorded):
    rounds, _ = recorded
    for (before, _), (after, _) in itertools.pairwise(rounds):
        kept = np.asarray(before.point_valid)
        assert after.point_valid[kept].all()
        np.testing.assert_array_equal(after.point_coords[kept], before.point_coords[kept])
        np.testing.assert_array_equal(after.boxes_xyxy, before.boxes_xyxy)


def test_the_mask_with_the_highest_predicted_iou_is_fed_back(recorded):
    rounds, results = recorded
    for number, ((_, answer), (later, _)) in enumerate(itertools.pairwise(rounds)):
        best = np.asarray(answer.iou_predictions).argmax(-1)[..., None, None, None]
        expected = np.take_along_axis(np.asarray(answer.low_res_logits), best, 2)[:, :, 0]
        # The compiler may have computed the random answer twice, once fused with its noise's scale.
        np.testing.assert_allclose(later.mask_logits, expected, rtol=1e-6)
        assert later.mask_valid.all()
        np.testing.assert_allclose(
            results.iou_prediction[number], answer.iou_predictions.max(-1), rtol=1e-6
        )


def test_new_clicks_lie_in_the_error_region_with_the_right_sign(recorded, masks):
    rounds, _ = recorded
    truth = np.asarray(MASK_LAYOUT.to_masks(masks))
    num_checked = 0
    for (before, _), (after, _) in itertools.pairwise(rounds):
        predicted = np.asarray(resize_bilinear(jnp.asarray(after.mask_logits), SIZE) > 0)
        for image, number, slot in np.argwhere(np.asarray(after.point_valid & ~before.point_valid)):
            x, y = np.asarray(after.point_coords[image, number, slot], int)
            assert y < IMAGE_HW[0]
            assert predicted[image, number, y, x] != truth[image, number, y, x]
            assert after.point_labels[image, number, slot] == truth[image, number, y, x]
            num_checked += 1
    assert num_checked == 8 * 2 * NUM_OBJECTS


def test_gradients_reach_every_round_but_not_through_the_logits_fed_back(masks):
    """A decoder whose answer is its parameter plus the logits it is given."""

    def loss(bias, remat, feedback_gradient=False):
        def decode(prompts, multimask_output, seeds):
            del seeds
            base = 0.0 if prompts.mask_logits is None else prompts.mask_logits[:, :, None]
            shape = (2, NUM_OBJECTS, 3 if multimask_output else 1)
            logits = jnp.broadcast_to(base + bias, (*shape, *LOW))
            return MaskPrediction(logits, jnp.zeros(shape))

        results = run_rounds(
            decode,
            KEYS,
            masks,
            jnp.array([IMAGE_HW, IMAGE_HW]),
            MASK_LAYOUT,
            PromptConfig(num_corrections=1, random_mask_round=False, final_mask_round=False),
            LossConfig(iou_weight=0.0, feedback_gradient=feedback_gradient),
            remat=remat,
        )
        return results.loss.total.mean(axis=(1, 2))

    bias = jnp.float32(-1.0)
    differentiated = jax.jit(jax.jacrev(loss), static_argnums=(1, 2))
    jacobian = differentiated(bias, True)
    np.testing.assert_allclose(jacobian, differentiated(bias, False), rtol=1e-5)
    # Round two's logits are twice the bias, but only once with a gradient.
    alone = jax.jit(jax.grad(lambda b: loss_of_logits(masks, b - 1.0)))(bias)
    np.testing.assert_allclose(jacobian[1], alone, rtol=1e-5)
    # On request it passes, and counts twice.
    through = differentiated(bias, True, True)
    np.testing.assert_allclose(through[0], jacobian[0], rtol=1e-5)
    np.testing.assert_allclose(through[1], 2 * alone, rtol=1e-5)


def loss_of_logits(masks, value):
    """The loss of one round whose logits are all the same."""

    area = MASK_LAYOUT.area(jnp.array([IMAGE_HW, IMAGE_HW]))
    logits = jnp.broadcast_to(value, (2, NUM_OBJECTS, 1, *LOW))
    losses = mask_losses(logits, masks, area, MASK_LAYOUT, LossConfig())
    iou_predictions = jnp.zeros((2, NUM_OBJECTS, 1))
    return round_loss(losses, iou_predictions, LossConfig(iou_weight=0.0)).total.mean()
