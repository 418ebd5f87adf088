import io
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_jax.data.samples import CorruptSampleError, decode_image, decode_masks
from sam_jax.data.sources.tfds import TfdsImagesSource, TfdsSource
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import box_mask, numbered_hw, sa1b_pair

ROOT = Path(__file__).resolve().parents[2]


def write_dataset(folder: Path, file_format: str, features: Any, examples: list) -> Path:
    """Prepares a data set; returns its version folder."""
    import tensorflow_datasets as tfds

    # Its name is looked up by nobody, and may be taken.
    with tfds.core.registered.skip_registration():

        class SegmentAnything(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            code_path = None  # there are no files of checksums beside this class

            def _info(self) -> tfds.core.DatasetInfo:
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Any:
                yield from enumerate(examples)

    builder = SegmentAnything(data_dir=folder, file_format=file_format)
    builder.download_and_prepare()
    return Path(builder.data_dir)


def sa1b_example(number: int) -> dict[str, Any]:
    """As the builder `segment_anything` yields it."""
    from tensorflow_datasets import features

    jpg, annotation = sa1b_pair(number)
    content = json.loads(annotation)
    for mask in content["annotations"]:
        for box in ("bbox", "crop_box"):
            mask[box] = features.BBox(0.0, 0.0, 0.5, 0.5)
        mask["segmentation"]["size"] = np.array(mask["segmentation"]["size"], np.uint64)
    if number == 0:
        content["annotations"] = []
    return {
        "image": {**content["image"], "content": io.BytesIO(jpg)},
        "annotations": content["annotations"],
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images in the features of `segment_anything`, written without TensorFlow."""
    from tensorflow_datasets import features as f

    mask_feature = {
        "area": f.Scalar(dtype=np.uint64),
        "bbox": f.BBoxFeature(),
        "crop_box": f.BBoxFeature(),
        "id": f.Scalar(dtype=np.uint64),
        "point_coords": f.Tensor(shape=(1, 2), dtype=np.float64),
        "predicted_iou": f.Scalar(dtype=np.float64),
        "segmentation": f.FeaturesDict(
            {"counts": np.str_, "size": f.Tensor(shape=(2,), dtype=np.uint64)}
        ),
        "stability_score": f.Scalar(dtype=np.float64),
    }
    image_feature = {
        "content": f.Image(),
        "file_name": np.str_,
        "height": np.uint64,
        "image_id": np.uint64,
        "width": np.uint64,
    }
    features = f.FeaturesDict(
        {"image": f.FeaturesDict(image_feature), "annotations": f.Sequence(mask_feature)}
    )
    examples = [sa1b_example(number) for number in range(4)]
    return write_dataset(tmp_path_factory.mktemp("tfds"), "array_record", features, examples)


def test_samples_are_those_that_were_prepared(prepared: Path) -> None:
    source = TfdsSource(prepared)
    samples = {source[i].name.rpartition("::")[2]: source[i] for i in range(len(source))}
    assert sorted(samples) == [f"sa_{number}.jpg" for number in range(4)]
    for number in range(4):
        sample = samples[f"sa_{number}.jpg"]
        assert sample.image == sa1b_pair(number)[0]
        hw = numbered_hw(number)
        assert decode_image(sample).shape[:2] == hw
        if number == 0:
            assert sample.masks_rle == ()
        else:
            np.testing.assert_array_equal(
                decode_masks(sample, [0, 1]),
                [box_mask(hw, 1, 9, 2, 12), box_mask(hw, 5, 15, 10, 25)],
            )


def test_threads_may_read_at_once(prepared: Path) -> None:
    source = TfdsSource(prepared)
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda i: source[i % 4].name, range(40)))
    assert names == [source[i % 4].name for i in range(40)]


def test_samples_know_which_way_up_they_are_taken(prepared: Path) -> None:
    for key in ("upright", "stored"):
        assert TfdsSource(prepared, orientation=key)[0].orientation == key


def test_truth_is_that_of_the_record(prepared: Path) -> None:
    source, images = TfdsSource(prepared), TfdsImagesSource(prepared)
    for of in (source, images):
        assert len({of.truth(index) for index in range(4)}) == 4
        assert of.truth(1) == type(of)(prepared).truth(1)


def test_a_part_of_a_split(prepared: Path) -> None:
    assert len(TfdsSource(prepared, split="train[:75%]")) == 3


def test_reading_needs_no_tensorflow(prepared: Path) -> None:
    """In a process of its own: other tests may have imported it here."""
    program = f"""
import pickle, sys
from sam_jax.data.sources.tfds import TfdsImagesSource, TfdsSource
source = pickle.loads(pickle.dumps(TfdsSource({str(prepared)!r})))
print(len(source), len([source[i] for i in range(4)]), "tensorflow" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert result.stdout.split() == ["4", "4", "False"]


def damaged_copy(prepared: Path, folder: Path, damage: Any) -> Path:
    copy = folder / "1.0.0"
    shutil.copytree(prepared, copy)
    (records,) = copy.glob("*.array_record-*")
    records.write_bytes(damage(records.read_bytes()))
    return copy


def test_a_damaged_record_costs_only_itself(prepared: Path, tmp_path: Path) -> None:
    def damage(content: bytes) -> bytes:
        at = content.index(b"JFIF") + 30
        return content[:at] + b"damage" + content[at + 6 :]

    source = TfdsSource(damaged_copy(prepared, tmp_path, damage))
    reasons = []
    for index in range(4):
        try:
            source[index]
        except CorruptSampleError as error:
            reasons.append(error.reason)
    assert reasons == ["unreadable record"]


@pytest.mark.parametrize("kept", [0, 1 << 16])
def test_a_file_that_lost_its_end(prepared: Path, tmp_path: Path, kept: int) -> None:
    source = TfdsSource(damaged_copy(prepared, tmp_path, lambda content: content[:kept]))
    with pytest.raises(CorruptSampleError, match="unreadable record"):
        source[0]


def test_other_data_sets_are_refused(prepared: Path, tmp_path: Path) -> None:
    from tensorflow_datasets import features as f

    with pytest.raises(FileNotFoundError, match="version folder"):
        TfdsSource(prepared.parent)
    features = f.FeaturesDict({"image": f.FeaturesDict({"content": f.Image()})})
    jpg = sa1b_pair(1)[0]
    example = {"image": {"content": io.BytesIO(jpg)}}
    with pytest.raises(ConfigError, match="lacks SA-1B's features"):
        TfdsSource(write_dataset(tmp_path, "array_record", features, [example]))


def test_images_of_any_data_set_serve_without_masks(prepared: Path, tmp_path: Path) -> None:
    from tensorflow_datasets import features as f

    # SA-1B's have the picture under `content`; most others have it by itself.
    source = TfdsImagesSource(prepared)
    assert [decode_image(source[i]).shape[:2] for i in range(4)] == [
        decode_image(TfdsSource(prepared)[i]).shape[:2] for i in range(4)
    ]
    assert source[0].masks_rle == ()
    features = f.FeaturesDict({"image": f.Image(), "label": f.ClassLabel(num_classes=2)})
    jpg = sa1b_pair(3)[0]
    path = write_dataset(
        tmp_path / "plain", "array_record", features, [{"image": io.BytesIO(jpg), "label": 1}]
    )
    plain = TfdsImagesSource(path, name="plain")
    assert (len(plain), plain[0].image, plain[0].dataset) == (1, jpg, "plain")
    assert plain[0].name == f"{path}::0"
    features = f.FeaturesDict({"image": np.str_})
    without = write_dataset(tmp_path / "without", "array_record", features, [{"image": "a"}])
    with pytest.raises(ConfigError, match="lacks a feature 'image' or 'image/content'"):
        TfdsImagesSource(without)


def test_record_formats_without_random_access_are_refused(prepared: Path, tmp_path: Path) -> None:
    copy = damaged_copy(prepared, tmp_path, lambda content: content)
    info = copy / "dataset_info.json"
    content = json.loads(info.read_text())
    content["fileFormat"] = "tfrecord"
    info.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match='file_format="array_record"'):
        TfdsSource(copy)
