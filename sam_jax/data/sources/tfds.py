"""SA-1B as prepared by TensorFlow Datasets, read without TensorFlow."""

from pathlib import Path
from typing import Any

from sam_jax.data.samples import CorruptSampleError, Sample
from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.images import Orientation

# ArrayRecord checks sums, so damage shows as an error of reading.
_READ_ERRORS = (OSError, RuntimeError, ValueError, IndexError)


class TfdsSource:
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
        """Opens the data set; records are read when asked for.

        Args:
          path: its version folder, as in `.../segment_anything/1.0.0`.
          split: "train", or a part of it such as "train[:1%]".
          name: what `Sample.dataset` says.
          orientation: see `Sample`.

        Raises:
          FileNotFoundError: nothing is there.
          ConfigError: it is not ArrayRecord, or lacks SA-1B's features.
        """
        # Slow to import, and needed for this source only.
        import tensorflow_datasets as tfds

        if not Path(path, "dataset_info.json").is_file():
            raise FileNotFoundError(f"{path} is no prepared data set's version folder")
        builder = tfds.builder_from_directory(str(path))
        stored = builder.info.features
        features = tfds.features
        try:
            # What is read of a record; boxes and scores stay undecoded.
            # (tfds.decode.PartialDecoding does the same, but needs TensorFlow.)
            self._features = features.FeaturesDict(
                {
                    "image": {key: stored["image"][key] for key in ("content", "file_name")},
                    "annotations": features.Sequence(
                        {"segmentation": stored["annotations"].feature["segmentation"]}
                    ),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} lacks SA-1B's features: {error!r}") from error
        self._decoders = {"image": {"content": tfds.decode.SkipDecoding()}}
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

    def __getitem__(self, index: int) -> Sample:
        """The record at 0 <= index < len.

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
        record = self._features.deserialize_example_np(record, decoders=self._decoders)
        image, masks = record["image"], record["annotations"]["segmentation"]
        return Sample(
            image["content"],
            tuple(_to_rle(*mask) for mask in zip(masks["size"], masks["counts"], strict=True)),
            self.name,
            f"{self._path}::{image['file_name'].decode()}",
            orientation=self._orientation,
        )


def _to_rle(size: Any, counts: bytes) -> dict[str, Any]:
    return {"size": [int(side) for side in size], "counts": counts}
