"""Reading annotated images and making training batches of them.

`config.DataConfig` says what to load, `pipeline.train_iterator` loads it.
Nothing here runs on an accelerator.
"""

from sam_jax.data.config import DataConfig, SourceConfig, build_source
from sam_jax.data.corruption import NoObjectsError, TooManyCorruptSamplesError
from sam_jax.data.pipeline import EvalExample, eval_samples, train_iterator
from sam_jax.data.samples import (
    CorruptSampleError,
    NoObjectError,
    Sample,
    SkippedSampleError,
    decode_image,
    decode_masks,
)
from sam_jax.data.transforms import TrainTransform

__all__ = [
    "CorruptSampleError",
    "DataConfig",
    "EvalExample",
    "NoObjectError",
    "NoObjectsError",
    "Sample",
    "SkippedSampleError",
    "SourceConfig",
    "TooManyCorruptSamplesError",
    "TrainTransform",
    "build_source",
    "decode_image",
    "decode_masks",
    "eval_samples",
    "train_iterator",
]
