"""Arguments of configs/mae_*.py."""

import pytest

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
