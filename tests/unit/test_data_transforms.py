import collections
import dataclasses
import io
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from sam_jax.data.samples import CorruptSampleError, NoObjectError, Sample
from sam_jax.data.transforms import (
    TrainTransform,
    pack_mask,
)
from sam_jax.resizing import fit_longest_side, resize_image
from tests.unit.data_fixtures import (
    box_mask,
    compress,
    encode_image,
    gradient_image,
    make_sample,
)

RED, BLUE = (230, 20, 20), (20, 20, 230)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def painted(mask: np.ndarray) -> np.ndarray:
    """Red where the mask is, blue elsewhere: shows whether the two stay aligned."""
    return np.where(mask[..., None], RED, BLUE).astype(np.uint8)


def unpack(example: dict[str, np.ndarray]) -> np.ndarray:
    masks = np.unpackbits(example["masks_packed"], axis=-1).astype(bool)
    assert not masks[~example["mask_valid"]].any()
    return masks[example["mask_valid"]]


def redness(example: dict[str, np.ndarray]) -> np.ndarray:
    return example["image"][..., 0].astype(int) - example["image"][..., 2]


@pytest.mark.parametrize(
    ("hw", "target", "expected"),
    [
        ((1500, 2250), (1024, 1024), (683, 1024)),  # 682.67
        ((2000, 1500), (1024, 1024), (1024, 768)),
        ((60, 90), (1024, 1024), (683, 1024)),  # enlarges
        ((100, 300), (64, 128), (43, 128)),  # width decides, 42.67
        ((300, 100), (64, 128), (64, 21)),  # height decides, 21.33
        ((3, 4000), (64, 128), (1, 128)),  # 0.096, but not nothing
        ((64, 128), (64, 128), (64, 128)),
    ],
)
def test_fitting_sizes_by_hand(
    hw: tuple[int, int], target: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit_longest_side(hw, target) == expected


@hypothesis.given(*[st.tuples(st.integers(1, 5000), st.integers(1, 5000))] * 2)
def test_a_fitted_image_touches_the_target_and_stays_inside(
    hw: tuple[int, int], target: tuple[int, int]
) -> None:
    h, w = fit_longest_side(hw, target)
    assert 1 <= h <= target[0]
    assert 1 <= w <= target[1]
    assert h == target[0] or w == target[1]


def test_resizing_a_window_is_a_window_of_the_resized() -> None:
    image = gradient_image((40, 60))
    whole = resize_image(image, (33, 47))
    np.testing.assert_array_equal(
        whole, Image.fromarray(image).resize((47, 33), Image.Resampling.BILINEAR)
    )
    window = resize_image(image, (33, 47), (5, 9), (20, 30))
    # The window's own filter weights are rounded once more.
    assert np.abs(window.astype(int) - whole[5:25, 9:39]).max() <= 1


def test_an_example_by_hand() -> None:
    masks = [box_mask((20, 40), 4, 12, 8, 24), box_mask((20, 40), 0, 20, 0, 4)]
    transform = TrainTransform(image_size=(16, 16), max_masks=3)
    example = transform(make_sample(masks), rng())
    assert {key: (value.shape, value.dtype.name) for key, value in example.items()} == {
        "image": ((16, 16, 3), "uint8"),
        "image_hw": ((2,), "int32"),
        "original_hw": ((2,), "int32"),
        "masks_packed": ((3, 16, 2), "uint8"),
        "mask_valid": ((3,), "bool"),
    }
    # 20 x 40 shrinks by 2.5 to 8 x 16.
    assert example["image_hw"].tolist() == [8, 16]
    assert example["original_hw"].tolist() == [20, 40]
    assert example["mask_valid"].tolist() == [True, True, False]
    expected_image = np.zeros((16, 16, 3), np.uint8)
    expected_image[:8] = resize_image(gradient_image((20, 40)), (8, 16))
    np.testing.assert_array_equal(example["image"], expected_image)
    # Rows 4..12 cover target rows 1.6..4.8: 40 %, all, all, 80 %; columns 8..24 cover 3.2..9.6:
    # 80 %, all, 60 %. 4 columns are 1.6 wide.
    box = np.zeros((16, 16), bool)
    box[2:5, 3:10] = True
    box[4, 9] = False  # 80 % of 60 %
    bar = np.zeros((16, 16), bool)
    bar[:8, :2] = True
    got = {mask.tobytes() for mask in unpack(example)}
    assert got == {box.tobytes(), bar.tobytes()}


def test_the_most_significant_bit_is_the_leftmost_pixel() -> None:
    mask = box_mask((16, 16), 0, 16, 0, 3)
    example = TrainTransform(image_size=(16, 16), max_masks=1)(make_sample([mask]), rng())
    assert example["masks_packed"][0, 0].tolist() == [0b11100000, 0]


@hypothesis.given(
    hw=st.tuples(st.integers(8, 60), st.integers(8, 60)),
    image_size=st.tuples(st.integers(8, 40), st.sampled_from([8, 16, 40])),
    jitter=st.sampled_from([None, (0.1, 2.0), (1.5, 1.5)]),
    hflip_rate=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_image_and_mask_stay_aligned(
    hw: tuple[int, int],
    image_size: tuple[int, int],
    jitter: tuple[float, float] | None,
    hflip_rate: float,
    seed: int,
) -> None:
    h, w = hw
    # Large enough to survive a single row of target pixels.
    mask = box_mask(hw, h // 8, h // 8 + 3 * h // 4, w // 5, w // 5 + 3 * w // 4)
    sample = make_sample([mask], image=encode_image(painted(mask)))
    transform = TrainTransform(
        image_size=image_size, max_masks=2, scale_jitter=jitter, hflip_rate=hflip_rate
    )
    example = transform(sample, rng(seed))
    (got,) = unpack(example)
    assert got.any()
    valid_h, valid_w = example["image_hw"]
    inside = box_mask(image_size, 0, valid_h, 0, valid_w)
    assert not got[~inside].any()
    assert not example["image"][~inside].any()
    # Red wins where the mask covers half; near one half the two filters may differ.
    clear = inside & (np.abs(redness(example)) > 120)
    np.testing.assert_array_equal(got[clear], redness(example)[clear] > 0)
    if min(hw) * min(valid_h / h, valid_w / w) > 8:
        assert clear.any()


def test_a_flip_mirrors_the_image_within_its_own_width() -> None:
    mask = box_mask((20, 30), 0, 20, 0, 9)
    sample = make_sample([mask])
    plain = TrainTransform(image_size=(24, 24), max_masks=1)(sample, rng())
    flipped = TrainTransform(image_size=(24, 24), max_masks=1, hflip_rate=1.0)(sample, rng())
    h, w = plain["image_hw"]
    np.testing.assert_array_equal(flipped["image"][:h, :w], plain["image"][:h, :w][:, ::-1])
    np.testing.assert_array_equal(unpack(flipped)[0, :h, :w], unpack(plain)[0, :h, :w][:, ::-1])


def test_large_jitter_fills_the_input_and_small_jitter_pads_it() -> None:
    sample = make_sample([box_mask((30, 30), 2, 28, 2, 28)])
    for scale, expected in ((2.0, [16, 24]), (0.25, [4, 4])):
        transform = TrainTransform((16, 24), max_masks=1, scale_jitter=(scale, scale))
        assert transform(sample, rng())["image_hw"].tolist() == expected


def test_a_crop_that_misses_every_mask_is_not_used() -> None:
    # Nearly all crops of the image, four times enlarged, miss this corner.
    sample = make_sample([box_mask((60, 60), 0, 3, 0, 3)])
    transform = TrainTransform((32, 32), max_masks=1, scale_jitter=(4.0, 4.0))
    sizes = [transform(sample, rng(seed))["image_hw"].tolist() for seed in range(20)]
    assert sizes == [[32, 32]] * 20
    assert all(unpack(transform(sample, rng(seed)))[0].any() for seed in range(20))


def ramp_jpeg(hw: tuple[int, int]) -> bytes:
    """Brightness that rises by two from column to column."""
    ramp = np.broadcast_to(2 * np.arange(hw[1])[None, :, None], (*hw, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "JPEG", quality=100, subsampling=0)
    return file.getvalue()


@pytest.mark.parametrize("jitter", [None, (1.0, 1.0), (0.7, 0.7), (0.4, 0.4)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("hw", [(80, 120), (81, 115), (70, 127)])
def test_reduced_decoding_moves_nothing(
    hw: tuple[int, int], flip: float, jitter: tuple[float, float] | None
) -> None:
    sample = make_sample([box_mask(hw, 10, 60, 21, 90)], image=ramp_jpeg(hw))
    transform = TrainTransform((48, 56), max_masks=1, hflip_rate=flip, scale_jitter=jitter)
    reduced = transform(sample, rng())
    exact = dataclasses.replace(transform, reduced_decoding=False)(sample, rng())
    h, w = exact["image_hw"]
    difference = reduced["image"][:h, :w].astype(float) - exact["image"][:h, :w]
    # A shift by half a pixel of the file, or a width of half a pixel more, would be a difference of
    # one in all columns or in the last.
    for half in np.array_split(difference[:, 1:-1], 2, axis=1):
        assert abs(half.mean()) < 0.3
    for key in set(exact) - {"image"}:
        np.testing.assert_array_equal(reduced[key], exact[key], err_msg=key)


@pytest.mark.parametrize(("hw", "is_reduced"), [((95, 120), False), ((96, 120), True)])
def test_images_of_twice_the_size_are_decoded_at_half(
    hw: tuple[int, int], is_reduced: bool
) -> None:
    noise = rng().integers(0, 256, (*hw, 3)).astype(np.uint8)
    sample = make_sample([box_mask(hw, 10, 40, 20, 70)], image=encode_image(noise, "JPEG"))
    transform = TrainTransform((48, 80), max_masks=1)
    exact = dataclasses.replace(transform, reduced_decoding=False)(sample, rng())
    assert (transform(sample, rng())["image"] != exact["image"]).any() == is_reduced


@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 20), st.integers(0, 20))
def test_packed_masks_are_where_they_were(h: int, w: int, top: int, left: int) -> None:
    part = rng(h).random((h, w)) < 0.5
    mask = np.zeros((top + h, -(-(left + w) // 8) * 8), bool)
    mask[top:, left : left + w] = part
    (row, rows, first, count), bits = pack_mask(part, top, left)
    assert bits.shape == (rows, count)
    found = np.zeros((mask.shape[0], mask.shape[1] // 8), np.uint8)
    found[row : row + rows, first : first + count] = bits
    np.testing.assert_array_equal(np.unpackbits(found, axis=-1).astype(bool), mask)


def test_what_is_handed_over_is_small_and_in_one_piece() -> None:
    """Arrays that are not contiguous would be pickled instead of shared."""
    mask = box_mask((60, 90), 10, 20, 40, 50)
    transform = TrainTransform((128, 96), max_masks=50, hflip_rate=1.0)
    packed, _ = transform.packed(make_sample([mask] * 3), rng())
    assert all(array.flags.c_contiguous for array in packed if isinstance(array, np.ndarray))
    # The masks are 11 pixels high and wide here, which is two or three bytes.
    assert packed.mask_bits.nbytes <= 3 * 12 * 3
    assert packed.image.shape == (64, 96, 3)


def test_an_unreadable_image_is_named_before_its_masks() -> None:
    whole = ramp_jpeg((60, 90))
    sample = make_sample([box_mask((60, 90), 0, 9, 0, 9)], image=whole[:400], masks_rle=())
    with pytest.raises(CorruptSampleError) as caught:
        TrainTransform((16, 16))(sample, rng())
    assert caught.value.reason == "truncated image"


def test_masks_are_drawn_uniformly_without_replacement() -> None:
    masks = [box_mask((6, 48), 0, 6, 8 * i, 8 * i + 8) for i in range(6)]
    sample = make_sample(masks)
    transform = TrainTransform(image_size=(8, 48), max_masks=2)
    pairs: collections.Counter[tuple[int, ...]] = collections.Counter()
    for seed in range(600):
        drawn = unpack(transform(sample, rng(seed)))
        assert len(drawn) == 2
        pairs[tuple(int(mask.argmax(axis=1)[0]) // 8 for mask in drawn)] += 1
    # 30 ordered pairs of different masks, 20 of each expected.
    assert len(pairs) == 30
    assert all(first != second for first, second in pairs)
    assert sum((count - 20) ** 2 / 20 for count in pairs.values()) < 60  # p < 0.001


def mixed_sample() -> Sample:
    hw = (20, 32)
    good = [box_mask(hw, 2 * i, 2 * i + 2, 0, 10) for i in range(4)]
    bad: list[dict[str, Any]] = [
        {"size": [20, 32], "counts": "nonsense"},
        compress(box_mask((20, 33), 0, 5, 0, 5)),
        compress(np.zeros(hw, bool)),
        compress(box_mask(hw, 0, 20, 0, 30)),  # 93.75 %
        compress(box_mask(hw, 0, 1, 0, 1)),  # a pixel at half size: a quarter of one
    ]
    rles = [compress(mask) for mask in good] + bad
    return make_sample(good, masks_rle=tuple(rles), unusable_masks=("no polygon",))


def test_unusable_masks_are_left_out_and_reported() -> None:
    transform = TrainTransform(image_size=(10, 16), max_masks=9)
    example, dropped = transform.with_report(mixed_sample(), rng())
    assert example["mask_valid"].sum() == 4
    assert sorted(mask.reason for mask in dropped) == [
        "bad rle",
        "empty",
        "size mismatch",
        "too large",
        "too small",
        "unusable annotation",
    ]
    details = {mask.reason: mask.detail for mask in dropped}
    assert "mask 4" in details["bad rle"]
    assert "[20, 33]" in details["size mismatch"]
    assert details["unusable annotation"] == "no polygon"


def test_drawing_goes_on_until_enough_masks_are_valid() -> None:
    transform = TrainTransform(image_size=(10, 16), max_masks=4)
    for seed in range(10):
        assert transform(mixed_sample(), rng(seed))["mask_valid"].all()


def test_masks_that_are_not_drawn_are_not_looked_at() -> None:
    good = box_mask((20, 32), 2, 12, 3, 13)
    unreadable = {"size": [20, 32], "counts": "nonsense"}
    sample = make_sample([good], masks_rle=(compress(good),) * 20 + (unreadable,) * 20)
    transform = TrainTransform(image_size=(10, 16), max_masks=1)
    reports = [transform.with_report(sample, rng(seed))[1] for seed in range(30)]
    # On average one bad mask is met before a good one; all 20 would be if all were decoded.
    assert sum(map(len, reports)) < 90


def test_the_area_limits() -> None:
    hw = (20, 32)
    sample = make_sample([box_mask(hw, 0, 10, 0, 32), box_mask(hw, 0, 2, 0, 6)])
    size = (10, 16)  # half: the second mask keeps 3 pixels
    assert TrainTransform(size, max_area_rate=0.5)(sample, rng())["mask_valid"].sum() == 2
    assert TrainTransform(size, max_area_rate=0.49)(sample, rng())["mask_valid"].sum() == 1
    assert TrainTransform(size, min_mask_area_px=3)(sample, rng())["mask_valid"].sum() == 2
    assert TrainTransform(size, min_mask_area_px=4)(sample, rng())["mask_valid"].sum() == 1


@pytest.mark.parametrize("jitter", [None, (0.5, 2.0)])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"masks_rle": ()}, "no annotation"),
        ({}, "only empty masks"),
        ({"masks_rle": (compress(np.ones((20, 32), bool)),)}, "only filtered masks"),
        ({"masks_rle": (compress(box_mask((20, 32), 3, 4, 3, 4)),)}, "only filtered masks"),
        ({"masks_rle": (), "remarks": (("void outline left out", "x"),)}, "no annotation"),
    ],
)
def test_an_image_without_an_object_is_no_damage(
    changes: dict, reason: str, jitter: tuple[float, float] | None
) -> None:
    sample = make_sample([np.zeros((20, 32), bool)], **changes)
    with pytest.raises(NoObjectError) as caught:
        TrainTransform((16, 16), scale_jitter=jitter, min_mask_area_px=5)(sample, rng())
    assert caught.value.reason == reason


def test_an_image_that_loses_all_masks_says_why() -> None:
    turned = compress(np.zeros((32, 20), bool))
    nonsense = {"size": [20, 32], "counts": "nonsense"}
    sample = make_sample(
        [np.zeros((20, 32), bool)],
        masks_rle=(turned, turned, nonsense),
        unusable_masks=("annotations[7]: segmentation is 'x'",),
    )
    with pytest.raises(CorruptSampleError) as caught:
        TrainTransform((16, 16))(sample, rng())
    assert caught.value.reason == "no valid mask"
    for part in (
        "2 size mismatch, e.g. mask ",
        "is [32, 20], the image [20, 32]",
        "1 bad rle, e.g. mask 2: ",
        "1 unusable annotation, e.g. annotations[7]: segmentation is 'x'",
    ):
        assert part in caught.value.detail


def test_the_same_generator_gives_the_same_example() -> None:
    masks = [box_mask((20, 32), i, i + 9, i, i + 12) for i in range(9)]
    transform = TrainTransform(
        (16, 24), max_masks=3, scale_jitter=(0.5, 2.0), hflip_rate=0.5, color_jitter=0.4
    )
    first, again, other = (transform(make_sample(masks), rng(seed)) for seed in (3, 3, 4))
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    assert any((first[key] != other[key]).any() for key in first)


def jittered(image: np.ndarray, strength: float, seed: int) -> np.ndarray:
    hw = image.shape[:2]
    sample = make_sample([box_mask(hw, 0, 4, 0, 4)], image=encode_image(image))
    return TrainTransform(hw, color_jitter=strength)(sample, rng(seed))["image"].astype(int)


def test_color_jitter_changes_as_much_as_it_is_told() -> None:
    image = gradient_image((24, 32)) // 2 + 60
    change = [
        np.abs(jittered(image, strength, seed) - image).mean()
        for strength in (0.0, 0.1, 0.4)
        for seed in range(8)
    ]
    off, weak, strong = np.array(change).reshape(3, 8).mean(axis=1)
    assert off == 0
    assert 0.5 < weak < strong / 2


def test_color_jitter_keeps_grey_grey_and_turns_hues() -> None:
    grey = np.repeat(gradient_image((24, 32))[..., :1], 3, axis=2)
    colored = np.full((24, 32, 3), (200, 80, 60), np.uint8)
    ratios = []
    for seed in range(8):
        got = jittered(grey, 0.5, seed)
        assert np.ptp(got, axis=-1).max() <= 1
        r, g, b = jittered(colored, 0.5, seed)[10, 10]
        ratios.append((g - b) / max(r - b, 1))
    assert max(ratios) - min(ratios) > 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": (16, 20)},
        {"image_size": (0, 16)},
        {"max_masks": 0},
        {"min_mask_area_px": 0},
        {"scale_jitter": (2.0, 1.0)},
        {"scale_jitter": (0.0, 1.0)},
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TrainTransform(**{"image_size": (16, 16), **wrong})
