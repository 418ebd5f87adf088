"""Images of channels in every kind of source that reads files; for RGB, folders mean the same."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_jax.data import SourceConfig, build_source
from sam_jax.data.config import DataConfig
from sam_jax.data.mask_stores import open_store
from sam_jax.data.pipeline import train_iterator
from sam_jax.data.samples import CorruptSampleError, Sample, decode_image, image_hw
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import box_mask, compress, encode_image, gradient_image, sa1b_json

HW = (24, 30)
MASK = box_mask(HW, 3, 15, 4, 20)


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 9000, (*HW, 5)).astype(np.uint16)


def mask_png() -> bytes:
    return encode_image(MASK.astype(np.uint8) * 255)


def _listed(folder: Path) -> dict[str, Any]:
    """A COCO file whose second image has polygons and no size."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(2):
        np.save(folder / "images" / f"{number}.npy", image(number))
        size = {"height": HW[0], "width": HW[1]} if number == 0 else {}
        images.append({"id": number, "file_name": f"{number}.npy", **size})
        drawn: Any = compress(MASK) if number == 0 else [[4, 3, 20, 3, 20, 15, 4, 15]]
        annotations.append({"id": number, "image_id": number, "segmentation": drawn, "iscrowd": 0})
    path = folder / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return {"kind": "coco", "path": str(path)}


def _mask_folder(folder: Path) -> dict[str, Any]:
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number in range(2):
        np.save(folder / "images" / f"{number}.npy", image(number))
        (folder / "masks" / f"{number}.png").write_bytes(mask_png())
    return {"kind": "mask_folder", "path": str(folder / "images"), "masks": str(folder / "masks")}


def _label_maps(folder: Path) -> dict[str, Any]:
    return {**_mask_folder(folder), "kind": "label_maps"}


def _image_folders(folder: Path) -> dict[str, Any]:
    for number in range(2):
        for part in ("images", "masks"):
            (folder / str(number) / part).mkdir(parents=True)
        np.save(folder / str(number) / "images" / "x.npy", image(number))
        (folder / str(number) / "masks" / "m.png").write_bytes(mask_png())
    return {"kind": "image_folders", "path": str(folder)}


def _images(folder: Path) -> dict[str, Any]:
    for number in range(2):
        np.save(folder / f"{number}.npy", image(number))
    return {"kind": "images", "path": str(folder)}


def _sa1b(folder: Path) -> dict[str, Any]:
    for number in range(2):
        np.save(folder / f"{number}.npy", image(number))
        (folder / f"{number}.json").write_bytes(sa1b_json([MASK], number))
    return {"kind": "sa1b", "path": str(folder)}


def _tar(kind: str, make: Any) -> Any:
    def packed(folder: Path) -> dict[str, Any]:
        (folder / "loose").mkdir()
        make(folder / "loose")
        with tarfile.open(folder / "x.tar", "w") as tar:
            for path in sorted((folder / "loose").iterdir()):
                tar.add(path, path.name)
        return {"kind": kind, "path": str(folder / "x.tar")}

    return packed


def _joined(folder: Path) -> dict[str, Any]:
    return {"kind": "joined", "parts": (_mask_folder(folder),)}


FORMS = {
    "coco": _listed,
    "mask_folder": _mask_folder,
    "label_maps": _label_maps,
    "image_folders": _image_folders,
    "images": _images,
    "images_in_a_tar": _tar("images", _images),
    "sa1b": _sa1b,
    "sa1b_in_a_tar": _tar("sa1b", _sa1b),
    "joined": _joined,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_source_finds_images_of_channels(form: str, tmp_path: Path) -> None:
    config = SourceConfig.from_dict(FORMS[form](tmp_path))
    source = build_source(config, 5)
    assert len(source) == 2
    for number in range(2):
        sample = source[number]
        assert isinstance(sample, Sample)
        assert sample.in_channels == 5
        assert image_hw(sample) == HW
        found = decode_image(sample)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, image(number))
        assert form.startswith("images") or len(sample.masks_rle) == 1
    share = build_source(
        SourceConfig.from_dict(FORMS[form](_new(tmp_path)) | {"share": (0, 0.5)}), 5
    )
    assert decode_image(share[0]).shape == (*HW, 5)


def _new(folder: Path) -> Path:
    other = folder / "other"
    other.mkdir()
    return other


@pytest.mark.parametrize(
    "form", ["mask_folder", "label_maps", "image_folders", "images", "images_in_a_tar"]
)
def test_for_rgb_arrays_are_no_images(form: str, tmp_path: Path) -> None:
    """They may lie beside pictures, as somebody's features do."""
    said = (
        "no picture in"
        if form == "images_in_a_tar"
        else r"npy is an image only.*model\.in_channels"
    )
    with pytest.raises(ConfigError, match=said):
        build_source(SourceConfig.from_dict(FORMS[form](tmp_path)))


@pytest.mark.parametrize("form", ["sa1b", "sa1b_in_a_tar"])
def test_for_rgb_an_array_is_not_the_picture_of_a_json(form: str, tmp_path: Path) -> None:
    # An index of the same tar for channels is another file.
    config = SourceConfig.from_dict(FORMS[form](tmp_path))
    assert decode_image(build_source(config, 5)[0]).shape == (*HW, 5)
    with pytest.raises(CorruptSampleError, match="missing image"):
        build_source(config)[0]


def test_sources_of_rgb_alone_say_so() -> None:
    for config in ({"kind": "synthetic"}, {"kind": "tfds_images", "path": "x"}):
        with pytest.raises(ConfigError, match=r"has 8-bit RGB.*takes 5 channels"):
            build_source(SourceConfig.from_dict(config), 5)
    with pytest.raises(ConfigError, match="superfluous"):
        build_source(SourceConfig.from_dict({"kind": "synthetic", "path": "x"}))


def test_worker_processes_hand_over_what_threads_do(tmp_path: Path) -> None:
    source = _mask_folder(tmp_path)
    common = {"sources": (source,), "image_size": (32, 32), "batch_size": 2, "in_channels": 5}
    batches = []
    for num_workers in (0, 1):
        iterator = train_iterator(DataConfig.from_dict({**common, "num_workers": num_workers}))
        batches.append(next(iterator))
        iterator.close()
    assert batches[0]["image"].shape == (2, 32, 32, 5)
    for name, array in batches[0].items():
        np.testing.assert_array_equal(array, batches[1][name])


def test_a_file_of_other_channels_is_counted_and_named(tmp_path: Path) -> None:
    source = _mask_folder(tmp_path)
    (tmp_path / "images" / "0.npy").unlink()
    (tmp_path / "images" / "0.png").write_bytes(encode_image(gradient_image(HW)))
    config = {"sources": (source,), "image_size": (32, 32), "batch_size": 2, "in_channels": 5}
    iterator = train_iterator(DataConfig.from_dict({**config, "max_corrupt_rate": 0.9}))
    next(iterator)
    assert sum(iterator.corrupt_counts.values()) > 0
    (told,) = iterator.manifest()["samples skipped"]
    assert "has 3 channels" in told["example"]
    assert "0.png" in told["example"]
    iterator.close()


def test_statistics_of_masks_take_images_of_channels(tmp_path: Path) -> None:
    fields = _mask_folder(tmp_path) | {"in_channels": 5}
    store = open_store(",".join(f"{name}={value}" for name, value in fields.items()))
    found = [store.reader(index)() for index in range(len(store))]
    assert [(one.hw, len(one.masks_rle)) for one in found] == [(MASK.shape, 1)] * 2
    with pytest.raises(ConfigError, match="in_channels is 'many'; expected a number"):
        open_store("kind=mask_folder,path=a,masks=b,in_channels=many")
