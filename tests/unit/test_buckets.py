import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import object_store, storage
from configs import eval_clicks, finetune_recipe, small_coco
from sam_jax import buckets
from sam_jax.buckets import BucketError, BucketPath, UnreachableBucketError, data_path
from sam_jax.data import DataConfig, SourceConfig, build_source, train_iterator
from sam_jax.data.listing_digest import listing_digest
from sam_jax.data.samples import CorruptSampleError
from sam_jax.data.sources.coco import CocoSource
from sam_jax.data.sources.images import ImagesSource
from sam_jax.data.sources.sa1b import Sa1bSource
from sam_jax.data.truth_digest import truth_digest
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import sa1b_files, sa1b_pair, write_tar

pytest.importorskip("s3fs", reason="buckets need the extra s3")
pytest.importorskip("moto", reason="the tests' S3 server is moto")
pytestmark = pytest.mark.filterwarnings(
    # botocore's own.
    "ignore:datetime.datetime.utcnow:DeprecationWarning"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two tars, loose pairs and a COCO file, as they lie on a disk."""
    root = tmp_path_factory.mktemp("disk")
    (root / "tars").mkdir()
    write_tar(root / "tars" / "sa_0.tar", sa1b_files(range(5)))
    write_tar(root / "tars" / "sa_1.tar", sa1b_files(range(5, 12)))
    (root / "tars" / "._sa_1.tar").write_bytes(b"hidden")
    for name, content in sa1b_files([20, 21]).items():
        path = root / "pairs" / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    image, annotations = sa1b_pair(30)
    rle = json.loads(annotations)["annotations"][0]["segmentation"]
    (root / "coco" / "images").mkdir(parents=True)
    (root / "coco" / "images" / "One.jpg").write_bytes(image)
    coco = {
        "images": [
            {"id": 1, "file_name": "one.jpg", "height": rle["size"][0], "width": rle["size"][1]},
            {"id": 2, "file_name": "two.jpg", "height": rle["size"][0], "width": rle["size"][1]},
        ],
        "annotations": [
            {"id": number, "image_id": number, "segmentation": rle, "iscrowd": 0}
            for number in (1, 2)
        ],
    }
    (root / "coco" / "instances.json").write_text(json.dumps(coco))
    return root


@pytest.fixture(scope="module")
def connection(files, tmp_path_factory) -> Iterator[object_store.Connection]:
    """A server with the bucket `data`, which has what is on the disk."""
    with object_store.serve(tmp_path_factory.mktemp("settings")) as connection:
        object_store.fill(
            "data",
            {
                path.relative_to(files).as_posix(): path
                for path in files.rglob("*")
                if path.is_file()
            }
            | {"pairs/": b""},
        )
        yield connection


@pytest.fixture(autouse=True)
def _good_connection(request, monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(buckets, "_FIRST_WAIT_SECONDS", 0.002)
    yield
    if "connection" in request.fixturenames:
        connection = request.getfixturevalue("connection")
        connection.delay_seconds, connection.num_drops, connection.is_down = 0.0, 0, False


def contents(source) -> list:
    return [(source[i].image, source[i].masks_rle) for i in range(len(source))]


def test_paths_of_buckets_are_told_from_those_of_disks(tmp_path: Path) -> None:
    assert data_path("a/b.tar") == Path("a/b.tar")
    assert data_path(tmp_path) is tmp_path
    path = data_path("s3://bucket/a/b.tar")
    assert isinstance(path, BucketPath)
    assert str(path) == "s3://bucket/a/b.tar"
    assert (path.name, path.suffix) == ("b.tar", ".tar")
    assert str(path.parent / "c") == "s3://bucket/a/c"
    assert path.relative_to(BucketPath("s3://bucket")).as_posix() == "a/b.tar"
    assert data_path(path) is path
    with pytest.raises(BucketError, match=r"https://x/y is a URL of a kind .* gs://BUCKET/NAME"):
        data_path("https://x/y")
    with pytest.raises(TypeError, match="no path of this computer's"):
        open(path)  # noqa: PTH123, SIM115


def test_what_reads_disks_imports_nothing_for_buckets() -> None:
    code = (
        "import sys; from sam_jax.data import SourceConfig, build_source; "
        "build_source(SourceConfig('synthetic', num_images=1))[0]; "
        "assert not {'s3fs', 'botocore', 'aiohttp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_buckets_give_what_disks_give(connection, files: Path, tmp_path: Path) -> None:
    for where in ("tars", "tars/*.tar", "tars/sa_1.tar", "pairs"):
        local = Sa1bSource(files / where, cache_dir=tmp_path / "local")
        remote = Sa1bSource(f"s3://data/{where}", cache_dir=tmp_path / "remote")
        assert len(remote) > 0
        assert contents(remote) == contents(local), where
        assert remote[0].name.startswith("s3://data/")
    # Two tars, whichever way they were named, and none of them scanned twice.
    assert len(list((tmp_path / "remote").glob("*.npy"))) == 2
    pictures = ImagesSource(["s3://data/tars", "s3://data/pairs"], cache_dir=tmp_path / "remote")
    assert len(pictures) == 14
    assert pictures[13].image == sa1b_pair(21)[0]
    coco = CocoSource("s3://data/coco/instances.json")
    assert coco[0].image == CocoSource(files / "coco" / "instances.json")[0].image
    with pytest.raises(CorruptSampleError, match=r"s3://data/coco/images/two\.jpg"):
        coco[1]


def test_configs_take_data_in_buckets(connection, files: Path) -> None:
    local = files / "coco" / "instances.json"
    object_store.fill(
        "mine",
        {
            "birds/train.json": local,
            "birds/val.json": local,
            "birds/images/One.jpg": files / "coco" / "images" / "One.jpg",
        },
    )
    splits = finetune_recipe.split_of("s3://mine/birds")
    for split, source in zip(("train", "val"), splits, strict=True):
        assert source["path"] == f"s3://mine/birds/{split}.json"
        assert source["images"] == "s3://mine/birds/images"
        (other,) = small_coco.sources("s3://mine", split, "configs/small_coco.py")
        assert other == source | {"name": "birds"}
    opened = build_source(SourceConfig.from_dict(splits[0]))
    assert opened[0].image == CocoSource(local)[0].image
    clicks = eval_clicks.get_config("s3://mine:birds").evals.clicks.sources
    assert [source["path"] for source in clicks] == ["s3://mine/birds/val.json"]


def test_truth_has_the_same_digest_in_buckets_and_on_disks(
    connection, files: Path, tmp_path: Path
) -> None:
    for kind, where in (
        (Sa1bSource, "tars"),
        (Sa1bSource, "pairs"),
        (ImagesSource, "tars"),
        (ImagesSource, "pairs"),
        (CocoSource, "coco/instances.json"),
    ):
        options = {} if kind is CocoSource else {"cache_dir": tmp_path}
        sources = [kind(place, **options) for place in (files / where, f"s3://data/{where}")]
        local, remote = (truth_digest(source, range(len(source))) for source in sources)
        assert local == remote, where


def test_files_in_buckets_have_the_digest_of_those_on_disks(connection, files: Path) -> None:
    for kind, where in (("sa1b", "tars/*.tar"), ("sa1b", "tars"), ("coco", "coco/instances.json")):
        local, remote = (
            listing_digest(SourceConfig(kind, f"{root}/{where}")) for root in (files, "s3://data")
        )
        assert local is not None
        assert remote == local, where
    # Which could only be listed as a whole.
    assert listing_digest(SourceConfig("sa1b", "s3://data/pairs")) is None


def test_indices_of_buckets_lie_in_the_users_cache(connection, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Sa1bSource("s3://data/tars/sa_0.tar")
    assert len(list((tmp_path / "sam_jax" / "tar_indices").glob("sa_0.tar.*.npy"))) == 1


def test_a_changed_tar_is_scanned_anew(connection, files: Path, tmp_path: Path) -> None:
    object_store.fill("changing", {"a.tar": files / "tars" / "sa_0.tar"})
    assert len(Sa1bSource("s3://changing/a.tar", cache_dir=tmp_path)) == 5
    object_store.fill("changing", {"a.tar": files / "tars" / "sa_1.tar"})
    assert len(Sa1bSource("s3://changing/a.tar", cache_dir=tmp_path)) == 7
    assert len(list(tmp_path.iterdir())) == 1


def test_ranges_end_with_the_object(connection, files: Path) -> None:
    path, content = BucketPath("s3://data/tars/sa_0.tar"), (files / "tars/sa_0.tar").read_bytes()
    assert path.info().size == len(content)
    assert path.read_range(100, 50) == content[100:150]
    assert path.read_range(len(content) - 10, 50) == content[-10:]
    assert path.read_range(len(content), 50) == b""
    assert path.read_range(len(content) + 100, 50) == b""
    assert path.read_range(0, 0) == b""
    with path.open() as file:
        file.seek(-10, 2)
        assert file.read() == content[-10:]
        file.seek(3)
        assert file.read(4) == content[3:7]


def test_what_is_written_is_read_again(connection, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(buckets, "_PIECE_BYTES", 7)
    object_store.fill("written", {"folder/": b"", "folder-2/other": b"no part of it"})
    folder = buckets.writable_path("s3://written/folder")
    (tmp_path / "file").write_bytes(bytes(range(30)))
    connection.num_drops = 2
    (folder / "a" / "file").upload(tmp_path / "file")
    (folder / "b").write_bytes(b"few")
    (folder / "c").write_bytes(b"")
    assert folder.sizes_below() == {"a/file": 30, "b": 3, "c": 0}
    for name, size in folder.sizes_below().items():
        (folder / name).download(tmp_path / "copy", size)
        assert (tmp_path / "copy").read_bytes() == (folder / name).read_bytes(), name
    (folder / "b").remove()
    (folder / "b").remove()
    assert folder.sizes_below() == {"a/file": 30, "c": 0}
    with pytest.raises(FileNotFoundError) as raised:
        (folder / "d").upload(tmp_path / "nothing")
    assert raised.value.filename == str(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="s3://unwritten/a is not there"):
        BucketPath("s3://unwritten/a").upload(tmp_path / "file")
    monkeypatch.setattr(buckets, "_ATTEMPTS", 2)
    connection.is_down = True
    buckets.disconnect()
    with pytest.raises(UnreachableBucketError, match="s3://written/folder/b could not be written"):
        (folder / "b").write_bytes(b"")


def test_a_tar_cut_short_is_one_in_a_bucket(connection, files: Path, tmp_path: Path) -> None:
    whole = (files / "tars" / "sa_0.tar").read_bytes()
    # In the middle of the last picture's json, of which only the beginning is there.
    object_store.fill("cut", {"a.tar": whole[: whole.rindex(b'"segmentation"')]})
    source = Sa1bSource("s3://cut/a.tar", cache_dir=tmp_path)
    with pytest.raises(CorruptSampleError, match="truncated tar"):
        contents(source)


def test_every_sample_comes_once_over_a_connection_that_drops(
    connection, files: Path, tmp_path: Path, caplog
) -> None:
    caplog.set_level(logging.INFO, logger="sam_jax.buckets")
    options = {"image_size": (16, 16), "batch_size": 4, "max_masks": 1, "num_threads": 3}

    def batches(path: str) -> list[dict]:
        source = SourceConfig("sa1b", path=path, cache_dir=str(tmp_path))
        iterator = train_iterator(DataConfig(sources=(source,), **options))
        # Three batches are an epoch of 12 samples.
        found = [next(iterator) for _ in range(6)]
        assert (iterator.num_seen, iterator.corrupt_counts) == (24, {})
        iterator.close()
        return found

    local = batches(str(files / "tars"))
    # Some of them during the scan of the tars, the others while samples are read.
    connection.num_drops, dropped_before = 4, connection.num_dropped
    Sa1bSource("s3://data/tars", cache_dir=tmp_path)
    assert connection.num_dropped == dropped_before + 4
    connection.num_drops, connection.delay_seconds = 6, 0.002
    remote = batches("s3://data/tars")
    assert connection.num_dropped == dropped_before + 10
    # Some requests are repeated by aiohttp already, where a kept connection was closed.
    assert any("attempt 1 of" in record.message for record in caplog.records)
    for batch, expected in zip(remote, local, strict=True):
        names = [[Path(name).name for name in b.pop("sample_names")] for b in (batch, expected)]
        assert names[0] == names[1]
        for key, array in expected.items():
            np.testing.assert_array_equal(batch[key], array, key)


def test_what_does_not_answer_is_given_up(connection, monkeypatch, caplog) -> None:
    monkeypatch.setattr(buckets, "_ATTEMPTS", 3)
    buckets.disconnect()
    connection.is_down = True
    with pytest.raises(
        UnreachableBucketError, match=r"s3://data/tars/sa_0.tar could not be read, tried 3 times"
    ) as raised:
        BucketPath("s3://data/tars/sa_0.tar").read_range(0, 10)
    assert raised.value.exit_code == 75


def test_what_never_ends_is_given_up(connection, monkeypatch) -> None:
    monkeypatch.setattr(buckets, "_ATTEMPTS", 2)
    monkeypatch.setattr(buckets, "_REQUEST_SECONDS", 0.05)
    connection.delay_seconds = 0.3
    with pytest.raises(UnreachableBucketError, match=r"tried 2 times: FSTimeoutError"):
        BucketPath("s3://data/tars/sa_0.tar").read_range(0, 10)


def test_a_tar_that_vanished_is_said_to_be_gone(connection, files, tmp_path) -> None:
    object_store.fill("vanishing", {"a.tar": files / "tars" / "sa_0.tar"})
    source = Sa1bSource("s3://vanishing/a.tar", cache_dir=tmp_path)
    object_store.remove("vanishing", "a.tar")
    with pytest.raises(FileNotFoundError, match=r"s3://vanishing/a\.tar is not there"):
        source[0]
    with pytest.raises(FileNotFoundError, match=r"nothing at s3://vanishing/a\.tar"):
        Sa1bSource("s3://vanishing/a.tar")
    with pytest.raises(FileNotFoundError, match="s3://none"):
        CocoSource("s3://none/instances.json")


def test_access_denied_is_said_at_once(connection, monkeypatch, caplog) -> None:
    def denied(*args, **kwargs):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(buckets, "_answer", denied)
    with pytest.raises(BucketError, match=r"s3://data/a may not be read: .*Forbidden.*AWS_PROFILE"):
        BucketPath("s3://data/a").read_bytes()
    assert not caplog.records


def test_packages_that_are_missing_are_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    buckets.disconnect()
    with pytest.raises(BucketError, match=r"pip install 'sam-jax\[gs\]'"):
        BucketPath("gs://bucket/a").read_bytes()


def test_storage_is_measured(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "IMAGE_HW", (60, 90))
    monkeypatch.setattr(storage, "DELAY_SECONDS", 0.001)
    out = tmp_path / "record.json"
    # Every pass is compared with the files on the disk.
    record = storage.main(["--images", "6", "--repeats", "2", "--decode", "--out", str(out)])
    assert json.loads(out.read_text()) == record
    assert record["samples_compared"] == 6 * 4 * 2
    assert record["connections_dropped"] > 0
    assert record["rates"]["images/s, S3"]["achieved"] > 0


def test_sources_that_read_disks_only_refuse_urls() -> None:
    with pytest.raises(ConfigError, match=r"'mask_folder' reads disks only.*Kinds .*sa1b"):
        build_source(SourceConfig("mask_folder", path="s3://data/a", masks="b"))
