"""Arguments that are not what is expected: taken where they are clear, else told apart."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sam_jax.errors import ConfigError
from sam_jax.images import ImageError
from sam_jax.inference import automatic
from sam_jax.inference.arguments import images_in
from sam_jax.inference.automatic import AutomaticOptions, generate_masks, generate_masks_of_many
from sam_jax.inference.images import ImageEmbeddings
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.inference.prompts import Prompt, PromptError
from sam_jax.models.sam import Sam
from tests.golden.tiny import SHALLOW, random_variables

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
PROMPT = Prompt(points=[(3, 4)])
FEW = AutomaticOptions(points_per_side=1, points_per_batch=1, pred_iou_thresh=0.0)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(Sam(SHALLOW), random_variables(SHALLOW), Buckets((1,), (1,), (1,), (1,)))


@pytest.fixture(scope="module")
def embeddings(predictor: Predictor) -> ImageEmbeddings:
    return predictor.embed([IMAGE, IMAGE[:10], IMAGE[:, :9]])


class Tensor:
    """As PyTorch's: of a device or with gradients, which numpy cannot read, or plain."""

    def __init__(self, array: np.ndarray, error: Exception | None = None) -> None:
        self.array, self.error = array, error
        self.shape, self.dtype = array.shape, f"torch.{array.dtype}"

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.error is not None:
            raise self.error
        return np.asarray(self.array, dtype)

    def __iter__(self) -> Any:
        return (Tensor(part, self.error) for part in self.array)


ON_GPU = TypeError("can't convert cuda:0 device type tensor to numpy")


@pytest.mark.parametrize(
    ("images", "count"),
    [
        (IMAGE, 1),
        (IMAGE[..., 0], 1),
        (IMAGE[..., :1], 1),
        (np.concatenate([IMAGE, IMAGE[..., :1]], axis=-1), 1),
        (jnp.asarray(IMAGE), 1),
        (Tensor(IMAGE), 1),
        (Image.fromarray(IMAGE), 1),
        ([IMAGE], 1),
        ([Image.fromarray(IMAGE), jnp.asarray(IMAGE)], 2),
        ((IMAGE, IMAGE[..., 0]), 2),
        ((image for image in (IMAGE, IMAGE[:3])), 2),
        (dict.fromkeys("ab", IMAGE).values(), 2),
        (np.stack([IMAGE, IMAGE, IMAGE]), 3),
        (Tensor(np.stack([IMAGE, IMAGE])), 2),
        (np.array([IMAGE, IMAGE[:5], None], object)[:2], 2),
        ([], 0),
        ((), 0),
        (iter(()), 0),
        (np.zeros((0, 4, 4, 3), np.uint8), 0),
    ],
)
def test_images_in_every_form(images: Any, count: int) -> None:
    assert sum(1 for _ in images_in(images)) == count


def test_a_lone_image_is_a_list_of_one(predictor: Predictor) -> None:
    expected = predictor.embed([IMAGE])
    for image in (IMAGE, jnp.asarray(IMAGE), Image.fromarray(IMAGE)):
        found = predictor.embed(image)
        assert len(found) == 1
        np.testing.assert_array_equal(found.features, expected.features)


@pytest.mark.parametrize("images", [IMAGE, Image.fromarray(IMAGE), [IMAGE], np.stack([IMAGE])])
def test_masks_of_a_lone_image_are_those_of_a_list_of_one(
    predictor: Predictor, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def search(
        predictor: Any, batch: Any, options: Any, embeddings: Any, multimask_output: bool
    ) -> None:
        for found, _ in batch:
            sizes.append(found.size)
            found.num_left -= 1

    monkeypatch.setattr(automatic, "_search", search)
    assert list(generate_masks_of_many(predictor, images, FEW)) == [[]]
    assert sizes == [(20, 24)]


WRONG_IMAGES = [
    (None, "is a NoneType: expected an image"),
    (7, "is a int: expected an image"),
    (True, "is a bool: expected an image"),
    ("cat.jpg", r"is 'cat\.jpg', no image: if that is a file, give sam_jax\.images\.read_image"),
    (Path("a/cat.jpg"), r"is 'a/cat\.jpg', no image: if that is a file"),
    (b"cat.jpg", r"is b'cat\.jpg', no image"),
    ({1, 2}, "is a set: expected an image"),
    (object(), "is a object: expected an image"),
    (PROMPT, "is a Prompt: expected an image"),
    (Tensor(IMAGE, ON_GPU), "is a Tensor that cannot be made a numpy array: can't convert cuda"),
    (
        Tensor(IMAGE, RuntimeError("requires grad")),
        "is a Tensor that cannot be made",
    ),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG_IMAGES)
def test_what_is_no_image_is_told(predictor: Predictor, wrong: Any, words: str) -> None:
    for call in (
        lambda: predictor.embed(wrong),
        lambda: generate_masks(predictor, wrong, FEW),
        lambda: list(generate_masks_of_many(predictor, wrong, FEW)),
    ):
        with pytest.raises(ImageError, match=rf"^images? (0 )?{words}"):
            call()
    for images in ([IMAGE, wrong], (image for image in (IMAGE, wrong))):
        with pytest.raises(ImageError, match=f"^image 1 {words}"):
            predictor.embed(images)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"a": IMAGE}, r"images is a mapping.*list\(images\.values\(\)\)"),
        ([[IMAGE]], "image 0 is a list of 1, no image: give a flat list"),
        ([(IMAGE, IMAGE)], "image 0 is a tuple of 2, no image"),
        ([{"image": IMAGE}], "image 0 is a dict: expected an image"),
        (np.zeros(5, np.uint8), r"one array of shape \(5,\), which is neither an image"),
        (np.uint8(3), r"one array of shape \(\)"),
        # Channels first, or grey images: nobody can tell.
        (
            IMAGE.transpose(2, 0, 1),
            r"one array of shape \(3, 20, 24\).*as a list: \[image, other\]",
        ),
        (np.zeros((2, 3, 4, 5, 3), np.uint8), r"shape \(2, 3, 4, 5, 3\)"),
        (np.array([IMAGE, None], object), "image 1 is a NoneType"),
        (jax.ShapeDtypeStruct((4, 4, 3), np.uint8), "image 0 is a ShapeDtypeStruct"),
    ],
)
def test_lists_that_are_none(predictor: Predictor, wrong: Any, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        predictor.embed(wrong)
    with pytest.raises(ImageError, match=words):
        list(generate_masks_of_many(predictor, wrong, FEW))


def test_a_traced_image_is_told(predictor: Predictor) -> None:
    with pytest.raises(ImageError, match="cannot be made a numpy array"):
        jax.jit(lambda image: predictor.embed(image).features)(IMAGE)


def test_embeddings_are_no_images(predictor: Predictor, embeddings: ImageEmbeddings) -> None:
    for images in (embeddings, [embeddings]):
        with pytest.raises(ImageError, match="embedded already: give the embeddings to predict"):
            predictor.embed(images)


def test_many_images_for_one_are_told_where_to_go(predictor: Predictor) -> None:
    for images in ([IMAGE], (IMAGE, IMAGE), []):
        with pytest.raises(ImageError, match="takes one image, generate_masks_of_many several"):
            generate_masks(predictor, images, FEW)


@pytest.mark.parametrize("which", [0, -1, np.int64(2), [1], np.array(1), slice(1, 2)])
def test_embeddings_of_one_image_are_embeddings(
    predictor: Predictor, embeddings: ImageEmbeddings, which: Any
) -> None:
    one = embeddings[which]
    assert len(one) == 1
    index = np.atleast_1d(np.arange(3)[which])[0]
    np.testing.assert_array_equal(one.features[0], embeddings.features[index])
    assert one.original_hw.shape == one.resized_hw.shape == (1, 2)
    (found,) = predictor.predict(one, [[PROMPT]])
    together = predictor.predict(embeddings, [[PROMPT]] * 3)[index]
    np.testing.assert_allclose(found.low_res_logits, together.low_res_logits, rtol=0, atol=2e-5)


def test_embeddings_are_gone_through_one_by_one(embeddings: ImageEmbeddings) -> None:
    assert [one.original_hw.tolist() for one in embeddings] == [
        [hw] for hw in embeddings.original_hw.tolist()
    ]
    assert len(embeddings[[]]) == 0
    assert len(embeddings[np.array([True, False, True])]) == 2
    with pytest.raises(IndexError):
        embeddings[3]
    for wrong in (None, True, [[0, 1]]):
        with pytest.raises(TypeError, match="by a number, a slice or a list of numbers"):
            embeddings[wrong]


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, "prompts is a NoneType; give a list for each image"),
        (PROMPT, r"prompts is a lone Prompt; .* here \[\[prompt\]\]"),
        ([PROMPT] * 3, "a list of 3 prompts, which does not say whose"),
        ([PROMPT], "a list of 1 prompts, which does not say whose"),
        ([[PROMPT], PROMPT, []], "prompts of image 1 are a lone Prompt"),
        ([[PROMPT], None, []], "prompts of image 1 are a NoneType"),
        ([[PROMPT], [(3, 4)], []], r"image 1, prompt 0 is a tuple; expected a Prompt, as in"),
        ([[PROMPT], [{"points": [(3, 4)]}], []], "image 1, prompt 0 is a dict"),
        ([[[PROMPT]], [], []], "image 0, prompt 0 is a list"),
        ({0: [PROMPT]}, "prompts is a dict; give a list"),
        ("click", "prompts is a str; give a list"),
        ([[PROMPT]], "there are 3 images and prompts for 1"),
        (7, "prompts is a int"),
        (np.float32(3), "prompts is a float32"),
        (np.zeros((3, 1, 2)), "image 0, prompt 0 is a ndarray; expected a Prompt"),
    ],
)
def test_prompts_that_are_none(
    predictor: Predictor, embeddings: ImageEmbeddings, prompts: Any, words: str
) -> None:
    with pytest.raises(PromptError, match=words):
        predictor.predict(embeddings, prompts)


def test_prompts_may_be_anything_that_lists_them(
    predictor: Predictor, embeddings: ImageEmbeddings
) -> None:
    listed = predictor.predict(embeddings, [[PROMPT], [], [PROMPT]])
    given = predictor.predict(embeddings, (iter(x) for x in ([PROMPT], (), {PROMPT: 0}.keys())))
    assert [len(p) for p in given] == [len(p) for p in listed] == [1, 0, 1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"points": "ab"}, "points: expected numbers"),
        ({"points": (320, 200)}, r"points have shape \(2,\), expected \[n, 2\]"),
        ({"points": Tensor(np.ones((1, 2)), ON_GPU)}, "points: expected numbers"),
        ({"points": (x for x in ())}, "points: expected numbers"),
        ({"points": [(1, 1)], "labels": [[1], [1, 0]]}, "labels: expected an array, got a list"),
        ({"points": [(1, 1)], "labels": "x"}, "label 'x' must be 1"),
        ({"box": {"x": 1}}, "the box: expected numbers"),
        ({"box": Tensor(np.ones(4), RuntimeError("requires grad"))}, "the box: expected numbers"),
        ({"mask": [[1], [1, 0]]}, "the mask: expected an array, got a list"),
        ({"mask": Tensor(np.ones((9, 9)), ON_GPU)}, "the mask: expected an array, got a Tensor"),
        ({"mask": "mask.png"}, "the mask is <U8"),
        ({"points": None}, "is empty: give points, a box or a mask"),
    ],
)
def test_prompts_of_the_wrong_kind_are_named(
    predictor: Predictor, embeddings: ImageEmbeddings, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(PromptError, match=f"^image 0, prompt 0:? ?{words}"):
        predictor.predict(embeddings[0], [[Prompt(**fields)]])


def test_no_points_may_be_said_as_none(predictor: Predictor, embeddings: ImageEmbeddings) -> None:
    prompt = Prompt(points=None, labels=None, box=(1, 1, 9, 9), mask=None)
    (found,) = predictor.predict(embeddings[0], [[prompt]])
    assert len(found) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (None, "embeddings is a NoneType: expected what embed"),
        (IMAGE, "embeddings is a ndarray: expected what embed"),
        ([IMAGE], "embeddings is a list: expected what embed"),
    ],
)
def test_embeddings_that_are_none(predictor: Predictor, wrong: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        predictor.predict(wrong, [[PROMPT]])
    if wrong is not None:
        with pytest.raises(PromptError, match=words):
            generate_masks(predictor, IMAGE, FEW, embeddings=wrong)


def test_a_list_of_embeddings_is_told(predictor: Predictor, embeddings: ImageEmbeddings) -> None:
    for many in ([embeddings[0]], (embeddings[0], embeddings[1])):
        with pytest.raises(PromptError, match=r"embed the images together.* predict for each"):
            predictor.predict(many, [[PROMPT]] * len(many))


def test_candidates_are_wanted_or_not(predictor: Predictor, embeddings: ImageEmbeddings) -> None:
    for wrong in (None, "yes", [True], 3):
        with pytest.raises(PromptError, match=r"multimask_output is .* expected True or False"):
            predictor.predict(embeddings, [[PROMPT]] * 3, multimask_output=wrong)
    (found, *_) = predictor.predict(embeddings, [[PROMPT]] * 3, multimask_output=np.bool_(False))
    assert found.iou_predictions.shape == (1, 1)


def test_points_are_of_each_image(predictor: Predictor, embeddings: ImageEmbeddings) -> None:
    with pytest.raises(PromptError, match="there are 3 images and points for 1"):
        list(
            predictor.predict_points(
                embeddings, [np.zeros((1, 2))], points_per_batch=1, iou_threshold=0.0
            )
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"options": {"points_per_side": 16}}, "options is a dict; expected AutomaticOptions"),
        ({"output_mode": "polygon"}, "output_mode is 'polygon'; expected 'binary_mask' or"),
        ({"output_mode": None}, "output_mode is None; expected"),
    ],
)
def test_how_masks_are_searched_for(
    predictor: Predictor, arguments: dict[str, Any], words: str
) -> None:
    for generate in (generate_masks, generate_masks_of_many):
        with pytest.raises(ConfigError, match=words):
            generate(predictor, IMAGE, **arguments)
