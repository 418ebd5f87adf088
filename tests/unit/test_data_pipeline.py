import collections
import dataclasses
import itertools
import json
import logging
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sam_jax.data import pipeline
from sam_jax.data.config import DataConfig, SourceConfig, build_source
from sam_jax.data.corruption import NoObjectsError, TooManyCorruptSamplesError
from sam_jax.data.pipeline import (
    InputWorkerError,
    TrainIterator,
    eval_samples,
    train_iterator,
)
from sam_jax.errors import ConfigError
from tests.unit.data_fixtures import (
    box_mask,
    compress,
    encode_image,
    gradient_image,
    numbered_hw,
    sa1b_files,
    sa1b_json,
    write_coco,
    write_tar,
)

NUM_IMAGES = 11


@pytest.fixture(scope="module")
def coco_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco", NUM_IMAGES)


def make_config(*sources: SourceConfig, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "sources": sources,
        "image_size": (16, 24),
        "batch_size": 4,
        "max_masks": 2,
        "num_threads": 1,
        "prefetch_examples": 4,
    }
    return DataConfig(**{**values, **changes})


def coco(path: Path, **changes: Any) -> SourceConfig:
    return SourceConfig("coco", str(path), **changes)


@pytest.fixture
def config(coco_json: Path) -> DataConfig:
    """Two sources and every kind of randomness."""
    return make_config(
        SourceConfig("synthetic", num_images=7, image_size=(24, 32)),
        coco(coco_json, weight=2.0),
        scale_jitter=(0.5, 2.0),
        hflip_rate=0.5,
        color_jitter=0.3,
    )


@pytest.fixture
def opened() -> Iterator[Any]:
    """`train_iterator`, closing what it opened."""
    iterators: list[TrainIterator] = []

    def open_iterator(config: DataConfig, **share: int) -> TrainIterator:
        iterators.append(train_iterator(config, **share))
        return iterators[-1]

    yield open_iterator
    for iterator in iterators:
        iterator.close()


def take(iterator: TrainIterator, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(iterator, count))


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for left, right in zip(first, second, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def numbers(batches: list[dict[str, np.ndarray]]) -> list[int]:
    """Numbers of the images of `write_coco` in batches."""
    return [int(hw[0]) - numbered_hw(0)[0] for batch in batches for hw in batch["original_hw"]]


def test_batches_are_stacked_examples(opened: Any, config: DataConfig) -> None:
    (batch,) = take(opened(config), 1)
    names = batch.pop("sample_names")
    assert names.shape == (4,)
    assert set(names) > {"synthetic::0", "synthetic::1"}
    assert sum(name.endswith(".png") for name in names) == 2
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((4, 16, 24, 3), "uint8"),
        "image_hw": ((4, 2), "int32"),
        "original_hw": ((4, 2), "int32"),
        "masks_packed": ((4, 2, 16, 3), "uint8"),
        "mask_valid": ((4, 2), "bool"),
    }
    assert batch["mask_valid"][:, 0].all()


def test_the_stream_is_a_function_of_the_config(opened: Any, config: DataConfig) -> None:
    first = take(opened(config), 5)
    assert_same(first, take(opened(config), 5))
    faster = dataclasses.replace(config, num_threads=3, prefetch_examples=7, prefetch_batches=0)
    assert_same(first, take(opened(faster), 5))
    other = take(opened(dataclasses.replace(config, seed=1)), 5)
    assert any((a["image"] != b["image"]).any() for a, b in zip(first, other, strict=True))


def test_every_epoch_has_every_image_in_another_order(opened: Any, coco_json: Path) -> None:
    iterator = opened(make_config(coco(coco_json), batch_size=1))
    epochs = [numbers(take(iterator, NUM_IMAGES)) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_IMAGES))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_same_image_is_augmented_anew(opened: Any, tmp_path: Path) -> None:
    only = coco(write_coco(tmp_path / "one", 1))
    batches = take(opened(make_config(only, scale_jitter=(0.3, 2.0), batch_size=1)), 6)
    assert len({batch["image"].tobytes() for batch in batches}) == 6


def test_processes_share_the_data_between_them(opened: Any, coco_json: Path) -> None:
    config = make_config(coco(coco_json), batch_size=6)
    shares = [opened(config, process_index=i, process_count=3) for i in range(3)]
    batches = [take(share, NUM_IMAGES) for share in shares]
    assert {batch["image"].shape[0] for share in batches for batch in share} == {2}
    seen = [numbers(share) for share in batches]
    # 11 steps of 6 images are 6 epochs of 11.
    counts = collections.Counter(itertools.chain(*seen))
    assert counts == dict.fromkeys(range(NUM_IMAGES), 6)
    # Batch by batch, they are what one process would have read, in its order.
    together = [n for step in zip(*batches, strict=True) for n in numbers(step)]
    assert together == numbers(take(opened(config), NUM_IMAGES))
    # And within an epoch no image is read twice.
    assert sorted(together[:NUM_IMAGES]) == list(range(NUM_IMAGES))


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3), (3, 2)])
def test_other_numbers_of_processes_continue(
    opened: Any, coco_json: Path, before: int, after: int
) -> None:
    config = make_config(coco(coco_json), batch_size=6)

    def together(shares: list[Any], count: int) -> list[int]:
        batches = [take(share, count) for share in shares]
        return [n for step in zip(*batches, strict=True) for n in numbers(step)]

    straight = numbers(take(opened(config), 7))
    shares = [opened(config, process_index=i, process_count=before) for i in range(before)]
    assert together(shares, 3) == straight[:18]
    states = json.loads(json.dumps([share.get_state() for share in shares]))
    shares = [opened(config, process_index=i, process_count=after) for i in range(after)]
    for share in shares:
        share.set_states(states)
    assert sum(share.num_seen for share in shares) == 18
    assert together(shares, 4) == straight[18:]


def test_sources_are_drawn_by_weight_not_by_size(opened: Any, config: DataConfig) -> None:
    for count in (1, 2):
        share = opened(config, process_index=0, process_count=count)
        widths = [int(hw[1]) for batch in take(share, 12) for hw in batch["original_hw"]]
        assert collections.Counter(widths) == {32: 16 // count, 30: 32 // count}


def test_images_come_as_often_as_their_source_is_oversampled(opened: Any, tmp_path: Path) -> None:
    """By weights of k times the number of images: those of 2 come five times as often as of 6."""
    few, many = (write_coco(tmp_path / str(count), count) for count in (2, 6))
    iterator = opened(make_config(coco(few, weight=5 * 2.0), coco(many, weight=6.0)))
    # Two epochs of the larger one.
    names = [name for batch in take(iterator, 2 * 16 // 4) for name in batch["sample_names"]]
    counts = collections.Counter(names)
    assert len(names) == 2 * (5 * 2 + 6)
    assert sorted(counts.values()) == [2] * 6 + [10] * 2


def test_a_shorter_source_than_processes_is_no_obstacle(opened: Any, tmp_path: Path) -> None:
    config = make_config(coco(write_coco(tmp_path / "two", 2)), batch_size=4)
    shares = [opened(config, process_index=i, process_count=4) for i in range(4)]
    seen = [numbers(take(share, 4)) for share in shares]
    assert collections.Counter(itertools.chain(*seen)) == {0: 8, 1: 8}


def test_nothing_is_read_after_closing(config: DataConfig) -> None:
    before = set(threading.enumerate())
    iterator = train_iterator(config)
    next(iterator)
    assert set(threading.enumerate()) > before
    iterator.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_impossible_shares_are_refused(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        train_iterator(config, process_count=3)
    with pytest.raises(ValueError, match="process 2 of 2"):
        train_iterator(config, process_index=2, process_count=2)


def test_a_restored_iterator_continues_exactly(opened: Any, config: DataConfig) -> None:
    iterator = opened(config)
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 4)
    fresh = opened(config)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_same(take(fresh, 4), expected)
    # Also one that has been used, backwards.
    iterator.set_state(state)
    assert_same(take(iterator, 4), expected)


def test_orbax_saves_and_restores_it(opened: Any, config: DataConfig, tmp_path: Path) -> None:
    iterator = opened(config)
    take(iterator, 2)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        expected = take(iterator, 3)
        manager.wait_until_finished()
        fresh = opened(config)
        restore = grain.checkpoint.CheckpointRestore(fresh)
        manager.restore(2, args=ocp.args.Composite(data=restore))
    assert_same(take(fresh, 3), expected)


def damaged_tar(folder: Path) -> SourceConfig:
    """Twelve pairs: eight good, of which one has bad masks, and four useless."""
    files = sa1b_files(range(12))
    del files["sa_0.json"]
    files["sa_1.json"] = b"{"
    files["sa_2.jpg"] = files["sa_2.jpg"][:-300]
    hw = numbered_hw(3)
    files["sa_3.json"] = sa1b_json([box_mask((9, 9), 1, 4, 1, 4)], 3)
    content = json.loads(files["sa_4.json"])
    for rle in (
        {"size": list(numbered_hw(4)), "counts": "nonsense"},
        compress(box_mask(hw, 1, 4, 1, 4)),
        compress(np.zeros(numbered_hw(4), bool)),
    ):
        content["annotations"].append({"segmentation": rle})
    files["sa_4.json"] = json.dumps(content).encode()
    return SourceConfig("sa1b", str(write_tar(folder / "a.tar", files)))


EXPECTED_SKIPS = {
    "missing json": 1,
    "malformed json": 1,
    "truncated image": 1,
    "no valid mask": 1,
}


def test_corrupt_samples_are_replaced_counted_and_logged(
    opened: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(
        damaged_tar(tmp_path), batch_size=2, max_corrupt_rate=0.4, max_masks=5, prefetch_batches=0
    )
    iterator = opened(config)
    with caplog.at_level(logging.WARNING):
        # An epoch holds 8 good images.
        batches = take(iterator, 8)
    assert set(numbers(batches)) == set(range(4, 12))
    assert iterator.num_seen == 16 + sum(iterator.corrupt_counts.values())
    assert iterator.corrupt_counts.keys() <= EXPECTED_SKIPS.keys()
    assert sum(iterator.corrupt_counts.values()) >= 4
    image_4_count = numbers(batches).count(4)
    reasons = ("bad rle", "size mismatch", "empty")
    assert iterator.dropped_mask_counts == dict.fromkeys(reasons, image_4_count)
    assert "sa_2.jpg: truncated image" in caplog.text
    assert "sa_4.jpg: mask 2: " in caplog.text
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = opened(config)
    fresh.set_state(state)
    assert fresh.corrupt_counts == iterator.corrupt_counts
    assert_same(take(fresh, 3), take(iterator, 3))


def test_counts_belong_to_the_batches_handed_out(opened: Any, tmp_path: Path) -> None:
    source = damaged_tar(tmp_path)
    seen = []
    for prefetch in (0, 3):
        config = make_config(source, batch_size=2, max_corrupt_rate=0.4, prefetch_batches=prefetch)
        iterator = opened(config)
        counts = []
        for _ in range(6):
            next(iterator)
            counts.append((iterator.num_seen, iterator.corrupt_counts))
        seen.append(counts)
    assert seen[0] == seen[1]


def test_worker_processes_change_nothing(opened: Any, config: DataConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        config, sources=(*config.sources, damaged_tar(tmp_path)), max_corrupt_rate=0.5
    )
    plain = opened(config)
    take(plain, 2)
    state = plain.get_state()
    expected = take(plain, 4)
    workers = opened(dataclasses.replace(config, num_workers=2))
    workers.set_state(state)
    assert_same(take(workers, 4), expected)
    assert workers.get_state() == plain.get_state()
    assert sum(workers.corrupt_counts.values()) > 0
    assert sum(workers.dropped_mask_counts.values()) > 0

    # One that dies, as when memory is short, ends the run and not only the data.
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(InputWorkerError, match=r"died with exit code -9 \(killed: .*num_workers"):
        take(workers, 100)


def test_a_worker_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    has_ended = threading.Event()
    monkeypatch.setattr(pipeline.os, "_exit", lambda code: has_ended.set())
    # As a parent's sentinel: it can be read once the other end is gone.
    sentinel, parent = multiprocessing.Pipe(duplex=False)
    thread = threading.Thread(target=pipeline._end_with, args=(sentinel.fileno(),))
    thread.start()
    assert not has_ended.is_set()
    parent.close()
    thread.join(timeout=60)
    assert has_ended.is_set()
    sentinel.close()


def broken_coco(folder: Path, good: int, bad: int) -> SourceConfig:
    path = write_coco(folder / "coco", good + bad)
    for number in range(good, good + bad):
        (folder / "coco" / "images" / f"{number}.png").unlink()
    return coco(path)


def test_too_many_corrupt_samples_stop_the_run(opened: Any, tmp_path: Path) -> None:
    config = make_config(
        broken_coco(tmp_path, 8, 2), batch_size=1, max_corrupt_rate=0.19, corrupt_grace=10
    )
    iterator = opened(config)
    with pytest.raises(TooManyCorruptSamplesError) as caught:
        take(iterator, 1000)
    message = str(caught.value)
    assert "missing image, e.g. " in message
    assert "tolerated: 19.0%" in message
    assert "9.png: missing image" in message
    # Two of ten are more than 19 %, however they are spread over an epoch.
    tolerant = opened(dataclasses.replace(config, max_corrupt_rate=0.35))
    assert len(take(tolerant, 80)) == 80
    assert 18 <= tolerant.corrupt_counts["missing image"] <= 20


def test_nothing_but_corrupt_samples_does_not_hang(opened: Any, tmp_path: Path) -> None:
    config = make_config(broken_coco(tmp_path, 0, 3), max_corrupt_rate=1.0, corrupt_grace=25)
    with pytest.raises(TooManyCorruptSamplesError, match=r"25 of 25 .* last 25 in a row"):
        take(opened(config), 1)


def masks_of_black(folder: Path, good: int, black: int) -> SourceConfig:
    """Images of size `numbered_hw(i)`, the last `black` of which have a mask without an object."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(good + black):
        hw = numbered_hw(number)
        mask = box_mask(hw, 2, 12, 3, 23) & (number < good)
        image = encode_image(gradient_image(hw))
        (folder / "images" / f"{number}.png").write_bytes(image)
        (folder / "masks" / f"{number}.png").write_bytes(encode_image(mask))
    return SourceConfig("mask_folder", str(folder / "images"), masks=str(folder / "masks"))


def test_pictures_without_an_object_are_no_damage(
    opened: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(masks_of_black(tmp_path, 2, 6), max_corrupt_rate=0.0, corrupt_grace=8)
    iterator = opened(config)
    batches = take(iterator, 10)
    assert set(numbers(batches)) == {0, 1}
    assert iterator.corrupt_counts == {}
    assert iterator.without_object_counts == {"no annotation": iterator.num_seen - 40}
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = opened(config)
    fresh.set_state(state)
    assert fresh.get_state() == state
    iterator.close()
    count = state["skipped"]["without_object_counts"]["no annotation"]
    assert f"samples without an object: {count} no annotation, e.g. {tmp_path}" in caplog.text


def test_pictures_whose_objects_are_all_too_small_are_no_damage(
    opened: Any, coco_json: Path
) -> None:
    # The mask of image i is 10 of 20 + i rows high: only the first images' reach the limit.
    config = make_config(
        coco(coco_json), max_corrupt_rate=0.0, corrupt_grace=30, min_mask_area_px=110
    )
    iterator = opened(config)
    seen = set(numbers(take(iterator, 5)))
    assert 0 in seen
    assert seen < set(range(NUM_IMAGES))
    assert iterator.corrupt_counts == {}
    assert iterator.without_object_counts.keys() == {"only filtered masks"}


@pytest.mark.parametrize("has_another_source", [False, True])
def test_a_source_without_any_object_ends_the_run(
    opened: Any, tmp_path: Path, coco_json: Path, has_another_source: bool
) -> None:
    others = [coco(coco_json)] if has_another_source else []
    config = make_config(*others, masks_of_black(tmp_path, 0, 3), corrupt_grace=20)
    message = rf"(?s)of the last 20 samples read from data source {len(others)} .*none had a mask"
    with pytest.raises(NoObjectsError, match=message) as caught:
        take(opened(config), 1000)
    assert "20 no annotation, e.g. " in str(caught.value)


def test_a_run_begun_before_they_were_counted_apart_goes_on(
    opened: Any, config: DataConfig
) -> None:
    iterator = opened(config)
    take(iterator, 2)
    state = iterator.get_state()
    expected = take(iterator, 2)
    for key in ("without_object_counts", "examples_by_reason"):
        del state["skipped"][key]
    fresh = opened(config)
    fresh.set_state(state)
    assert_same(take(fresh, 2), expected)


def test_reasons_reach_the_last_message(opened: Any, tmp_path: Path) -> None:
    path = write_coco(tmp_path / "coco", 4)
    content = json.loads(path.read_text())
    for number, annotation in enumerate(content["annotations"]):
        height, width = numbered_hw(number)
        annotation["segmentation"] = compress(np.ones((width, height), bool))
    path.write_text(json.dumps(content))
    with pytest.raises(TooManyCorruptSamplesError) as caught:
        take(opened(make_config(coco(path), corrupt_grace=5)), 1)
    for part in (
        "5 no valid mask, e.g. ",
        "1 size mismatch, e.g. mask 0 is [30, 2",
        "the image [2",
    ):
        assert part in str(caught.value)


def test_evaluation_without_any_object_says_so(tmp_path: Path) -> None:
    samples = eval_samples(build_source(masks_of_black(tmp_path / "black", 0, 3)))
    with pytest.raises(NoObjectsError, match=r"(?s)none of 3 samples .*3 no annotation, e\.g\."):
        list(samples)
    samples = eval_samples(
        build_source(masks_of_black(tmp_path / "some", 1, 9)), max_corrupt_rate=0, corrupt_grace=2
    )
    assert len(list(samples)) == 1
    assert samples.without_object_counts == {"no annotation": 9}
    # One process may have all that are black; the others see to it.
    source = build_source(masks_of_black(tmp_path / "shared", 1, 3))
    assert [len(list(eval_samples(source, process_index=i, process_count=2))) for i in (0, 1)] == [
        1,
        0,
    ]


def test_other_errors_are_not_swallowed(opened: Any, coco_json: Path, tmp_path: Path) -> None:
    path = write_coco(tmp_path / "coco", 3)
    image = tmp_path / "coco" / "images" / "1.png"
    image.unlink()
    image.mkdir()
    with pytest.raises(IsADirectoryError):
        take(opened(make_config(coco(path))), 3)


def test_logging_thins_out(opened: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(
        broken_coco(tmp_path, 1, 1), batch_size=1, max_corrupt_rate=0.6, prefetch_batches=0
    )
    with caplog.at_level(logging.WARNING):
        iterator = opened(config)
        take(iterator, 40)
    assert 39 <= iterator.corrupt_counts["missing image"] <= 41
    # 1 to 16, and 32.
    assert sum("sample skipped" in record.message for record in caplog.records) == 17


def test_evaluation_reads_in_order_and_skips_what_is_corrupt(tmp_path: Path) -> None:
    source = build_source(damaged_tar(tmp_path))
    samples = eval_samples(source, max_corrupt_rate=0.5)
    examples = list(samples)
    names = [Path(example.name).name.rpartition("::")[2] for example in examples]
    assert names == [f"sa_{i}.jpg" for i in (10, 11, 4, 5, 6, 7, 8, 9)]
    assert samples.corrupt_counts == EXPECTED_SKIPS
    assert samples.dropped_mask_counts == {"bad rle": 1, "size mismatch": 1, "empty": 1}
    example = examples[2]
    hw = numbered_hw(4)
    assert example.image.shape == (*hw, 3)
    assert example.dataset == "sa1b"
    np.testing.assert_array_equal(
        example.masks, [box_mask(hw, 1, 9, 2, 12), box_mask(hw, 5, 15, 10, 25)]
    )


def test_evaluation_is_shared_between_processes(coco_json: Path) -> None:
    source = build_source(coco(coco_json))
    shares = [
        [example.name for example in eval_samples(source, process_index=i, process_count=3)]
        for i in range(3)
    ]
    assert [len(share) for share in shares] == [4, 4, 3]
    merged = [name for group in itertools.zip_longest(*shares) for name in group if name]
    assert merged == [source[i].name for i in range(NUM_IMAGES)]


def test_evaluation_stops_on_too_many_corrupt_samples(tmp_path: Path) -> None:
    source = build_source(damaged_tar(tmp_path))
    with pytest.raises(TooManyCorruptSamplesError):
        list(eval_samples(source, max_corrupt_rate=0.1, corrupt_grace=4))


def test_training_on_the_real_pack(opened: Any, shared_data: Path) -> None:
    folder = shared_data / "permissive"
    names = sorted(path.parent.name for path in folder.glob("*/train.json"))
    assert len(names) == 9
    sources = [coco(folder / name / "train.json", name=name) for name in names]
    config = make_config(*sources, image_size=(128, 128), batch_size=9, max_masks=16)
    iterator = opened(config)
    batches = take(iterator, 2)
    assert iterator.corrupt_counts == {}
    # 18 images, two of each source, all different.
    assert len({image.tobytes() for batch in batches for image in batch["image"]}) == 18
