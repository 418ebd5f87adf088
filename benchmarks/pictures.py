"""Real pictures for benchmarks, from folders."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sam_jax.images import read_image


def pictures_in(folders: Sequence[Path], num_images: int) -> list[np.ndarray]:
    """RGB pictures from all over the folders, which may hold hundreds of one kind first."""
    files = sorted(
        path
        for folder in folders
        for path in folder.iterdir()
        if path.suffix in (".jpg", ".jpeg", ".png")
    )
    chosen = np.linspace(0, len(files) - 1, min(num_images, len(files))).astype(int)
    return [read_image(files[index]) for index in chosen]
