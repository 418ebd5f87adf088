"""The predictor: what it answers, how often it compiles, and that padding changes nothing."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sam_jax.inference.predictor import Buckets, Predictor, use_compilation_cache
from sam_jax.inference.prompts import Prompt, PromptError
from sam_jax.models.prompt_encoder import Prompts
from sam_jax.models.sam import Sam
from sam_jax.ops.images import normalize_images
from tests.golden.tiny import SHALLOW, random_variables

MODEL = Sam(SHALLOW)
BUCKETS = Buckets(images=(1, 3), rows=(1, 2), prompts=(1, 4), points=(1, 4))


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return random_variables(SHALLOW)


@pytest.fixture(scope="module")
def predictor(variables: dict[str, Any]) -> Predictor:
    return Predictor(MODEL, variables, BUCKETS)


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


SIZES = ((40, 48), (20, 24), (31, 90), (5, 3), (80, 96))


def test_embeddings_are_the_encoders(predictor: Predictor, variables: dict[str, Any]) -> None:
    # Of the model's own size, so that nothing is resized.
    (image,) = pictures(MODEL.image_size)
    found = predictor.embed([image])
    normalized = normalize_images(jnp.asarray(image)[None], jnp.array([MODEL.image_size]))
    expected = jax.jit(functools.partial(MODEL.apply, method=Sam.encode))(variables, normalized)
    np.testing.assert_allclose(found.features, expected, rtol=0, atol=1e-5)


def test_one_call_for_many_images_is_as_one_for_each(predictor: Predictor) -> None:
    images = pictures(*SIZES)
    together = predictor.embed(images)
    assert together.original_hw.tolist() == [list(size) for size in SIZES]
    for index, image in enumerate(images):
        np.testing.assert_allclose(
            predictor.embed([image]).features[0], together.features[index], rtol=0, atol=1e-5
        )


def prompts_for(size: tuple[int, int]) -> list[Prompt]:
    height, width = size
    middle = (width // 2, height // 2)
    mask = np.zeros(size, bool)
    mask[: height // 2 + 1] = True
    return [
        Prompt(points=[middle]),
        Prompt(points=[middle, (0, 0), (width - 1, 0)], labels=[1, 0, 1]),
        Prompt(box=(0, 0, width / 2, height / 2)),
        Prompt(points=[middle], box=(0, 0, width, height)),
        Prompt(mask=mask),
        Prompt(points=[middle], mask=mask),
    ]


@pytest.mark.parametrize("multimask_output", [True, False])
def test_ragged_prompts_answer_as_each_alone(predictor: Predictor, multimask_output: bool) -> None:
    """Rows, objects, points and kinds that are padding change no answer."""
    images = pictures(*SIZES)
    embeddings = predictor.embed(images)
    prompts = [
        prompts_for(size)[:count] for size, count in zip(SIZES, (6, 1, 0, 5, 2), strict=True)
    ]
    together = predictor.predict(embeddings, prompts, multimask_output=multimask_output)
    assert [len(prediction) for prediction in together] == [6, 1, 0, 5, 2]
    for index, objects in enumerate(prompts):
        for number, prompt in enumerate(objects):
            (alone,) = predictor.predict(
                embeddings[index : index + 1], [[prompt]], multimask_output=multimask_output
            )
            for field in ("low_res_logits", "iou_predictions"):
                np.testing.assert_allclose(
                    getattr(alone, field)[0],
                    getattr(together[index], field)[number],
                    rtol=0,
                    atol=2e-5,
                )


def test_answers_are_the_models(predictor: Predictor, variables: dict[str, Any]) -> None:
    (image,) = pictures((20, 24))
    embeddings = predictor.embed([image])
    (found,) = predictor.predict(embeddings, [[Prompt(points=[(7, 3)], labels=[0])]])
    prompts = Prompts(
        # Twice as large in the model's input
        point_coords=jnp.array([[[[14.0, 6.0]]]]),
        point_labels=jnp.zeros((1, 1, 1), jnp.int32),
        point_valid=jnp.ones((1, 1, 1), bool),
    )
    decode = functools.partial(MODEL.apply, multimask_output=True, method=Sam.decode)
    expected = jax.jit(decode)(variables, embeddings.features, prompts)
    np.testing.assert_allclose(found.low_res_logits, expected.low_res_logits[0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(found.iou_predictions, expected.iou_predictions[0], atol=1e-5)


def test_masks_come_at_the_images_own_size(predictor: Predictor) -> None:
    embeddings = predictor.embed(pictures(*SIZES))
    found = predictor.predict(embeddings, [prompts_for(size) for size in SIZES])
    for size, prediction in zip(SIZES, found, strict=True):
        assert prediction.masks().shape == (6, 3, *size)
        best = prediction.iou_predictions.argmax(axis=1)
        np.testing.assert_array_equal(
            prediction.best_masks(), prediction.masks()[np.arange(6), best]
        )
        np.testing.assert_array_equal(prediction.mask(2, 1), prediction.masks()[2, 1])


def test_logits_of_an_answer_are_a_prompt(predictor: Predictor) -> None:
    embeddings = predictor.embed(pictures((20, 24)))
    (first,) = predictor.predict(embeddings, [[Prompt(points=[(7, 3)])]])
    refined = Prompt(points=[(7, 3), (1, 1)], labels=[1, 0], mask=first.low_res_logits[0, 0])
    (second,) = predictor.predict(embeddings, [[refined]], multimask_output=False)
    assert second.low_res_logits.shape == (1, 1, *MODEL.low_res_size)
    assert np.isfinite(second.low_res_logits).all()


def test_nothing_in_nothing_out(predictor: Predictor) -> None:
    nothing = predictor.embed([])
    assert len(nothing) == 0
    assert predictor.predict(nothing, []) == []
    (found,) = predictor.predict(predictor.embed(pictures((9, 9))), [[]])
    assert found.best_masks().shape == (0, 9, 9)


def count_programs(predictor: Predictor) -> tuple[int, int]:
    return predictor._encode._cache_size(), predictor._decode._cache_size()


def test_programs_are_as_few_as_documented(variables: dict[str, Any]) -> None:
    predictor = Predictor(MODEL, variables, BUCKETS)
    rng = np.random.default_rng(0)
    sizes = [tuple(int(side) for side in rng.integers(3, 90, 2)) for _ in range(32)]
    images = pictures(*sizes)
    for count in (1, 2, 3, 5, 32):
        predictor.embed(images[:count])
    assert count_programs(predictor)[0] == len(BUCKETS.images)
    embeddings = predictor.embed(images)
    for num_objects in (1, 2, 5, 11):
        for num_points in (1, 2, 3, 4):
            points = [(1, 1)] * num_points
            predictor.predict(embeddings[:4], [[Prompt(points=points)] * num_objects] * 4)
    assert count_programs(predictor)[1] <= len(BUCKETS.rows) * 2 * len(BUCKETS.points)
    # More points than the last bucket: one program per power of two.
    before = count_programs(predictor)[1]
    for num_points in (5, 6, 7, 8):
        predictor.predict(embeddings[:1], [[Prompt(points=[(1, 1)] * num_points)]])
    assert count_programs(predictor)[1] == before + 1


def test_other_variables_share_what_is_compiled(
    predictor: Predictor, variables: dict[str, Any]
) -> None:
    images, prompts = pictures((20, 24)), [[Prompt(points=[(7, 3)])]]

    def answer(used: Predictor) -> np.ndarray:
        (found,) = used.predict(used.embed(images), prompts)
        return found.low_res_logits

    before, programs = answer(predictor), count_programs(predictor)
    halved = jax.tree.map(lambda leaf: leaf / 2, variables)
    other = predictor.with_variables(halved)
    np.testing.assert_array_equal(answer(other), answer(Predictor(MODEL, halved, BUCKETS)))
    assert not np.allclose(answer(other), before)
    assert count_programs(other) == count_programs(predictor) == programs
    # The first one has kept its own.
    np.testing.assert_array_equal(answer(predictor), before)


def test_a_thousand_prompts_in_one_call(predictor: Predictor) -> None:
    embeddings = predictor.embed(pictures((40, 48)))
    rng = np.random.default_rng(0)
    prompts = [Prompt(points=[point]) for point in rng.uniform(0, 39, (1000, 2))]
    (found,) = predictor.predict(embeddings, [prompts], multimask_output=False)
    (alone,) = predictor.predict(embeddings, [prompts[777:778]], multimask_output=False)
    np.testing.assert_allclose(
        found.low_res_logits[777], alone.low_res_logits[0], rtol=0, atol=2e-5
    )


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "there are 2 images and prompts for 0"),
        ([[], [Prompt(points=[(1, 1)]), Prompt()]], "image 1, prompt 1 is empty"),
    ],
)
def test_mistakes_are_named(
    predictor: Predictor, prompts: Sequence[Sequence[Prompt]], words: str
) -> None:
    embeddings = predictor.embed(pictures((9, 9), (9, 9)))
    with pytest.raises(PromptError, match=words):
        predictor.predict(embeddings, prompts)


def test_embeddings_of_another_model_are_refused(predictor: Predictor) -> None:
    embeddings = predictor.embed(pictures((9, 9)))
    other = dataclasses.replace(embeddings, features=jnp.zeros((1, 4, 4, 32)))
    with pytest.raises(PromptError, match="another model's"):
        predictor.predict(other, [[Prompt(points=[(1, 1)])]])


@pytest.mark.parametrize("sizes", [(), (0, 1), (4, 1), (2, 2)])
def test_buckets_rise(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"buckets\.rows must rise"):
        Buckets(rows=sizes)


def test_warm_up_compiles_what_a_first_user_needs(variables: dict[str, Any]) -> None:
    predictor = Predictor(MODEL, variables, BUCKETS)
    predictor.warm_up()
    programs = count_programs(predictor)
    embeddings = predictor.embed(pictures((33, 21)))
    predictor.predict(embeddings, [[Prompt(points=[(5, 5)])]])
    assert count_programs(predictor) == programs
    jax.block_until_ready(embeddings.features)


def test_devices_share_images_and_rows(predictor: Predictor, variables: dict[str, Any]) -> None:
    if jax.local_device_count() < 2:
        pytest.skip("needs two devices")
    spread = Predictor(MODEL, variables, BUCKETS, devices=jax.local_devices()[:2])
    assert spread.num_devices == 2
    images = pictures(*SIZES)
    prompts = [prompts_for(size) for size in SIZES]
    ours = spread.predict(spread.embed(images), prompts)
    for one, other in zip(ours, predictor.predict(predictor.embed(images), prompts), strict=True):
        np.testing.assert_allclose(one.low_res_logits, other.low_res_logits, rtol=0, atol=2e-5)
        np.testing.assert_allclose(one.iou_predictions, other.iou_predictions, atol=1e-5)


def test_compiled_programs_are_kept(
    variables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    try:
        use_compilation_cache(tmp_path / "programs")
        compilation_cache.reset_cache()
        Predictor(MODEL, variables, BUCKETS).warm_up(points_per_batch=4)
        kept = {path.name for path in (tmp_path / "programs").iterdir()}
        for program in ("_encode_on_device-", "jit_decode-", "_decode_points_on_device-"):
            assert any(program in name for name in kept), kept
        Predictor(MODEL, variables, BUCKETS).warm_up(points_per_batch=4)
        assert {path.name for path in (tmp_path / "programs").iterdir()} == kept
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
