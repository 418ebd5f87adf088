"""Protocols and evaluator, with a model whose answers can be worked out by hand."""

import dataclasses
import functools
import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from PIL import Image
from pycocotools import mask as coco_mask

from sam_jax.configuration import from_mapping
from sam_jax.data.corruption import NoObjectsError
from sam_jax.errors import ConfigError
from sam_jax.evaluation.prompted import EvalConfig, PromptedMasks
from sam_jax.evaluation.protocols import PROTOCOLS
from sam_jax.evaluation.protocols.protocol import EvalProtocol, ProtocolContext
from sam_jax.evaluation.run import (
    EvaluationInterruptedError,
    Evaluator,
    build_evaluators,
    model_identity,
)
from sam_jax.evaluation.targets import EvalImage, NotFiniteError, TargetMask, make_batches
from sam_jax.inference.predictor import Buckets, Predictor
from sam_jax.models.image_encoder import ImageEncoderConfig
from sam_jax.models.mask_decoder import MaskPrediction
from sam_jax.models.masked_autoencoder import AutoencoderConfig, MaskedAutoencoder
from sam_jax.models.sam import Sam, SamConfig, init_variables

# 32 x 48 pixels of model input, cells of 16, low-resolution logits of 8 x 12: one for 4 x 4 pixels,
# whose colours are the channels of the embeddings.
CONFIG = SamConfig(ImageEncoderConfig(image_size=(32, 48), output_dim=4 * 4 * 3))
COLORS = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [250, 250, 20]], np.uint8)
ONE_DEVICE = jax.local_devices()[:1]


class ColorSam(Sam):
    """Answers a click with all that has the clicked colour, less the colours clicked as background.

    Its three candidates are that, everything and nothing; which of them it believes in is a
    variable. Boxes are answered with themselves.

    Attributes:
      remembers: whether it takes all points into account, or the newest one only and the mask.
    """

    remembers: bool = True

    def setup(self):
        pass

    def encode(self, images, path_scales=None):
        return rearrange(images[:, 2::4, 2::4], "b (gh y) (gw x) c -> b gh gw (y x c)", y=4, x=4)

    def decode(self, image_embeddings, prompts, *, multimask_output, dropout_seeds=None):
        colors = rearrange(image_embeddings, "b gh gw (y x c) -> b (gh y) (gw x) c", y=4, x=4)
        in_box = self._inside(colors, prompts.boxes_xyxy) & prompts.box_valid[..., None, None]
        found = in_box | self._clicked(colors, prompts)
        logits = jnp.where(found, 1.0, -1.0)[:, :, None]
        if multimask_output:
            logits = jnp.concatenate(
                [logits, jnp.ones_like(logits), -jnp.ones_like(logits)], axis=2
            )
        favourite: jax.Array = self.get_variable("params", "favourite")
        believed = jnp.broadcast_to(favourite[: logits.shape[2]], logits.shape[:3])
        return MaskPrediction(low_res_logits=logits, iou_predictions=believed)

    def _inside(self, embeddings, boxes):
        h, w = embeddings.shape[1:3]
        rows, columns = 4 * jnp.arange(h) + 1.5, 4 * jnp.arange(w) + 1.5
        x0, y0, x1, y1 = jnp.moveaxis(boxes, -1, 0)[..., None]
        inside_rows = (rows >= y0) & (rows <= y1)
        inside_columns = (columns >= x0) & (columns <= x1)
        return inside_rows[..., :, None] & inside_columns[..., None, :]

    def _clicked(self, embeddings, prompts):
        cell = ((prompts.point_coords + 0.5) // 4).astype(int)
        images = jnp.arange(embeddings.shape[0])[:, None, None]
        colors = embeddings[images, cell[..., 1], cell[..., 0]]
        difference = embeddings[:, None, None] - colors[:, :, :, None, None]
        same = jnp.max(jnp.abs(difference), axis=-1) < 0.1
        used = prompts.point_valid
        if not self.remembers:
            used &= jnp.cumsum(used[..., ::-1], axis=-1)[..., ::-1] == 1
        same &= used[..., None, None]
        wanted = (prompts.point_labels == 1)[..., None, None]
        found = jnp.any(same & wanted, axis=2)
        if prompts.mask_logits is not None and not self.remembers:
            found |= (prompts.mask_logits > 0) & prompts.mask_valid[..., None, None]
        return found & ~jnp.any(same & ~wanted, axis=2)


def variables(favourite=0):
    return {"params": {"favourite": jnp.eye(4)[favourite]}, "constants": {}}


def striped_image(widths, masks, name="image.png"):
    """Vertical stripes of the four colours in turn; masks are tuples of stripes."""
    stripes = np.repeat(np.arange(len(widths)), widths)
    pixels = np.broadcast_to(COLORS[stripes % 4], (32, len(stripes), 3))
    truth = np.stack(
        [np.broadcast_to(np.isin(stripes, mask), (32, len(stripes))) for mask in masks]
    )
    return EvalImage(
        dataset="stripes",
        name=name,
        pixels=np.ascontiguousarray(pixels),
        masks=np.ascontiguousarray(truth),
        mask_indices=tuple(range(len(masks))),
    )


@functools.cache
def predictor_of(model, num_rows, row_length):
    """A predictor of a model, to be given variables: what it compiles is compiled once."""
    buckets = Buckets(images=(num_rows,), rows=(num_rows,), prompts=(row_length,), points=(1, 4))
    return Predictor(model, variables(), buckets)


def outcomes_of(protocol, images, *, model=None, favourite=0, seed=0, num_rows=1, row_length=3):
    """Outcomes of images that are embedded together."""
    predictor = predictor_of(model or ColorSam(CONFIG), num_rows, row_length).with_variables(
        variables(favourite)
    )
    with ThreadPoolExecutor(2) as pool:
        context = ProtocolContext(predictor, (1, 2, 3, 4), seed, pool)
        batches = make_batches(predictor, images, num_rows=num_rows, row_length=row_length)
        return [outcome for batch in batches for outcome in PROTOCOLS[protocol].run(batch, context)]


def click_scores(image, protocol="center", remembers=True, **options):
    model = ColorSam(CONFIG, remembers=remembers)
    return outcomes_of(protocol, [image], model=model, **options)


def test_a_model_that_is_right_scores_one():
    """On an image that is neither square nor fills the model's input."""
    image = striped_image([8, 12, 16], [(0,), (1,), (2,)])
    outcomes = click_scores(image)
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert set(outcome.ious.values()) == {1.0}
        np.testing.assert_array_equal(outcome.prediction, outcome.target.ground_truth)
        # Whoever sees a perfect answer stops clicking, and the score stays.
        assert len(outcome.clicks) == 1
        assert list(outcome.ious) == ["center_1_oracle", *(f"center_{n}" for n in (1, 2, 3, 4))]


def test_every_click_adds_what_it_should():
    # The mask is the stripes 0, 1 and 3, of 8, 16 and 12 pixels; the first click hits the widest.
    (outcome,) = click_scores(striped_image([8, 16, 8, 12], [(0, 1, 3)]))
    assert outcome.ious["center_1_oracle"] == 36 / 44  # "everything" is better than one stripe
    assert outcome.ious["center_1"] == 16 / 36
    assert outcome.ious["center_2"] == 28 / 36
    assert outcome.ious["center_3"] == 1
    assert outcome.ious["center_4"] == 1
    assert [click.is_foreground for click in outcome.clicks] == [True] * 3
    # Stripes 0 and 1 touch, so the first click lies 12 pixels deep in both, on stripe 1.
    assert [click[:2] for click in outcome.clicks] == [(11, 11), (37, 5), (3, 3)]


def test_the_models_favourite_counts_at_the_first_click():
    (outcome,) = click_scores(striped_image([8, 16, 8, 12], [(1,)]), favourite=1)
    assert outcome.ious["center_1"] == 16 / 44
    assert outcome.ious["center_1_oracle"] == 1
    # Later clicks are answered by the single mask: the second click says what is too much.
    assert outcome.clicks[1].is_foreground is False
    assert outcome.ious["center_2"] == 1


def test_a_favourite_of_nothing_scores_zero():
    (outcome,) = click_scores(striped_image([8, 16], [(1,)]), favourite=2)
    assert outcome.ious["center_1"] == 0
    assert outcome.clicks[1].is_foreground is True


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [("center", [16, 28, 36, 36]), ("center_points_only", [16, 12, 16, 12])],
)
def test_logits_are_fed_back_or_not(protocol, expected):
    """A model that forgets its earlier points gets on only by the mask that it is given."""
    (outcome,) = click_scores(
        striped_image([8, 16, 8, 12], [(0, 1, 3)]), protocol=protocol, remembers=False
    )
    scores = [round(36 * outcome.ious[f"{protocol}_{n}"], 9) for n in (1, 2, 3, 4)]
    assert scores == expected


def test_clicks_and_scores_are_at_the_original_resolution():
    """An image of twice the model's size: stripes of 4 cells are 32 original pixels."""
    small = striped_image([16, 16], [(1,)])
    large = dataclasses.replace(
        small,
        pixels=small.pixels.repeat(2, 0).repeat(2, 1),
        masks=small.masks.repeat(2, 1).repeat(2, 2),
    )
    (outcome,) = click_scores(large)
    assert outcome.clicks[0][:2] == (47, 15)
    assert outcome.ious["center_1"] == 1
    assert outcome.prediction.shape == (64, 64)


def test_boxes_are_tight_and_answered_once():
    image = striped_image([8, 12, 16], [(1,), (0, 2)])
    assert TargetMask(image, 0).box_xyxy == (8, 0, 19, 31)
    outcomes = outcomes_of("box", [image])
    assert outcomes[0].ious == {"box": 1.0, "box_oracle": 1.0}
    # The box around the outer stripes holds the middle one too.
    assert outcomes[1].ious == {"box": 24 / 36, "box_oracle": 24 / 36}
    assert outcomes[1].clicks == ()


@pytest.mark.parametrize("shape", [(1, 3), (1, 7), (4, 2), (2, 16)])
def test_ragged_batches_are_exact(shape):
    """Images with 7, 1 and 4 masks, in rows that they do not fill."""
    rng = np.random.default_rng(3)
    images = []
    for index, num_masks in enumerate([7, 1, 4]):
        masks = [tuple(np.flatnonzero(rng.random(6) < 0.5)) or (0,) for _ in range(num_masks)]
        images.append(striped_image([8, 4, 12, 8, 4, 8], masks, name=f"{index}.png"))

    def scores(num_rows, row_length):
        found = {}
        for first in range(0, 3, num_rows):
            group = images[first : first + num_rows]
            for protocol in ("center", "random"):
                for outcome in outcomes_of(
                    protocol, group, seed=5, num_rows=num_rows, row_length=row_length
                ):
                    found[protocol, outcome.target.key] = (outcome.ious, outcome.clicks)
        return found

    alone = scores(1, 1)
    assert len(alone) == 2 * 12
    assert len({ious["center_1"] for (p, _), (ious, _) in alone.items() if p == "center"}) > 4
    assert scores(*shape) == alone


def test_answers_that_are_no_numbers_are_an_error():
    image = striped_image([8, 16], [(1,)])

    class Diverged(ColorSam):
        def decode(self, *arguments, **options):
            answer = super().decode(*arguments, **options)
            return answer.replace(low_res_logits=jnp.nan * answer.low_res_logits)

    for protocol in ("center", "box"):
        with pytest.raises(NotFiniteError, match=r"stripes/image\.png/0: .* not finite"):
            outcomes_of(protocol, [image], model=Diverged(CONFIG))


def test_the_table_holds_protocols_by_their_names():
    for name, protocol in PROTOCOLS.items():
        assert isinstance(protocol, EvalProtocol)
        assert protocol.name == name
        assert protocol.columns((), (1, 2)) == {}
        assert protocol.curves({}, (1, 2)) == []
        assert protocol.headline((1, 2)).startswith(name)


def test_random_first_clicks_depend_on_mask_and_seed_alone():
    image = striped_image([8, 16, 12, 12], [(0,), (1,), (2,), (3,)])
    swapped = dataclasses.replace(image, masks=image.masks[::-1].copy(), mask_indices=(3, 2, 1, 0))
    moved = dataclasses.replace(image, name="/elsewhere/image.png")
    clicks = [
        {o.target.key: o.clicks[0] for o in click_scores(i, protocol="random")}
        for i in (image, swapped, moved)
    ]
    assert clicks[0] == clicks[1] == clicks[2]
    assert len({click.y for click in clicks[0].values()}) > 1


def write_dataset(folder, images):
    """Images as a COCO dataset; returns the config of its source."""
    (folder / "images").mkdir(parents=True)
    annotations = []
    for index, image in enumerate(images):
        Image.fromarray(image.pixels).save(folder / "images" / image.name)
        for mask in image.masks:
            encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
            annotations.append({"image_id": index, "segmentation": segmentation})
    content = {
        "images": [
            {"id": i, "file_name": image.name, "height": 32, "width": image.pixels.shape[1]}
            for i, image in enumerate(images)
        ],
        "annotations": annotations,
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return {"kind": "coco", "name": folder.name, "path": str(folder / "instances.json")}


@pytest.fixture
def two_sources(tmp_path):
    nothing = np.zeros((1, 32, 24), bool)
    stripes = [
        striped_image([8, 16, 8, 12], [(0, 1, 3), (1,)], "a.png"),
        striped_image([24, 24], [(0,)], "b.png"),
        striped_image([8, 16, 24], [(0, 2), (1,), (2,), (0, 1)], "c.png"),
    ]
    others = [striped_image([12, 12], [(1,)], "a.png")]
    others[0] = dataclasses.replace(others[0], masks=np.concatenate([others[0].masks, nothing]))
    return (
        write_dataset(tmp_path / "stripes", stripes),
        write_dataset(tmp_path / "others", others),
    )


def evaluator(sources, model=None, devices=ONE_DEVICE, **changes):
    fields = {"sources": sources, "num_clicks": (1, 2, 3), "num_examples": 0} | changes
    config = from_mapping(EvalConfig, fields, "evals.test")
    return Evaluator(model or ColorSam(CONFIG), PromptedMasks(config), devices=devices)


def test_what_a_source_leaves_out_is_in_the_report(two_sources):
    path = Path(two_sources[0]["path"])
    content = json.loads(path.read_text())
    content["images"].append({"id": 99, "file_name": "d.png", "height": 4, "width": 4})
    content["annotations"].append({"image_id": 77, "segmentation": [[0, 0, 4, 0, 4, 4]]})
    path.write_text(json.dumps(content))
    report = evaluator(two_sources[:1])(variables())
    assert report.datasets[0].skipped == {
        "annotations of an image that is not in the file": 1,
        "images without an annotation in use": 1,
    }
    assert "'d.png'" in report.datasets[0].examples["images without an annotation in use"]


def test_a_dataset_without_any_mask_is_an_error(two_sources):
    path = Path(two_sources[1]["path"])
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][1:]
    path.write_text(json.dumps(content))
    with pytest.raises(
        NoObjectsError,
        match=r"(?s)others: none of 1 samples .*1 images without an object \(only empty masks\)",
    ):
        evaluator(two_sources)(variables())


def test_report_by_hand(two_sources):
    report = evaluator(two_sources, baselines=("box_filled", "disk"))(variables())
    stripes, others = report.datasets
    assert (stripes.name, stripes.num_images, stripes.num_masks) == ("stripes", 3, 7)
    assert (others.name, others.num_images, others.num_masks) == ("others", 1, 1)
    assert stripes.skipped == {}
    assert others.skipped == {"masks (empty)": 1}
    assert list(others.examples) == ["masks (empty)"]
    assert others.examples["masks (empty)"].endswith("a.png: mask 1")
    # Masks of two or three stripes start with the widest: 16 / 36, 24 / 32 and 16 / 24.
    assert stripes.miou["center_1"] == pytest.approx((4 + 16 / 36 + 24 / 32 + 16 / 24) / 7)
    assert stripes.miou["center_2"] == pytest.approx((6 + 28 / 36) / 7)
    assert stripes.miou["center_3"] == 1
    assert others.miou["center_1"] == 1
    boxes = (36 / 44 + 1 + 1 + 32 / 48 + 1 + 1 + 1) / 7
    assert stripes.miou["box_filled"] == stripes.miou["box"] == pytest.approx(boxes)
    assert report.mean["center_1"] == pytest.approx((stripes.miou["center_1"] + 1) / 2)
    flat = report.as_flat_dict()
    assert flat["stripes/center_1"] == stripes.miou["center_1"]
    assert flat["mean/box"] == report.mean["box"]
    assert not [name for name in flat if "@" in name]
    # The disk is the best of all on average, so no smaller or larger one is.
    rate = report.disk_radius_rates["disk_center"]
    assert 0.01 <= rate <= 0.5
    assert 0.2 < others.miou["disk_center"] < 1


def test_equal_reports_however_the_masks_are_batched(two_sources):
    changes = {"baselines": ("disk",), "protocols": ("random", "center_points_only", "box")}
    reports = [
        evaluator(two_sources, devices=devices, images_per_call=b, prompts_per_call=p, **changes)(
            variables()
        )
        for b, p, devices in ((1, 3, ONE_DEVICE), (4, 7, ONE_DEVICE), (3, 2, None))
    ]
    assert reports[0].datasets == reports[1].datasets == reports[2].datasets
    assert reports[0].mean == reports[1].mean == reports[2].mean


def test_second_call_compiles_nothing_and_depends_on_the_variables_alone(two_sources):
    evaluate = evaluator(two_sources, baselines=("box_filled",), images_per_call=2)
    first = evaluate(variables())
    with jax.log_compiles(), _no_compilation():
        worse = evaluate(variables(favourite=2))
        again = evaluate(variables())
    assert worse.mean["center_1"] == 0
    assert worse.mean["box_filled"] == first.mean["box_filled"]
    assert again == first


@pytest.mark.parametrize("num_clicks", [(1, 2), (1, 3, 6)])
def test_programs_are_as_many_as_kinds_of_prompts(two_sources, num_clicks):
    """Whatever the images hold and however many clicks are made."""
    evaluate = evaluator(
        two_sources,
        ColorSam(CONFIG, remembers=False),
        protocols=tuple(PROTOCOLS),
        num_clicks=num_clicks,
        images_per_call=2,
        prompts_per_call=2,
    )
    evaluate(variables())
    assert evaluate._predictor._encode._cache_size() == 1
    # First click or box; all clicks; all clicks and logits.
    assert evaluate._predictor._decode._cache_size() == 3


class _no_compilation:  # noqa: N801
    """Fails if XLA compiles anything meanwhile."""

    def __enter__(self):
        self.compiled = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.compiled.append(kwargs)

    def __exit__(self, *exception):
        jax.monitoring.unregister_event_duration_listener(self._listen)
        assert not self.compiled


def test_images_of_few_masks_share_a_call(two_sources, monkeypatch):
    """And what they are scored with is the same: only calls are saved."""
    predict, calls, scores = Predictor.predict, [], []

    def counting(self, embeddings, prompts, **options):
        calls[-1].append([len(of_image) for of_image in prompts if of_image])
        return predict(self, embeddings, prompts, **options)

    monkeypatch.setattr(Predictor, "predict", counting)
    for number in (1, 4, 12):
        options = {"protocols": ("box",), "images_per_call": 1, "prompts_per_call": number}
        calls.append([])
        scores.append(evaluator(two_sources, **options)(variables()).mean)
    assert scores[0] == scores[1] == scores[2]
    # Images with 2, 1, 4 and 1 masks: one by one; an image in a row; three rows of up to four.
    # Two batches are under way at once, in any order.
    assert calls[0] == [[1], [1], [1], [1], [1], [1], [1], [1]]
    assert sorted(calls[1]) == [[1], [1], [2], [4]]
    assert sorted(calls[2]) == [[1], [2, 1, 4]]


class Stops(Predictor):
    """A predictor that fails after some calls of its encoder."""

    num_calls_left = 0

    def embed(self, images):
        if not self.num_calls_left:
            raise KeyboardInterrupt
        self.num_calls_left -= 1
        return super().embed(images)


@pytest.mark.parametrize("num_images_first", range(5))
def test_an_evaluation_that_was_stopped_goes_on(two_sources, tmp_path, num_images_first):
    """At any point; nothing is done twice, and all that is written is the same."""
    alone = {"images_per_call": 1, "prompts_per_call": 1}
    config = from_mapping(EvalConfig, {"sources": two_sources, **alone}, "evals.test")
    evaluation = PromptedMasks(config)
    predictor = Stops(ColorSam(CONFIG), variables(), evaluation.buckets(1), devices=ONE_DEVICE)
    evaluate = Evaluator(ColorSam(CONFIG), evaluation, predictor=predictor)
    predictor.with_variables = lambda variables: predictor
    predictor.num_calls_left = 4
    whole = evaluate(variables(), tmp_path / "whole")
    predictor.num_calls_left = num_images_first
    if num_images_first < 4:
        with pytest.raises(EvaluationInterruptedError, match="of 4 examples are recorded"):
            evaluate(variables(), tmp_path / "stopped")
    records = list((tmp_path / "stopped").glob("records-*/*.jsonl"))
    num_done = sum(len(file.read_text().splitlines()) for file in records)
    predictor.num_calls_left = 4 - num_done
    resumed = evaluate(variables(), tmp_path / "stopped")
    assert predictor.num_calls_left == 0
    assert resumed == whole
    contents = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "stopped")
    ]
    for content in contents:
        del content["seconds"]
    assert contents[0] == contents[1]
    for name in ("examples.png", "curves.png"):
        assert len({(tmp_path / f / name).read_bytes() for f in ("whole", "stopped")}) == 1


def test_reports_say_what_they_are_of(two_sources, tmp_path):
    evaluate = evaluator(two_sources, protocols=("box",))
    evaluate(variables(), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["kind"] == "prompts"
    records = tmp_path / content["records"] / "host-00000.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [len(line["masks"]) for line in lines] == [2, 1, 4, 1]
    assert [line["dataset"] for line in lines] == ["stripes"] * 3 + ["others"]
    reason, case = lines[3]["remarked"]["masks"][0]
    assert (reason, case.rpartition("/")[2]) == ("empty", "a.png: mask 1")
    # Other weights do not find these records, nor lose them.
    evaluate(variables(favourite=2), tmp_path)
    assert len(list(tmp_path.glob("records-*"))) == 2
    assert json.loads((tmp_path / "report.json").read_text())["records"] != content["records"]


def test_records_of_another_model_are_left_alone(two_sources, tmp_path):
    """Models of the same variables: one of another type, one for images of another size."""
    other_size = SamConfig(dataclasses.replace(CONFIG.image_encoder, image_size=(64, 64)))
    models = [
        ColorSam(CONFIG),
        ColorSam(CONFIG, dtype=jnp.bfloat16),
        ColorSam(other_size),
        # The same answers, in other ways.
        ColorSam(CONFIG, remat="block", scan=True),
    ]
    names = []
    for model in models:
        evaluator(two_sources, model, protocols=("box",))(variables(), tmp_path)
        names.append(json.loads((tmp_path / "report.json").read_text())["records"])
    assert len(set(names)) == 3
    assert names[0] == names[3]


def test_corrected_annotations_are_scored_anew(two_sources, tmp_path):
    def run():
        evaluator(two_sources, protocols=("box",))(variables(), tmp_path / "out")
        return json.loads((tmp_path / "out/report.json").read_text())

    before, again = run(), run()
    assert again["records"] == before["records"]
    path = Path(two_sources[0]["path"])
    content = json.loads(path.read_text())
    del content["annotations"][3:5]
    path.write_text(json.dumps(content))
    after = run()
    assert after["records"] != before["records"]
    assert [d["num_masks"] for d in before["datasets"].values()] == [7, 1]
    assert [d["num_masks"] for d in after["datasets"].values()] == [5, 1]


def test_a_mask_that_is_gone_is_no_example(two_sources):
    """Records of before the annotations changed, as a program may hand them on."""
    config = EvalConfig(two_sources, ("box",), num_clicks=(1,), num_examples=1)
    evaluation = PromptedMasks(config)
    predictor = Predictor(ColorSam(CONFIG), variables(), evaluation.buckets(1))
    records = list(evaluation.records(predictor, range(4)))
    for record in records:
        record["masks"][0]["mask"] += 9
    with pytest.raises(ConfigError, match=r"has . masks now; expected a mask .* changed since"):
        evaluation.report(records, 0.0)


def test_a_models_identity_says_what_answers_depend_on():
    encoder = dataclasses.replace(TINY.image_encoder, image_size=(32, 32))
    found = model_identity(MaskedAutoencoder(encoder))
    assert set(found) == {"encoder", "config", "channels", "dtype"}
    assert found["dtype"] == "float32"
    assert model_identity(MaskedAutoencoder(encoder, scan=True)) == found
    for change in ({"config": AutoencoderConfig(mask_rate=0.5)}, {"dtype": jnp.bfloat16}):
        assert model_identity(MaskedAutoencoder(encoder, **change)) != found


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "edge"}, r"evals\.x\.kind is 'edge'; there are prompts"),
        ({"source": ()}, r"evals\.x has no field 'source'; did you mean 'sources'"),
    ],
)
def test_sections_that_name_nothing_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        build_evaluators({"x": section}, ColorSam(CONFIG))


@pytest.mark.parametrize(
    ("changes", "num_images", "num_masks"),
    [({"max_images": 2}, [2, 1], None), ({"max_masks_per_image": 1}, [3, 1], [3, 1])],
)
def test_limits_draw_the_same_subset_every_time(two_sources, changes, num_images, num_masks):
    reports = [
        evaluator(two_sources, seed=seed, protocols=("center",), **changes)(variables())
        for seed in (0, 0, 1, 2, 3)
    ]
    assert [d.num_images for d in reports[0].datasets] == num_images
    if num_masks is not None:
        assert [d.num_masks for d in reports[0].datasets] == num_masks
    assert reports[0].datasets == reports[1].datasets
    assert len({report.mean["center_1"] for report in reports}) > 1


def test_pictures_are_made_on_request(two_sources):
    report = evaluator(two_sources, num_examples=2)(variables())
    assert set(report.pictures) == {"examples", "curves"}
    for picture in report.pictures.values():
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
    assert evaluator(two_sources)(variables()).pictures == {}
    only_boxes = evaluator(two_sources, num_examples=1, protocols=("box",))(variables())
    assert set(only_boxes.pictures) == {"examples"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocols": ("centre",)}, "centre"),
        ({"protocols": ()}, "needs a protocol"),
        ({"baselines": ("grabcut",)}, "box_grabcut"),
        ({"num_clicks": (1, 3, 2)}, "rise"),
        ({"num_clicks": ()}, "rise"),
        ({"num_clicks": (0, 1)}, "rise"),
        ({"max_images": 0}, "at least 1"),
        ({"prompts_per_call": 0}, "per call"),
        ({"sources": ()}, "different names"),
        ({"sources": ({"kind": "synthetic"},) * 2}, "different names"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**({"sources": ({"kind": "synthetic"},)} | changes))


def test_missing_and_mistaken_datasets_are_named(tmp_path):
    missing = {"kind": "coco", "path": str(tmp_path / "none.json")}
    with pytest.raises(FileNotFoundError, match="images"):
        evaluator((missing,))
    with pytest.raises(ConfigError, match="num_images"):
        evaluator(({"kind": "coco", "path": "x.json", "num_images": 3},))


TINY = SamConfig(
    ImageEncoderConfig(
        image_size=(32, 48),
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        window_size=4,
        global_attention_blocks=(0,),
        output_dim=16,
    ),
    dataclasses.replace(CONFIG.mask_decoder, num_heads=2, mlp_dim=32, iou_head_dim=16),
)


def test_the_real_model_is_evaluated():
    model = Sam(TINY)
    # Drawn here, since compiling the model's own initialisation takes longer than all the rest.
    shapes = jax.eval_shape(lambda key: init_variables(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    some, others = (
        jax.tree.map(lambda leaf: rng.normal(0, 1, leaf.shape).astype(leaf.dtype), shapes)
        for _ in range(2)
    )
    source = {"kind": "synthetic", "num_images": 2, "image_size": (40, 30)}
    evaluate = evaluator((source,), model, protocols=("center",), images_per_call=1)
    report = evaluate(some)
    assert set(report.mean) == {f"center_{n}" for n in (1, 2, 3, "1_oracle")}
    assert 0 < report.mean["center_1"] <= report.mean["center_1_oracle"] < 1
    assert report == evaluate(some)
    assert report.mean != evaluate(others).mean


TWO_HOSTS = """
import sys
from pathlib import Path
import jax
index, port = map(int, sys.argv[1:3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sam_jax.evaluation import Evaluator, PromptedMasks
from tests.unit.test_evaluation_run import SHARED, ColorSam, CONFIG, variables

mesh = Mesh(np.array([jax.local_devices(process_index=host)[0] for host in (0, 1)]), ("host",))
halves = NamedSharding(mesh, PartitionSpec("host"))
whole = np.asarray(variables()["params"]["favourite"])
sharded = jax.make_array_from_callback(whole.shape, halves, lambda part: whole[part])
assert not sharded.is_fully_addressable
evaluate = Evaluator(ColorSam(CONFIG), PromptedMasks(SHARED), devices=jax.local_devices()[:1])
folder = Path(sys.argv[3]) if len(sys.argv) > 3 else None
report = evaluate({"params": {"favourite": sharded}, "constants": {}}, folder)
print("REPORT", sorted(report.as_flat_dict().items()), report.datasets)
"""

SHARED = EvalConfig(
    ({"kind": "synthetic", "num_images": 5, "image_size": (40, 30)},),
    num_clicks=(1, 2),
    baselines=("disk",),
    num_examples=0,
)


@pytest.mark.slow
def test_two_hosts_find_what_one_finds(tmp_path):
    """Each evaluates its own images with variables of which it holds one half.

    A third of what they share is done already.
    """
    evaluate = Evaluator(ColorSam(CONFIG), PromptedMasks(SHARED), devices=ONE_DEVICE)
    alone = evaluate(variables(), tmp_path)
    (records,) = tmp_path.glob("records-*/host-00000.jsonl")
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[1:3]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_HOSTS, str(index), str(port), str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    expected = f"REPORT {sorted(alone.as_flat_dict().items())} {alone.datasets}"
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert expected in output.splitlines()
    found = [file.read_text().splitlines(True) for file in sorted(records.parent.glob("*.jsonl"))]
    # Of the examples 0, 3 and 4, each process did its own.
    assert [len(of_host) for of_host in found] == [4, 1]
    assert sorted(found[0] + found[1]) == sorted(lines)
