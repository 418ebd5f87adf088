"""Streams of images: records in order, whatever cannot be used, and however slow scoring is."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_jax.data.samples import CorruptSampleError
from sam_jax.evaluation.detection.image_stream import records_of_stream


def records(indices: list[int], damaged: set[int], ahead: int) -> list[dict[str, Any]]:
    def read(index: int) -> int:
        if index in damaged:
            raise CorruptSampleError(str(index), "damaged")
        return index

    def answer(images: Iterator[int]) -> Iterator[str]:
        """As a model does that takes several images at once."""
        taken = list(zip(range(ahead), images, strict=False))
        while taken:
            yield from (f"answer to {image}" for _, image in taken)
            taken = list(zip(range(ahead), images, strict=False))

    def score(image: int, answered: str) -> dict[str, Any]:
        time.sleep(0.001 * (image % 3))
        return {"image": image, "answer": answered}

    return list(
        records_of_stream(
            indices, read, answer, score, lambda i, e: {"skipped": i, "why": e.reason}
        )
    )


@given(
    st.lists(st.integers(0, 40), max_size=12, unique=True), st.sets(st.integers(0, 40)), st.data()
)
def test_one_record_for_each_in_order(indices: list[int], damaged: set[int], data: Any) -> None:
    found = records(indices, damaged, data.draw(st.integers(1, 4)))
    assert found == [
        {"skipped": i, "why": "damaged"}
        if i in damaged
        else {"image": i, "answer": f"answer to {i}"}
        for i in indices
    ]


def test_errors_of_the_code_come_through() -> None:
    def fail(image: int, answered: int) -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(records_of_stream([1, 2], lambda i: i, iter, fail, lambda i, e: {}))
