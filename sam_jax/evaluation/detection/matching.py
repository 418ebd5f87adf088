"""Predicted masks matched to true ones as COCO's evaluation does, and kept as integers of bits."""

import numpy as np

from sam_jax.arrays import Bool, Float, Int

# IoUs from which a prediction counts as the object; made as pycocotools makes them.
IOU_THRESHOLDS: Float[np.ndarray, "t"] = np.linspace(0.5, 0.95, 10)
# Areas in pixels, both ends inclusive.
SIZES = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}


def is_of_size(areas: Float[np.ndarray, "k"]) -> Bool[np.ndarray, "s k"]:
    """Tells for each of ``SIZES`` which areas are of it; one on a border is of both."""
    return np.array([(areas >= low) & (areas <= high) for low, high in SIZES.values()])


def greedy_matches(
    ious: Float[np.ndarray, "d g"],
    ignored: Bool[np.ndarray, "s g"],
    crowd: Bool[np.ndarray, "g"],
    thresholds: Float[np.ndarray, "t"] = IOU_THRESHOLDS,
) -> Int[np.ndarray, "s t d"]:
    """The number of the object that each prediction is matched to, -1 for none.

    Predictions choose in their order, each the free object of highest IoU, if that reaches the
    threshold; of equal ones the last. Objects that are ignored are chosen only where no other one
    reaches it. A crowd is never used up.

    Args:
      ious: of predictions by falling score, with objects.
      ignored: objects that are not to be found, for each of several sets of them.
      crowd: objects that mark a group.
      thresholds: of the IoU.

    Source: pycocotools, ``COCOeval.evaluateImg``.
    """
    num_predictions, num_objects = ious.shape
    matches = np.full((len(ignored), len(thresholds), num_predictions), -1)
    if not num_objects:
        return matches
    free = np.ones((len(ignored), len(thresholds), num_objects), bool)
    is_ignored = ignored[:, None]
    # Most proposals are of nothing that is marked.
    for number in np.flatnonzero(ious.max(axis=1) >= thresholds.min()):
        good = (free | crowd) & (ious[number] >= thresholds[:, None])
        wanted = good & ~is_ignored
        choosable = np.where(wanted.any(axis=2, keepdims=True), wanted, good)
        # Backwards, since of equal IoUs the last wins.
        ranked = np.where(choosable, ious[number], -1.0)[:, :, ::-1]
        chosen = num_objects - 1 - ranked.argmax(axis=2)
        found = choosable.any(axis=2)
        matches[:, :, number] = np.where(found, chosen, -1)
        sets, levels = np.nonzero(found)
        free[sets, levels, chosen[sets, levels]] = False
    return matches


def packed(flags: Bool[np.ndarray, "*rest t k"]) -> Int[np.ndarray, "*rest k"]:
    """Flags at each threshold as one integer: bit 0 is the lowest threshold's."""
    weights = 1 << np.arange(flags.shape[-2])
    return (flags * weights[:, None]).sum(axis=-2)


def unpacked(
    bits: Int[np.ndarray, "*rest k"], num_thresholds: int = len(IOU_THRESHOLDS)
) -> Bool[np.ndarray, "*rest t k"]:
    """The inverse of ``packed``."""
    places = np.arange(num_thresholds)[:, None]
    return (bits[..., None, :] >> places) & 1 > 0
