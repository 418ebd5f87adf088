"""Data sets as prepared by TensorFlow Datasets, read without TensorFlow: SA-1B, and images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam_jax.data.samples import CorruptSampleError, Sample
from sam_jax.data.sources import truth_bytes
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.images import Orientation

# ArrayRecord checks sums, so damage shows as an error of reading.
_READ_ERRORS = (OSError, RuntimeError, ValueError, IndexError)


class _PreparedSource:
    """A prepared split, of whose records the features in use are decoded.

    Args:
      path: its version folder, as in `.../segment_anything/1.0.0`.
      split: "train", or a part of it such as "train[:1%]".
      name: what `Sample.dataset` says.
      orientation: see `Sample`.
      used: of the stored features, those in use and how each is decoded; its errors mean that the
        data set lacks one of them.
      what: the features it needs, for messages.

    Raises:
      FileNotFoundError: nothing is there.
      ConfigError: it is not ArrayRecord, or lacks the features.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        name: str,
        orientation: Orientation,
        used: Callable[[Any, Any], tuple[dict[str, Any], dict[str, Any]]],
        what: str,
    ):
        # Slow to import, and needed for these sources only.
        import tensorflow_datasets as tfds

        if not Path(path, "dataset_info.json").is_file():
            raise FileNotFoundError(f"{path} is no prepared data set's version folder")
        builder = tfds.builder_from_directory(str(path))
        try:
            # (tfds.decode.PartialDecoding does the same, but needs TensorFlow.)
            features, self._decoders = used(tfds, builder.info.features)
            self._features = tfds.features.FeaturesDict(features)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} lacks {what}: {error!r}") from error
        try:
            self._records = builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except NotImplementedError as error:
            raise ConfigError(
                f"{path} is stored as {builder.info.file_format}; prepare it "
                'again with file_format="array_record"'
            ) from error
        self.name = name
        self.left_out = Tally()
        self._orientation = orientation
        self._path = str(path)

    def __len__(self) -> int:
        return len(self._records)

    def _read(self, index: int) -> dict[str, Any]:
        """The features of the record at 0 <= index < len.

        Raises:
          CorruptSampleError: the record is damaged.
        """
        name = f"{self._path}::{index}"
        try:
            record = self._records[index]
        except _READ_ERRORS as error:
            raise CorruptSampleError(name, "unreadable record", str(error)) from error
        if not record:
            # What ArrayRecord hands out for a file that lost its end.
            raise CorruptSampleError(name, "unreadable record", "it is empty")
        features: dict[str, Any] = self._features.deserialize_example_np(
            record, decoders=self._decoders
        )
        return features


class TfdsSource(_PreparedSource):
    """The data set `segment_anything`, prepared as ArrayRecord.

    Prepare it with `file_format="array_record"`; the default TFRecord allows
    no random access. Any builder with the same features will do.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        name: str = "tfds",
        orientation: Orientation = "upright",
    ):
        """Opens the data set; arguments and errors as `_PreparedSource` has them."""
        super().__init__(path, split, name, orientation, _sa1b_features, "SA-1B's features")

    def __getitem__(self, index: int) -> Sample:
        """The record at 0 <= index < len.

        Raises:
          CorruptSampleError: the record is damaged.
        """
        record = self._read(index)
        image, masks = record["image"], record["annotations"]["segmentation"]
        return Sample(
            image["content"],
            tuple(_to_rle(*mask) for mask in zip(masks["size"], masks["counts"], strict=True)),
            self.name,
            f"{self._path}::{image['file_name'].decode()}",
            orientation=self._orientation,
        )

    def truth(self, index: int) -> bytes:
        """The picture's name and its run lengths.

        Raises:
          CorruptSampleError: the record is damaged.
        """
        sample = self[index]
        masks = [(mask["size"], mask["counts"].decode("latin-1")) for mask in sample.masks_rle]
        return truth_bytes([sample.name.rpartition("::")[2], masks])


class TfdsImagesSource(_PreparedSource):
    """The images of any data set that was prepared as ArrayRecord, without masks."""

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        name: str = "tfds_images",
        orientation: Orientation = "upright",
    ):
        """Opens the data set; arguments and errors as `_PreparedSource` has them.

        The feature `image` is an encoded picture, by itself or under `content`, as SA-1B's.
        """
        what = "a feature 'image' or 'image/content' of encoded pictures"
        super().__init__(path, split, name, orientation, _image_feature, what)

    def __getitem__(self, index: int) -> Sample:
        """The picture of the record at 0 <= index < len.

        Raises:
          CorruptSampleError: the record is damaged.
        """
        image = self._read(index)["image"]
        if isinstance(image, dict):
            image = image["content"]
        name = f"{self._path}::{index}"
        return Sample(image, (), self.name, name, orientation=self._orientation)

    def truth(self, index: int) -> bytes:
        """Place and size of the picture.

        Raises:
          CorruptSampleError: the record is damaged.
        """
        return truth_bytes([index, len(self[index].image)])


def _sa1b_features(tfds: Any, stored: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Features of SA-1B in use; boxes and scores stay undecoded."""
    of_masks = {"segmentation": stored["annotations"].feature["segmentation"]}
    features = {
        "image": {key: stored["image"][key] for key in ("content", "file_name")},
        "annotations": tfds.features.Sequence(of_masks),
    }
    return features, {"image": {"content": tfds.decode.SkipDecoding()}}


def _image_feature(tfds: Any, stored: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The encoded picture alone."""
    skip, image = tfds.decode.SkipDecoding(), stored["image"]
    if isinstance(image, tfds.features.Image):
        return {"image": image}, {"image": skip}
    content = image["content"]
    if not isinstance(content, tfds.features.Image):
        raise TypeError(f"'image/content' is {content!r}")
    return {"image": {"content": content}}, {"image": {"content": skip}}


def _to_rle(size: Any, counts: bytes) -> dict[str, Any]:
    return {"size": [int(side) for side in size], "counts": counts}
