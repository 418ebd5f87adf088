"""Cached image embeddings: what an entry is found by, and what becomes of a damaged one."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax import flop_counts
from sam_jax.data import windows
from sam_jax.data.transforms import LAZY_IMAGES
from sam_jax.data.windows import LazyImage
from sam_jax.errors import ConfigError
from sam_jax.models.sam import Sam
from sam_jax.ops.images import normalize_images
from sam_jax.parallel import Parallel
from sam_jax.trained_parameters import select_trained
from sam_jax.training.embedding_cache import (
    EmbeddingCache,
    EmbeddingStage,
    KnownImages,
    encoder_name,
)
from sam_jax.training.experiment import Experiment, read_config
from sam_jax.training.tasks import segment
from sam_jax.weights.files import WeightsError
from tests.golden.tiny import random_variables
from tests.unit.data_fixtures import write_coco

TINY = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")
CACHED = (
    "model.drop_path_rate=0.0",
    "model.encoder.depth=1",
    "model.encoder.global_attention_blocks=()",
    "train.trainable=('decoder',)",
)


def experiment_of(*settings: str) -> Experiment:
    return Experiment.of(read_config(TINY, [*CACHED, *settings]))


@pytest.fixture(scope="module")
def model() -> Sam:
    return experiment_of().task.model


@pytest.fixture(scope="module")
def variables(model: Sam) -> dict[str, Any]:
    return jax.device_put(random_variables(model.config))


@pytest.fixture(scope="module")
def batch(model: Sam) -> dict[str, np.ndarray]:
    """Three images, of which two are one, and a number for each."""
    height, width = model.image_size
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, height, width - 8, 3), np.uint8)
    images = np.empty(3, object)
    images[:] = [
        LazyImage("a" * 32, first),
        LazyImage("b" * 32, second),
        LazyImage("a" * 32, first),
    ]
    return {LAZY_IMAGES: images, "number": np.arange(3)}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_batches_hold_what_the_encoder_answers(
    tmp_path: Path, model: Sam, variables: dict, batch: dict
) -> None:
    said: list[str] = []
    stage = EmbeddingStage(model, tmp_path)
    (found,) = stage(iter([batch]), variables, said.append)
    assert sorted(found) == ["image_embeddings", "number"]
    np.testing.assert_array_equal(found["number"], batch["number"])
    assert found["image_embeddings"].dtype == np.float16
    pixels = [np.pad(image.pixels(), ((0, 0), (0, 8), (0, 0))) for image in batch[LAZY_IMAGES]]
    sizes = np.tile(np.array([model.image_size[0], model.image_size[1] - 8], np.int32), (3, 1))
    images = normalize_images(jnp.asarray(np.stack(pixels)), jnp.asarray(sizes))
    expected = jax.jit(lambda v, x: model.apply(v, x, method="encode"))(variables, images)
    np.testing.assert_allclose(found["image_embeddings"], expected, rtol=2e-3, atol=2e-3)
    # The third is the first's.
    assert len(files(tmp_path)) == 2
    assert "0 are there" in said[0]

    # The next time in another order, and nothing is computed.
    stage._computed = None  # type: ignore[assignment]
    turned = {name: field[::-1] for name, field in batch.items()}
    (again,) = stage(iter([turned]), variables, said.append)
    np.testing.assert_array_equal(again["image_embeddings"], found["image_embeddings"][::-1])
    assert "2 are there" in said[1]
    known = KnownImages(tmp_path)
    assert ["a" * 32 in known, "b" * 32 in known, "c" * 32 in known] == [True, True, False]
    assert "a" * 32 not in KnownImages(tmp_path / "nowhere")


def test_pixels_are_decoded_once(tmp_path: Path) -> None:
    """The second epoch reads files and masks, and no pixel; other weights embed the same images."""
    path = write_coco(tmp_path / "coco", 4)
    experiment = experiment_of(
        f"train.embedding_cache={tmp_path / 'kept'}",
        f"data.sources=({{'kind': 'coco', 'path': '{path}'}},)",
        "data.scale_jitter=None",
        "data.hflip_rate=0.0",
        "data.color_jitter=0.0",
        "data.batch_size=4",
        "data.prefetch_batches=0",
        "data.prefetch_examples=1",
    )
    model = experiment.task.model
    stage = experiment.stage()
    assert stage is not None

    def of_seed(seed: int) -> dict[str, Any]:
        return jax.device_put(random_variables(model.config, seed))

    with contextlib.closing(experiment.data_iterator()) as data:
        first = next(stage(data, of_seed(0)))
    assert len(files(tmp_path / "kept")) == 4
    with (
        contextlib.closing(experiment.data_iterator()) as data,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(windows, "open_reduced", None)
        again = next(stage(data, of_seed(0)))
    np.testing.assert_array_equal(again["image_embeddings"], first["image_embeddings"])
    np.testing.assert_array_equal(again["masks_packed"], first["masks_packed"])
    with contextlib.closing(experiment.data_iterator()) as data:
        other = next(stage(data, of_seed(1)))
    assert len(files(tmp_path / "kept")) == 8
    assert np.abs(other["image_embeddings"] - first["image_embeddings"]).max() > 1e-2


def test_nothing_is_read_ahead(tmp_path: Path, model: Sam, variables: dict, batch: dict) -> None:
    taken = []

    def batches() -> Any:
        for number in range(3):
            taken.append(number)
            yield batch

    embedded = EmbeddingStage(model, tmp_path)(batches(), variables)
    assert taken == []
    next(embedded)
    assert taken == [0]


@pytest.mark.parametrize("damage", ["cut short", "a bit", "empty", "of another shape"])
def test_a_damaged_entry_is_said_and_made_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EmbeddingCache(tmp_path, "encoder", (2, 3, 4))
    embeddings = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float16)
    cache.write("abc", embeddings)
    np.testing.assert_array_equal(cache.read("abc"), embeddings)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-1] ^= 1
    elif damage == "cut short":
        del content[-8:]
    elif damage == "empty":
        content.clear()
    else:
        EmbeddingCache(tmp_path, "encoder", (1, 3, 4)).write("abc", embeddings[:1])
        content = bytearray(path.read_bytes())
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert cache.read("abc") is None
    assert f"{path} is damaged, and computed again" in caplog.text
    cache.write("abc", embeddings)
    np.testing.assert_array_equal(cache.read("abc"), embeddings)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    cache = EmbeddingCache(tmp_path, "encoder", (1, 1, 1))
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(WeightsError, match="No space left on device"):
        cache.write("abc", np.zeros((1, 1, 1), np.float16))
    assert not files(tmp_path)
    assert cache.read("abc") is None


def test_other_weights_and_types_are_other_encoders(model: Sam, variables: dict) -> None:
    params = variables["params"]["image_encoder"]
    changed = {**params, "pos_embed": params["pos_embed"] + 1e-6}
    half = model.clone(dtype=jnp.bfloat16)
    names = [encoder_name(model, params), encoder_name(model, changed), encoder_name(half, params)]
    assert len(set(names)) == 3
    assert encoder_name(model, jax.device_put(params)) == names[0]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("data.scale_jitter=(0.5, 2.0)", r"data.scale_jitter = \(0.5, 2.0\)"),
        ("data.color_jitter=0.1", "data.color_jitter = 0.1"),
        ("model.drop_path_rate=0.1", "model.drop_path_rate = 0.1"),
    ],
)
def test_images_that_never_come_again_are_refused(setting: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"under {named} none does"):
        experiment_of(setting, f"train.embedding_cache={tmp_path}")
    assert experiment_of("data.hflip_rate=0.5", f"train.embedding_cache={tmp_path}").stage()


def test_an_encoder_that_is_trained_is_refused(tmp_path: Path) -> None:
    experiment = experiment_of(f"train.embedding_cache={tmp_path}", "train.trainable=('all',)")
    with pytest.raises(ConfigError, match="trains image_encoder"):
        experiment.compiled_step(jax.devices()[:1])


def test_rounds_are_given_the_embeddings_of_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RoundsCalledError(Exception):
        pass

    def rounds(params: Any, constants: Any, embeddings: Any, *others: Any) -> None:
        raise RoundsCalledError(embeddings)

    monkeypatch.setattr(segment, "build_rounds", lambda *_, **__: rounds)
    task = experiment_of(f"train.embedding_cache={tmp_path}").task
    spec = task.batch_spec(2)
    assert "image" not in spec
    fields = {name: jnp.ones(field.shape, field.dtype) for name, field in spec.items()}
    params: dict[str, dict] = {"image_encoder": {}, "prompt_encoder": {}, "mask_decoder": {}}
    with pytest.raises(RoundsCalledError) as called:
        task.loss_sums(Parallel(), None)(params, {}, fields, jax.random.key(0))
    (embeddings,) = called.value.args
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, 1.0)
    frozen = experiment_of().task
    trained = select_trained(jax.eval_shape(frozen.init, jax.random.key(0))["params"], ["decoder"])
    encoding = 2 * flop_counts.encoder_flops(task.model.config.image_encoder, useful=True)
    # Without gradients, only the forward pass is spared.
    assert frozen.flops(2, trained) - task.flops(2, trained) == pytest.approx(encoding)
