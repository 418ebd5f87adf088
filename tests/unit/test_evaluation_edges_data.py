"""Images and annotations in BSDS500's layout, whole and damaged; edge maps as files."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from sam_jax.errors import ConfigError
from sam_jax.evaluation.edges.dataset import AnnotationError, list_examples, read_boundaries
from sam_jax.evaluation.edges.png import decode, encode, read_edge_map
from sam_jax.images import ImageError
from tests.unit.edge_fixtures import outline, write_annotations, write_example

BOX = (10, 8, 40, 30)


def test_examples_come_by_name_with_their_annotators(tmp_path):
    for name in ("b", "a"):
        write_example(tmp_path, name, BOX)
    (tmp_path / "images/Thumbs.db").write_bytes(b"?")
    examples = list_examples(tmp_path)
    assert [example.name for example in examples] == ["a", "b"]
    pixels = examples[0].read_image()
    boundaries = examples[0].read_boundaries(pixels, examples[0].image)
    assert [marked.sum() for marked in boundaries] == [100, 100, 0]
    np.testing.assert_array_equal(boundaries[0], outline(BOX))


def test_a_split_is_a_folder_in_each(tmp_path):
    write_example(tmp_path, "a", BOX, split="test")
    write_example(tmp_path, "b", BOX, split="val")
    assert [example.name for example in list_examples(tmp_path, "val")] == ["b"]
    with pytest.raises(ConfigError, match="there are the splits test, val"):
        list_examples(tmp_path)


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ("groundTruth/b.mat", r"images/b\.png has no annotations"),
        ("images/b.png", r"groundTruth/b\.mat has no image"),
    ],
)
def test_examples_without_a_half_are_an_error(tmp_path, removed, words):
    for name in ("a", "b"):
        write_example(tmp_path, name, BOX)
    (tmp_path / removed).unlink()
    with pytest.raises(ConfigError, match=words):
        list_examples(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no folder .*images: the data of an edge"):
        list_examples(tmp_path)


def test_two_pictures_of_one_name_are_an_error(tmp_path):
    write_example(tmp_path, "a", BOX)
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a.jpg")
    with pytest.raises(ConfigError, match=r"a\.jpg and .*a\.png have the same name"):
        list_examples(tmp_path)


def test_other_sizes_are_an_error(tmp_path):
    write_example(tmp_path, "a", BOX)
    Image.new("RGB", (9, 7)).save(tmp_path / "images/a.png")
    (example,) = list_examples(tmp_path)
    with pytest.raises(AnnotationError, match=r"width \[\(48, 64\)\]; .*a\.png is \(7, 9\)"):
        example.read_boundaries(example.read_image(), example.image)


def damaged(path):
    write_annotations(path, [outline(BOX)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"nothing of the kind" * 20), "damaged"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600)), "damaged"),
        (damaged, "damaged"),
        (lambda path: savemat(path, {"ucm2": np.eye(3)}), r"holds \['ucm2'\]; expected"),
        (lambda path: savemat(path, {"groundTruth": np.eye(3)}), "has no boundaries"),
        (lambda path: savemat(path, {"groundTruth": np.empty((1, 0), object)}), "no annotator"),
        (lambda path: savemat(path, {"groundTruth": {"Segmentation": 1}}), "has no boundaries"),
    ],
)
def test_files_that_are_no_annotations_are_errors(tmp_path, write, words):
    path = tmp_path / "a.mat"
    write(path)
    with pytest.raises(AnnotationError, match=words) as raised:
        read_boundaries(path)
    assert str(path) in str(raised.value)


def test_maps_come_back_from_files(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    np.testing.assert_array_equal(decode(encode(levels)), levels)
    path = tmp_path / "a.png"
    path.write_bytes(encode(levels))
    np.testing.assert_array_equal(read_edge_map(path), levels / 255)


def test_maps_of_any_depth_are_taken_as_they_are_stored(tmp_path):
    pictures = {
        "bits": (Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), [[0, 1]]),
        "deep": (Image.fromarray(np.array([[0, 13107]], np.uint16)), [[0, 0.2]]),
        "grey": (Image.fromarray(np.array([[[51] * 3, [102] * 3]], np.uint8)), [[0.2, 0.4]]),
    }
    for name, (picture, expected) in pictures.items():
        picture.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_edge_map(tmp_path / f"{name}.png"), expected)


def test_other_pictures_are_no_maps(tmp_path):
    Image.new("RGB", (4, 3), (9, 0, 0)).save(tmp_path / "color.png")
    with pytest.raises(ImageError, match=r"color\.png has colours"):
        read_edge_map(tmp_path / "color.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ImageError, match=r"text\.png cannot be read"):
        read_edge_map(tmp_path / "text.png")
    Image.new("F", (4, 3)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match=r"mode F"):
        read_edge_map(tmp_path / "float.tif")
