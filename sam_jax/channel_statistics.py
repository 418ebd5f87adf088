"""Statistics of the channels of a data set's images, which a model normalises by."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sam_jax.arrays import Float, Shaped
from sam_jax.errors import ConfigError
from sam_jax.files import data_files
from sam_jax.image_channels import image_suffixes, stored_channels
from sam_jax.images import UnreadableImageError, read_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Statistics of each channel over all pixels of all images, in the units of the files.

    Attributes:
      minimum: least value.
      maximum: greatest value.
      mean: of all pixels, each of which counts as much as any other.
      std: deviation from it, of all pixels (not estimated of a sample).
    """

    minimum: Float[np.ndarray, "c"]
    maximum: Float[np.ndarray, "c"]
    mean: Float[np.ndarray, "c"]
    std: Float[np.ndarray, "c"]

    @property
    def num_channels(self) -> int:
        """Number of channels."""
        return len(self.mean)


def image_files(paths: Sequence[str]) -> list[Path]:
    """Image files that paths name: of folders all below them, of patterns all that match.

    Raises:
      ConfigError: if a path names nothing, or there is no image in a folder.
    """
    suffixes = image_suffixes(1)
    found: dict[Path, None] = {}
    for text in paths:
        path = Path(text)
        # A name may hold what patterns are made of.
        pattern = str(path.relative_to(path.anchor))
        matches = [path] if path.exists() else sorted(Path(path.anchor).glob(pattern))
        if not matches:
            raise ConfigError(f"{text}: there is no such file or folder, and no pattern fits any")
        for match in matches:
            if not match.is_dir():
                found[match] = None
                continue
            inside, _ = data_files(match, suffixes)
            if not inside and len(matches) == 1:
                raise ConfigError(f"{match} holds no image ({', '.join(suffixes)})")
            found |= dict.fromkeys(inside)
    return list(found)


class ChannelTotals:
    """Statistics of images that come one by one, in float64.

    Each image's own mean and sum of squares about it are joined with those before, which loses
    nothing where values are far from 0, as a sum of squares does.

    Attributes:
      num_images: that were added.
      dtypes: types of their values.
      unreadable: a line for each file that could not be read.

    Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances".
    """

    def __init__(self) -> None:
        self.num_images = 0
        self.dtypes: set[str] = set()
        self.unreadable: list[str] = []
        self._first: Path | None = None
        self._count = 0
        self._minimum = self._maximum = self._mean = self._squares = np.zeros(0)

    def add_file(self, path: Path) -> None:
        """Adds a file, or a line about it if it cannot be read.

        Raises:
          ConfigError: if it has another number of channels than those before.
        """
        try:
            values = stored_channels(read_bytes(path), str(path))
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise UnreadableImageError(
                    str(path), "has pixels that are not finite (NaN or infinite), expected numbers"
                )
        except UnreadableImageError as error:
            self.unreadable.append(str(error))
            return
        self.add(values, path)

    def add(self, values: Shaped[np.ndarray, "h w c"], path: Path) -> None:
        """Adds an image's finite values.

        Args:
          values: of all channels.
          path: what to call the image in messages.

        Raises:
          ConfigError: if it has another number of channels than those before.
        """
        pixels = values.reshape(-1, values.shape[2])
        if self._first is None:
            self._first = path
            num_channels = pixels.shape[1]
            self._minimum = np.full(num_channels, np.inf)
            self._maximum = np.full(num_channels, -np.inf)
            self._mean, self._squares = np.zeros(num_channels), np.zeros(num_channels)
        if pixels.shape[1] != len(self._mean):
            raise ConfigError(
                f"{self._first} has {len(self._mean)} channels, {path} has {pixels.shape[1]}: a "
                "model takes images of one number of channels; give the files of one kind, as with "
                "a pattern"
            )
        count = len(pixels)
        mean = pixels.mean(axis=0, dtype=np.float64)
        # A channel at a time, as float64 takes up to eight times the memory of the file's type.
        squares = np.array(
            [np.square(pixels[:, c].astype(np.float64) - mean[c]).sum() for c in range(len(mean))]
        )
        total = self._count + count
        offset = mean - self._mean
        self._squares = self._squares + squares + offset**2 * (self._count * count / total)
        self._mean = self._mean + offset * (count / total)
        self._minimum = np.minimum(self._minimum, pixels.min(axis=0))
        self._maximum = np.maximum(self._maximum, pixels.max(axis=0))
        self._count = total
        self.num_images += 1
        self.dtypes.add(str(values.dtype))

    def statistics(self) -> ChannelStatistics:
        """Statistics of all images so far; there must be one."""
        std = np.sqrt(self._squares / self._count)
        return ChannelStatistics(self._minimum, self._maximum, self._mean, std)
