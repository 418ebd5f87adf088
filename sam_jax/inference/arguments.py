"""Arguments of the predictor, told apart: one image, several, or something else."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam_jax.images import ImageError
from sam_jax.inference.images import ImageEmbeddings
from sam_jax.inference.prompts import Prompt, PromptError

# Channels of 8-bit images: grey, RGB, RGBA.
_CHANNELS = (1, 3, 4)
# Iterables that are no lists of images.
_NO_LISTS = (str, bytes, Path, set, frozenset, Prompt, ImageEmbeddings)


def images_in(images: Any, in_channels: int | None = None) -> Iterator[Any]:
    """The images of an argument, one after the other; each an array or a picture of Pillow's.

    A picture of Pillow's, an array ``[h, w]`` and an array ``[h, w, c]`` of 1, 3 or 4 channels are
    one image. An array ``[n, h, w, c]`` is n of them, as is anything else that can be gone through
    once: a list, a tuple, a generator.

    Args:
      images: the argument.
      in_channels: channels of the model's images, which an array ``[h, w, c]`` has then; None for
        8-bit RGB.

    Raises:
      ImageError: if it is none of these, at once; or an entry is no image, when it is reached.
    """
    channels = _CHANNELS if in_channels is None else (in_channels,)
    if isinstance(images, Image.Image):
        return _each([images])
    shape = getattr(images, "shape", None)
    holds_objects = isinstance(images, np.ndarray) and images.dtype.kind == "O"
    if isinstance(shape, tuple) and not holds_objects:
        if len(shape) == 2 or (len(shape) == 3 and shape[2] in channels):
            return _each([images])
        if len(shape) != 4:
            c = in_channels or 3
            raise ImageError(
                f"images is one array of shape {tuple(shape)}, which is neither an image "
                f"[h, w, {c}] nor several of one size, [n, h, w, {c}], channels last; images of "
                "several sizes are given as a list: [image, other]"
            )
    elif isinstance(images, Mapping):
        raise ImageError("images is a mapping, which has no order: give list(images.values())")
    elif isinstance(images, _NO_LISTS) or not isinstance(images, Iterable):
        raise ImageError(f"images {_what_is(images)}")
    return _each(images)


def _each(images: Iterable[Any]) -> Iterator[Any]:
    for number, image in enumerate(images):
        yield one_image(image, f"image {number}")


def one_image(image: Any, name: str) -> Any:
    """An image, as an array if it is not a picture of Pillow's.

    Args:
      image: anything.
      name: what to call it in messages.

    Raises:
      ImageError: if it is no single image.
    """
    if isinstance(image, np.ndarray | Image.Image):
        return image
    is_array = hasattr(image, "__array__") or hasattr(image, "__array_interface__")
    if not is_array or isinstance(image, ImageEmbeddings):
        raise ImageError(f"{name} {_what_is(image)}")
    try:
        array = np.asarray(image)
    # PyTorch tensors on a device or with gradients, traced values: each raises another error.
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ImageError(
            f"{name} is a {type(image).__name__} that cannot be made a numpy array: {reason}"
        ) from None
    if array.dtype.kind == "O":
        raise ImageError(f"{name} {_what_is(image)}")
    return array


def _what_is(thing: Any) -> str:
    """Description of an object that is no image, and of what to write instead."""
    if isinstance(thing, str | bytes | Path):
        shown = repr(str(thing) if isinstance(thing, Path) else thing[:200])
        return f"is {shown}, no image: if that is a file, give sam_jax.images.read_image(path)"
    if isinstance(thing, ImageEmbeddings):
        return "has been embedded already: give the embeddings to predict"
    if isinstance(thing, list | tuple):
        return (
            f"is a {type(thing).__name__} of {len(thing)}, no image: give a flat list of arrays, "
            "or make it an array with numpy.asarray(..., numpy.uint8)"
        )
    return (
        f"is a {type(thing).__name__}: expected an image, which is an array [h, w, 3] or a picture "
        "of Pillow's, or a list of those where several are taken"
    )


def checked_embeddings(embeddings: Any) -> ImageEmbeddings:
    """The argument, if it is what ``Predictor.embed`` gives.

    Raises:
      PromptError: if it is not.
    """
    if isinstance(embeddings, ImageEmbeddings):
        return embeddings
    if isinstance(embeddings, list | tuple) and any(
        isinstance(one, ImageEmbeddings) for one in embeddings
    ):
        raise PromptError(
            f"embeddings is a {type(embeddings).__name__} of {len(embeddings)}: embed the images "
            "together, embed([image, other]), or call predict for each"
        )
    raise PromptError(
        f"embeddings is a {type(embeddings).__name__}: expected what embed([image]) gives, or "
        "ImageEmbeddings.load"
    )


def prompts_per_image(prompts: Any, num_images: int) -> list[list[Prompt]]:
    """The prompts of each image.

    Raises:
      PromptError: if it is no list of lists of prompts, one for each image.
    """
    form = "give a list for each image: [[Prompt(...), Prompt(...)], [Prompt(...)]]"
    if isinstance(prompts, Prompt):
        raise PromptError(f"prompts is a lone Prompt; {form}, here [[prompt]]")
    outer = _listed(prompts, f"prompts is a {type(prompts).__name__}; {form}")
    if outer and all(isinstance(one, Prompt) for one in outer):
        raise PromptError(
            f"prompts is a list of {len(outer)} prompts, which does not say whose; {form}"
        )
    if len(outer) != num_images:
        raise PromptError(
            f"there are {num_images} images and prompts for {len(outer)}; an image without "
            "prompts needs an empty list"
        )
    found = []
    for image, objects in enumerate(outer):
        name = f"prompts of image {image}"
        if isinstance(objects, Prompt):
            raise PromptError(f"{name} are a lone Prompt; {form}")
        of_image = _listed(objects, f"{name} are a {type(objects).__name__}; {form}")
        for number, prompt in enumerate(of_image):
            if not isinstance(prompt, Prompt):
                raise PromptError(
                    f"image {image}, prompt {number} is a {type(prompt).__name__}; expected a "
                    "Prompt, as in Prompt(points=[(x, y)]) or Prompt(box=(x0, y0, x1, y1))"
                )
        found.append(of_image)
    return found


def _listed(things: Any, otherwise: str) -> list[Any]:
    if isinstance(things, str | bytes | Mapping) or not isinstance(things, Iterable):
        raise PromptError(otherwise)
    try:
        return list(things)
    # An array without axes.
    except TypeError:
        raise PromptError(otherwise) from None
