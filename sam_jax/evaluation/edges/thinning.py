"""Thinning of binary edge maps to lines of one pixel, as the benchmark does before it matches."""

from typing import no_type_check

import numba
import numpy as np

from sam_jax.arrays import Bool, UInt8

# Neighbours in the order of the paper, from the east against the clock; each is a bit.
_EAST, _NORTH_EAST, _NORTH, _NORTH_WEST, _WEST, _SOUTH_WEST, _SOUTH, _SOUTH_EAST = range(8)


def deletable(subiteration: int) -> UInt8[np.ndarray, "256"]:
    """1 for the neighbourhoods whose middle a subiteration deletes.

    Args:
      subiteration: 0 takes pixels from the north east side of a line, 1 from the south west.

    Source: Guo and Hall 1989, "Parallel thinning with two-subiteration algorithms", A1.
    """
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    x = bits.astype(bool)
    following = np.roll(x, -1, axis=1)
    after_next = np.roll(x, -2, axis=1)
    # Lines that end at the middle: a side neighbour that is off, with one behind it that is on.
    crossings = (~x & (following | after_next))[:, ::2].sum(axis=1)
    pairs = (x | following)[:, ::2].sum(axis=1), (x | following)[:, 1::2].sum(axis=1)
    fewest = np.minimum(*pairs)
    if subiteration == 0:
        is_kept_side = x[:, _EAST] & (x[:, _NORTH_EAST] | x[:, _NORTH] | ~x[:, _SOUTH_EAST])
    else:
        is_kept_side = x[:, _WEST] & (x[:, _SOUTH_WEST] | x[:, _SOUTH] | ~x[:, _NORTH_WEST])
    deleted = (crossings == 1) & (fewest >= 2) & (fewest <= 3) & ~is_kept_side
    return deleted.astype(np.uint8)


_DELETABLE = np.stack([deletable(0), deletable(1)])


def thin(edges: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The lines that are left when thinning takes no more pixels; outside of the image is nothing.

    It ends when neither of the two subiterations has deleted anything: the first alone may leave
    all as it is where the second does not.

    Source: MATLAB's ``bwmorph(edges, 'thin', inf)``.
    """
    padded = np.pad(edges.view(np.uint8), 1)
    _thin(padded, _DELETABLE)
    return padded[1:-1, 1:-1].astype(bool)


# The tests' checker of annotations would stand between this function and its compiler.
@numba.njit(nogil=True)
@no_type_check
def _thin(padded, deletable):
    """Thins in place; rows and columns of zeros stand around the image."""
    width = padded.shape[1]
    pixels = padded.ravel()
    around = np.array([1, 1 - width, -width, -width - 1, -1, width - 1, width, width + 1])
    # Each subiteration looks again only at pixels with a neighbour that went since it last did.
    watched = np.flatnonzero(pixels)
    looks_left = np.zeros(pixels.size, np.uint8)
    looks_left[watched] = 2
    following = np.empty_like(watched)
    going = np.empty_like(watched)
    num_watched, half = watched.size, 0
    while num_watched:
        num_following, num_going = 0, 0
        for place in range(num_watched):
            pixel = watched[place]
            neighbours = 0
            for direction in range(8):
                neighbours |= pixels[pixel + around[direction]] << direction
            if deletable[half, neighbours]:
                going[num_going] = pixel
                num_going += 1
                looks_left[pixel] = 0
                continue
            looks_left[pixel] -= 1
            if looks_left[pixel]:
                following[num_following] = pixel
                num_following += 1
        for place in range(num_going):
            pixels[going[place]] = 0
        for place in range(num_going):
            for direction in range(8):
                pixel = going[place] + around[direction]
                if not pixels[pixel]:
                    continue
                if not looks_left[pixel]:
                    following[num_following] = pixel
                    num_following += 1
                looks_left[pixel] = 2
        watched, following = following, watched
        num_watched, half = num_following, 1 - half
