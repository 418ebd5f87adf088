import hypothesis
import hypothesis.extra.numpy as st_numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from sam_jax.visualize import (
    BLUE,
    GREEN,
    ORANGE,
    PAPER,
    RED,
    Curve,
    Example,
    draw_boxes,
    draw_curves,
    draw_points,
    example_panels,
    example_sheet,
    grid,
    overlay_masks,
    palette,
    resize_mask,
    resize_picture,
)

GRAY = 90


def gray(height=60, width=90):
    return np.full((height, width, 3), GRAY, np.uint8)


def rectangle(y0, y1, x0, x1, height=60, width=90):
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def close(pixels, color, tolerance=3):
    return np.all(np.abs(np.asarray(pixels, int) - np.asarray(color)) <= tolerance, axis=-1)


def test_overlay_fills_translucently_and_draws_the_contour():
    mask = rectangle(15, 45, 20, 70)
    picture = overlay_masks(gray(), mask[None], [ORANGE], fill_rate=0.5, contour_px=3)
    fill = [(GRAY + channel) / 2 for channel in ORANGE]
    assert close(picture[22:38, 27:63], fill).all()
    # The contour lies inside the mask, on all four sides.
    for side in (picture[30, 21], picture[30, 68], picture[16, 45], picture[43, 45]):
        assert close(side, ORANGE, 30)
    # Three pixels away from the mask, nothing has changed.
    assert (picture[~rectangle(12, 48, 17, 73)] == GRAY).all()


def test_overlay_of_nothing_is_the_image():
    image = gray()
    np.testing.assert_array_equal(overlay_masks(image, np.zeros((0, 60, 90), bool)), image)
    np.testing.assert_array_equal(overlay_masks(image, np.zeros((2, 60, 90), bool)), image)


def test_overlay_draws_no_contour_along_the_images_edge():
    whole = overlay_masks(gray(), np.ones((1, 60, 90), bool), [BLUE], fill_rate=0.4)
    assert close(whole, [0.6 * GRAY + 0.4 * channel for channel in BLUE]).all()


def test_small_masks_stay_visible_on_large_ones():
    masks = np.stack([rectangle(25, 35, 40, 50), rectangle(5, 55, 5, 85)])
    one_way = overlay_masks(gray(), masks, [ORANGE, BLUE], fill_rate=1.0)
    other_way = overlay_masks(gray(), masks[::-1], [BLUE, ORANGE], fill_rate=1.0)
    np.testing.assert_array_equal(one_way, other_way)
    assert close(one_way[30, 45], ORANGE)


def test_overlay_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        overlay_masks(gray(), np.zeros((1, 60, 80), bool))
    with pytest.raises(ValueError, match="do not fit"):
        overlay_masks(gray(), np.zeros((2, 60, 90), bool), [BLUE])


@hypothesis.given(st.data())
def test_overlay_changes_only_what_is_near_a_mask(data):
    hw = data.draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    image = data.draw(st_numpy.arrays(np.uint8, (*hw, 3)))
    masks = data.draw(st_numpy.arrays(bool, (2, *hw)))
    before = image.copy(), masks.copy()
    picture = overlay_masks(image, masks)
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(masks, before[1])
    ys, xs = np.nonzero(masks.any(axis=0))
    for y in range(hw[0]):
        for x in range(hw[1]):
            if not len(ys) or ((ys - y) ** 2 + (xs - x) ** 2).min() > 36:
                np.testing.assert_array_equal(picture[y, x], image[y, x])


def test_points_lie_where_they_were_clicked():
    picture = draw_points(gray(), np.array([[20, 30], [70, 12]]), np.array([1, 0]), radius_px=8)
    for (x, y), color in (((20, 30), GREEN), ((70, 12), RED)):
        # Beside the white plus or minus; the minus has no vertical bar.
        assert close(picture[y - 4, x - 4], color, 12)
        assert close(picture[y, x], PAPER, 12)
        ys, xs = np.nonzero((picture != GRAY).any(axis=-1) & (np.abs(np.arange(90) - x) < 20))
        assert abs(ys.mean() - y) < 0.3
        assert abs(xs.mean() - x) < 0.3
    assert close(picture[30 - 3, 20], PAPER, 12)
    assert close(picture[12 - 3, 70], RED, 12)


def test_points_outside_are_cut_off():
    picture = draw_points(gray(), np.array([[-500.0, 3.0], [0.0, 0.0]]), np.array([1, 1]))
    assert (picture[0, 0] != GRAY).any()
    assert (picture[40:] == GRAY).all()


def test_boxes_frame_their_pixels():
    picture = draw_boxes(gray(), np.array([[20, 10, 49, 39]]), [ORANGE], line_px=2)
    assert (picture[12:38, 22:48] == GRAY).all()
    for y, x in ((9, 30), (40, 30), (25, 19), (25, 50), (9, 19), (8, 50)):
        assert close(picture[y, x], ORANGE, 10)
    changed = (picture != GRAY).any(axis=-1)
    assert not changed[:6].any()
    assert not changed[44:].any()


def test_palette_has_as_many_different_colors_as_wanted():
    colors = palette(120)
    assert len(set(colors)) == 120
    assert palette(5) == colors[:5]
    assert all(0 <= channel <= 255 for color in colors for channel in color)
    assert palette(0) == []


def test_grid_places_pictures_and_captions():
    pictures = [np.full((20, 30, 3), shade, np.uint8) for shade in (10, 60, 110)]
    sheet = grid(pictures, columns=2, margin_px=5)
    assert sheet.shape == (2 * 20 + 15, 2 * 30 + 15, 3)
    assert (sheet[5:25, 5:35] == 10).all()
    assert (sheet[5:25, 40:70] == 60).all()
    assert (sheet[30:50, 5:35] == 110).all()
    assert (sheet[30:50, 40:70] == 255).all()
    captioned = grid(pictures, ["", "long " * 20, "c"], columns=2, margin_px=5, text_px=10)
    assert captioned.shape[0] == sheet.shape[0] + 2 * 19
    assert (captioned[25:40, 5:35] == 255).all()
    assert (captioned[25:40, 40:70] < 128).any()
    # A caption that is too long is cut off and reaches into no margin.
    assert (captioned[25:40, 71:] == 255).all()


def test_grid_refuses_what_makes_no_sheet():
    with pytest.raises(ValueError, match="no sheet"):
        grid([])
    with pytest.raises(ValueError, match="no sheet"):
        grid([gray()], ["a", "b"])


def test_resize_mask_keeps_size_area_and_place():
    mask = rectangle(10, 40, 15, 60)
    np.testing.assert_array_equal(resize_mask(mask, (60, 90)), mask)
    large = resize_mask(mask, (300, 450))
    assert large.sum() == pytest.approx(25 * mask.sum(), rel=0.01)
    np.testing.assert_allclose(np.argwhere(large).mean(axis=0), [124.5, 187.0], atol=0.5)
    # Rows 1 to 3 and columns 2 to 5; column 1 is covered by half, and that is not enough.
    assert resize_mask(mask, (6, 9)).sum() == 3 * 4
    assert resize_picture(gray(), (10, 40)).shape == (10, 40, 3)


def example(**changes):
    truth = rectangle(25, 31, 40, 48, 120, 200)
    prediction = rectangle(25, 31, 44, 52, 120, 200)
    defaults = {"image": gray(120, 200), "ground_truth": truth, "prediction": prediction}
    return Example(**(defaults | changes))


def test_panels_zoom_in_on_the_object():
    panels = example_panels(example(box_xyxy=(40, 25, 47, 30)), 128)
    assert [panel.shape for panel in panels] == [(128, 128, 3)] * 4
    overview, prompt, prediction, truth = panels
    # The first panel marks the window that the others enlarge.
    assert close(overview, PAPER).any()
    assert not close(overview, GREEN, 30).any()
    assert close(prompt, GREEN, 10).any()
    assert close(prediction, BLUE, 20).any()
    assert close(truth, ORANGE, 20).any()
    # 8 x 6 of 64 x 64 pixels of the image, twice enlarged.
    changed = np.argwhere((truth != GRAY).any(axis=-1))
    np.testing.assert_allclose(np.ptp(changed, axis=0), [12, 16], atol=5)


def test_panels_show_the_whole_image_where_the_object_fills_it():
    large = rectangle(5, 115, 10, 190, 120, 200)
    overview, prompt, *_ = example_panels(example(ground_truth=large), 100)
    np.testing.assert_array_equal(overview, prompt)


def test_panels_show_clicks_far_from_the_object():
    far = {"point_coords": np.array([[44, 28], [190, 110]]), "point_labels": np.array([1, 0])}
    prompt = example_panels(example(**far), 160)[1]
    assert close(prompt, GREEN, 10).any()
    assert close(prompt, RED, 10).any()


def test_example_sheet_has_a_row_for_each():
    one = example_sheet([example(caption="a\nb")], panel_px=80)
    three = example_sheet([example(caption="a\nb")] * 3, panel_px=80)
    assert three.shape[0] - one.shape[0] == 2 * (80 + 6)
    assert three.shape[1] == one.shape[1]
    titled = example_sheet([example(caption="a\nb")], title="all of them", panel_px=80)
    assert titled.shape[0] > one.shape[0]
    with pytest.raises(ValueError, match="no example"):
        example_sheet([])


def test_curves_use_their_colors_and_limits():
    curves = [
        Curve("rising", (1, 2, 5), (20, 40, 60), BLUE),
        Curve("single", (1,), (50,), ORANGE, "marks"),
        Curve("level", (), (80,), GREEN, "level"),
    ]
    picture = draw_curves({"all": curves}, x_label="x", y_label="y", y_limits=(0.0, 100.0), dpi=72)
    for color in (BLUE, ORANGE, GREEN):
        assert close(picture, color, 40).any()
    rows = [np.argwhere(close(picture[:, 60:-10], color, 60))[:, 0] for color in (GREEN, BLUE)]
    # The level of 80 lies above the curve, which ends at 60 (the legend is at the bottom).
    assert rows[0].min() < rows[1].min()
    long = [Curve(f"a label of some length {i}", (1, 2), (i, i), BLUE) for i in range(6)]
    legend = draw_curves({"all": long}, x_label="x", y_label="y", dpi=72)
    assert (legend[:, [0, -1]] == 255).all(), "the legend is cut off"
    wide = draw_curves({"a": curves, "b": curves}, x_label="x", y_label="y", dpi=72)
    assert wide.shape[1] > picture.shape[1]
    with pytest.raises(ValueError, match="no diagram"):
        draw_curves({}, x_label="x", y_label="y")
