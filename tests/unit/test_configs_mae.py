"""Arguments of configs/mae_*.py, and how all configs take theirs apart."""

import pytest

from configs.common import split_argument
from configs.mae_recipe import image_sources


@pytest.mark.parametrize(
    ("argument", "train", "val"),
    [
        ("pictures", "pictures", None),
        ("pictures:others", "pictures", "others"),
        ("s3://bucket/tars", "s3://bucket/tars", None),
        ("s3://bucket/a*.tar:gs://other/b.tar", "s3://bucket/a*.tar", "gs://other/b.tar"),
        ("pictures:s3://bucket/b", "pictures", "s3://bucket/b"),
    ],
)
def test_places_of_pictures_may_be_buckets(argument: str, train: str, val: str | None) -> None:
    found_train, found_val = image_sources(argument, "configs/mae_tiny.py")
    assert found_train == {"kind": "images", "path": train, "name": "train"}
    assert (found_val and found_val["path"]) == val


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("", ("", "")),
        ("data", ("data", "")),
        ("data:weights.pth", ("data", "weights.pth")),
        ("s3://bucket/x:weights.pth", ("s3://bucket/x", "weights.pth")),
        ("s3://bucket/x:gs://other/y", ("s3://bucket/x", "gs://other/y")),
        ("data:gs://other/y:z", ("data", "gs://other/y:z")),
    ],
)
def test_an_argument_has_two_parts(argument: str, parts: tuple[str, str]) -> None:
    assert split_argument(argument) == parts
