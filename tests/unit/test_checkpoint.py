"""Checkpoints: where they can be, what averages come back, and what a run keeps as it was.

Whole runs are in tests/e2e.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_jax import checkpoint
from sam_jax.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    restore_variables,
    save_config,
    save_variables,
)
from sam_jax.data.pipeline import TrainIterator, train_iterator
from sam_jax.errors import ConfigError, UserError
from sam_jax.training import loop
from sam_jax.training.compiled_step import CompiledStep
from sam_jax.training.experiment import Experiment, read_config
from sam_jax.training.state import TrainState

CONFIG = str(Path(__file__).parents[1] / "e2e" / "tiny_run.py")
STEP = 3


@pytest.fixture
def data() -> Iterator[TrainIterator]:
    iterator = train_iterator(Experiment.of(read_config(CONFIG)).data)
    yield iterator
    iterator.close()


def example(*, averaged: bool) -> TrainState:
    return TrainState(
        step=jnp.asarray(STEP, jnp.int32),
        params={"kernel": jnp.arange(6.0).reshape(2, 3)},
        constants={"table": jnp.ones(2)},
        opt_state={"mu": jnp.zeros((2, 3))},
        ema_params={"kernel": jnp.full((2, 3), 7.0)} if averaged else None,
    )


def saved(state: Any, workdir: Path, data: TrainIterator) -> Checkpointer:
    checkpointer = Checkpointer(workdir, CheckpointConfig())
    checkpointer.save(state, data)
    checkpointer.close()
    return Checkpointer(workdir, CheckpointConfig())


def placed(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def numbered(program: CompiledStep) -> TrainState:
    """A state after all steps whose every array holds another number."""
    leaves, structure = jax.tree.flatten(program.placed_state)
    arrays = [
        jax.device_put(np.full(leaf.shape, number, leaf.dtype), leaf.sharding)
        for number, leaf in enumerate(leaves)
    ]
    state = jax.tree.unflatten(structure, arrays)
    return dataclasses.replace(state, step=jnp.full_like(state.step, STEP))


def assert_same(first: Any, second: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_an_average_comes_back_and_is_what_evaluation_reads(
    tmp_path: Path, data: TrainIterator
) -> None:
    state = example(averaged=True)
    checkpointer = saved(state, tmp_path, data)
    assert checkpointer.latest_has_ema
    assert_same(checkpointer.restore(placed(state), data), state)
    checkpointer.close()
    assert_same(restore_variables(tmp_path), state.evaluated_variables)
    assert_same(restore_variables(tmp_path)["params"], state.ema_params)
    assert_same(restore_variables(tmp_path, ema=False), state.variables)


def test_an_average_that_was_not_kept_starts_as_the_parameters(
    tmp_path: Path, data: TrainIterator
) -> None:
    state = example(averaged=False)
    checkpointer = saved(state, tmp_path, data)
    assert not checkpointer.latest_has_ema
    restored = checkpointer.restore(placed(example(averaged=True)), data)
    checkpointer.close()
    assert_same(restored.ema_params, state.params)
    # A step takes the memory of both.
    places = [x["kernel"].unsafe_buffer_pointer() for x in (restored.params, restored.ema_params)]
    assert places[0] != places[1]
    assert_same(restore_variables(tmp_path), state.variables)


def test_an_average_that_is_not_wanted_is_left(tmp_path: Path, data: TrainIterator) -> None:
    checkpointer = saved(example(averaged=True), tmp_path, data)
    restored = checkpointer.restore(placed(example(averaged=False)), data)
    checkpointer.close()
    assert restored.ema_params is None
    assert_same(restored, example(averaged=False))


@pytest.mark.parametrize(
    ("before", "now", "word"),
    [
        (0.0, 0.9, "the average starts from its parameters"),
        (0.9, 0.0, "its averaged parameters are dropped"),
        (0.9, 0.5, None),
    ],
)
def test_a_run_says_what_becomes_of_the_average(
    before: float, now: float, word: str | None, tmp_path: Path, data: TrainIterator, capsys: Any
) -> None:
    """The run has done all its steps, so that nothing is compiled."""

    def experiment(decay: float) -> Experiment:
        settings = (f"train.num_steps={STEP}", "train.eval_every=0", f"train.ema_decay={decay}")
        return Experiment.of(read_config(CONFIG, settings))

    state = numbered(experiment(before).compiled_step(jax.devices()[:1]))
    saved(state, tmp_path, data).close()
    after = loop.train(
        workdir=tmp_path,
        compiled_step=experiment(now).compiled_step(jax.devices()[:1]),
        config=experiment(now).train,
        batch_size=experiment(now).data.batch_size,
        data_iterator=data,
        checkpoint_config=CheckpointConfig(),
        evaluators={},
    )
    said = capsys.readouterr().err
    assert "continuing from the checkpoint of step 3" in said
    assert ("averaged" in said) == (word is not None)
    assert word is None or word in said
    if now:
        assert_same(after.ema_params, state.ema_params if before else state.params)
    else:
        assert after.ema_params is None


def test_an_average_needs_something_to_average() -> None:
    with pytest.raises(Exception, match="ema_decay must be at least 0 and less than 1, got 1"):
        Experiment.of(read_config(CONFIG, ["train.ema_decay=1.0"]))


def two_checkpoints(workdir: Path, data: TrainIterator) -> TrainState:
    """Checkpoints of steps 2 and 3, and the state of the first."""
    later = example(averaged=True)
    earlier = dataclasses.replace(
        later,
        step=later.step - 1,
        params=jax.tree.map(lambda x: x - 5, later.params),
    )
    checkpointer = Checkpointer(workdir, CheckpointConfig())
    checkpointer.save(earlier, data)
    checkpointer.save(later, data)
    checkpointer.close()
    return earlier


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(newest: Path) -> None:
    path = largest_file(newest / "model")
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(newest: Path) -> None:
    path = largest_file(newest / "optimizer")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate_without_digests(newest: Path) -> None:
    """As checkpoints were before they had digests."""
    (newest / "digests.json").unlink()
    for path in newest.glob("model/**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_positions_without_digests(newest: Path) -> None:
    (newest / "digests.json").unlink()
    (newest / "data" / "process_0-of-1.json").write_text('{"posit')


DAMAGES = {
    "a truncated array": (truncate, r"model/.* bytes, expected"),
    "a bit": (flip_a_bit, "optimizer/.* has other bytes than were written"),
    "no digests, truncated": (truncate_without_digests, "."),
    "no digests, position": (lose_positions_without_digests, "."),
    "no metadata": (lambda newest: (newest / "ema" / "_METADATA").unlink(), "ema/_METADATA is mis"),
    "no position": (lambda newest: shutil.rmtree(newest / "data"), "data/.* is missing"),
    "garbled digests": (lambda newest: (newest / "digests.json").write_text("{"), "no list of"),
    "deleted by half": (
        lambda newest: [shutil.rmtree(path) for path in newest.iterdir() if path.is_dir()],
        "is missing",
    ),
}


# Reads that were begun before one failed end later, in a loop of Orbax's that is closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(
    tmp_path: Path, data: TrainIterator, damage: str
) -> None:
    earlier = two_checkpoints(tmp_path, data)
    newest = tmp_path / "checkpoints" / str(STEP)
    do_damage, words = DAMAGES[damage]
    do_damage(newest)
    left = contents(newest)

    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    assert_same(checkpointer.restore(placed(earlier), data), earlier)
    ((step, fault),) = checkpointer.damaged
    assert step == STEP
    assert re.search(words, fault), fault
    assert contents(newest) == left
    assert checkpointer.begin() == [tmp_path / "checkpoints_damaged" / str(STEP)]
    assert contents(tmp_path / "checkpoints_damaged" / str(STEP)) == left
    # The run comes to that step again, and the next damage does not take the first one's place.
    checkpointer.save(dataclasses.replace(earlier, step=earlier.step + 1), data)
    checkpointer.close()
    flip_a_bit(newest)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.restore(placed(earlier), data)
    assert checkpointer.begin() == [tmp_path / "checkpoints_damaged" / f"{STEP}-2"]
    checkpointer.close()


def test_without_a_whole_checkpoint_nothing_starts_anew(
    tmp_path: Path, data: TrainIterator
) -> None:
    earlier = two_checkpoints(tmp_path, data)
    for step in (STEP - 1, STEP):
        truncate(tmp_path / "checkpoints" / str(step))
    left = contents(tmp_path)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    with pytest.raises(CheckpointError, match=r"nothing was changed(.|\n)*step 3: .*\n.*step 2: "):
        checkpointer.restore(placed(earlier), data)
    assert contents(tmp_path) == left


def test_damage_is_told_from_another_model(tmp_path: Path, data: TrainIterator) -> None:
    """No older checkpoint is taken for one that does not fit."""
    earlier = two_checkpoints(tmp_path, data)
    other = dataclasses.replace(earlier, params={"kernel": jnp.zeros((3, 2))})
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    with pytest.raises(CheckpointError, match=r"step 3 .*does not fit"):
        checkpointer.restore(placed(other), data)


def test_damaged_weights_are_not_evaluated(tmp_path: Path, data: TrainIterator) -> None:
    earlier = two_checkpoints(tmp_path, data)
    flip_a_bit(tmp_path / "checkpoints" / str(STEP))
    # The optimizer's state is none of its business.
    restore_variables(tmp_path)
    truncate(tmp_path / "checkpoints" / str(STEP))
    with pytest.raises(CheckpointError, match=r"model is damaged: model/.*there are .* \[2\]"):
        restore_variables(tmp_path, ema=False)
    assert_same(restore_variables(tmp_path, STEP - 1), earlier.evaluated_variables)


# Brackets, stars and question marks are read as patterns, others as parts of URLs.
ODD_NAMES = [
    "lr=[1e-3]",
    "runs [1]/a",
    "[!a]",
    "a**b",
    "".join(c for c in string.punctuation if c not in "/\\[]*?"),
    "checkpoints",
    "x.orbax-checkpoint-tmp-1",
    "s3:",
    "%41 ",
    "..é\n😀...",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_run_may_be_called_anything_that_can_be_read(
    tmp_path: Path, data: TrainIterator, name: str
) -> None:
    state, workdir = example(averaged=False), tmp_path / name
    checkpointer = Checkpointer(workdir, CheckpointConfig(keep=1))
    checkpointer.save(dataclasses.replace(state, step=state.step - 1), data)
    checkpointer.save(state, data)
    checkpointer.close()
    checkpointer = Checkpointer(workdir, CheckpointConfig())
    assert_same(checkpointer.restore(placed(state), data), state)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(STEP)]
    assert_same(restore_variables(workdir), state.variables)
    save_variables(tmp_path / "converted" / name, state.variables)
    assert_same(restore_variables(tmp_path / "converted" / name), state.variables)


def test_a_pattern_does_not_take_the_files_of_another_run(
    tmp_path: Path, data: TrainIterator
) -> None:
    for name, factor in (("run1", 5), ("run[1]", 1), ("run?", 2)):
        state = example(averaged=False)
        params = jax.tree.map(lambda x, factor=factor: factor * x, state.params)
        saved(dataclasses.replace(state, params=params), tmp_path / name, data).close()
    for name, factor in (("run1", 5), ("run[1]", 1), ("run?", 2)):
        kernel = restore_variables(tmp_path / name)["params"]["kernel"]
        np.testing.assert_array_equal(kernel, factor * np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{tmp}/a\\b", "the backslash for a slash"),
        ("{tmp}/gs:", "for a bucket"),
        ("/gs/run", "for a bucket"),
        ("gs://bucket/run", "is a URL"),
        ("file:///tmp/run", "is a URL"),
        ("{tmp}/\udcff", "no UTF-8"),
    ],
)
def test_what_would_be_written_elsewhere_is_refused(
    tmp_path: Path, path: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = path.format(tmp=tmp_path)
    for call in (
        lambda: Checkpointer(path, CheckpointConfig()),
        lambda: restore_variables(path),
        lambda: save_variables(path, {}),
    ):
        with pytest.raises(CheckpointError, match=words):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", ["the next save", "the end"])
def test_a_first_checkpoint_that_cannot_be_read_is_an_error(
    tmp_path: Path, data: TrainIterator, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    glob = checkpoint._LiteralPath.glob

    def none_of_the_data(path: Any, pattern: str) -> Iterator[Any]:
        return iter(()) if path.name == "data" else glob(path, pattern)

    monkeypatch.setattr(checkpoint._LiteralPath, "glob", none_of_the_data)
    state = example(averaged=False)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(state, data)
    later = dataclasses.replace(state, step=state.step + 1)
    notice = {
        "the next save": lambda: checkpointer.save(later, data),
        "the end": checkpointer.close,
    }[at]
    with pytest.raises(CheckpointError, match=r"of step 3 was written to .* and cannot be read"):
        notice()
    checkpointer.close()


def test_variables_that_cannot_be_read_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise ValueError("NOT_FOUND")

    monkeypatch.setattr(checkpoint, "_shapes", fail)
    with pytest.raises(CheckpointError, match=r"what was written to .* cannot be read: NOT_FOUND"):
        save_variables(tmp_path, {"params": {"kernel": jnp.ones(2)}})


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (OSError(28, "No space left on device"), True),
        (
            ValueError("EXHAUSTED: x: No space left on device [os_error_code='28']"),
            True,
        ),
        (ValueError("a fault of the code"), False),
    ],
)
def test_a_full_disk_is_a_message(
    tmp_path: Path,
    data: TrainIterator,
    error: Exception,
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise error

    state = example(averaged=False)
    checkpointer = saved(state, tmp_path, data)
    checkpointer.begin()
    monkeypatch.setattr(checkpointer._manager, "save", save)
    words = "No space left on device; the newest whole one: step 3" if is_told else "a fault"
    with pytest.raises(CheckpointError if is_told else ValueError, match=words):
        checkpointer.save(dataclasses.replace(state, step=state.step + 1), data)
    checkpointer.close()


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Times and hashes of all that is there."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [folder, *folder.rglob("*")]
    }


SETTINGS = (f"train.num_steps={STEP}", "train.eval_every=0")


@pytest.fixture(scope="module")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, without its having been trained."""
    workdir = tmp_path_factory.mktemp("good")
    sections = read_config(CONFIG, SETTINGS)
    experiment = Experiment.of(sections)
    iterator = train_iterator(experiment.data)
    saved(numbered(experiment.compiled_step(jax.devices()[:1])), workdir, iterator).close()
    iterator.close()
    save_config(workdir, sections)
    (workdir / "tensorboard").mkdir()
    # What a killed run leaves.
    (workdir / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    return workdir


def train(workdir: Path, *settings: str) -> TrainState:
    """As train.py does."""
    sections = read_config(CONFIG, (*SETTINGS, *settings))
    experiment = Experiment.of(sections)
    return loop.train(
        workdir=workdir,
        compiled_step=experiment.compiled_step(),
        config=experiment.train,
        batch_size=experiment.data.batch_size,
        data_iterator=train_iterator(experiment.data),
        checkpoint_config=CheckpointConfig(),
        evaluators={},
        sections=sections,
    )


@pytest.mark.parametrize(
    "setting",
    [
        "model.encoder.embed_dim=24",
        # The same arrays, another model.
        "model.decoder.num_heads=1",
        "model.encoder.window_size=2",
        "model.image_size=(48,48)",
        "optimizer.schedule='nonsense'",
        "optimizer.accumulate_steps=3",
        "data.batch_size=12",
        "data.sources=({'kind': 'sa1b', 'path': '/nowhere'},)",
        "data.sources=({'kind': 'coco', 'path': '/nowhere.json', 'images': '/'},)",
        "sharding.data=3",
        "sharding.rules=(('nothing$', ()),)",
    ],
)
def test_a_command_that_fails_leaves_a_run_as_it_was(good_run: Path, setting: str) -> None:
    before = contents(good_run)
    with pytest.raises((UserError, OSError)):
        train(good_run, "train.num_steps=9", setting)
    assert contents(good_run) == before


def test_a_checkpoint_of_another_model_is_refused_by_the_arrays_that_differ(good_run: Path) -> None:
    # Before any is read: Orbax leaves the reads beside one that fails running, and they complain.
    table = r"params/image_encoder/pos_embed: \(4, 6, 16\) there, \(6, 6, 16\) here"
    with pytest.raises(CheckpointError, match=f"does not fit this config.*{table}"):
        train(good_run, "train.num_steps=9", "model.image_size=(48,48)")


def test_data_that_cannot_be_read_leave_no_trace(good_run: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for index in range(3):
        (tmp_path / "data" / f"{index}.json").write_text(json.dumps({"annotations": []}))
    source = f"data.sources=({{'kind': 'sa1b', 'path': {str(tmp_path / 'data')!r}}},)"
    before = contents(good_run)
    for workdir in (good_run, tmp_path / "new"):
        with pytest.raises(UserError, match="missing image"):
            train(workdir, "train.num_steps=9", source)
    assert contents(good_run) == before
    assert not (tmp_path / "new").exists()


def test_weights_that_are_missing_leave_no_trace(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        train(tmp_path / "new", f"train.init_from={tmp_path / 'nothing.pth'}")
    assert not (tmp_path / "new").exists()


def test_a_finished_run_says_so_and_stays(good_run: Path, capsys: Any) -> None:
    before = contents(good_run)
    assert int(train(good_run).step) == STEP
    assert "nothing is left to do: step 3 of 3 is done" in " ".join(capsys.readouterr().err.split())
    assert contents(good_run) == before


@pytest.mark.parametrize("kind", ["hugging face", "converted", "file"])
def test_folders_that_are_no_runs_are_refused(tmp_path: Path, kind: str) -> None:
    workdir = tmp_path / "weights"
    if kind == "file":
        workdir.touch()
    else:
        workdir.mkdir()
        (workdir / "config.json").write_text('{"model_type": "sam"}')
        if kind == "converted":
            save_variables(workdir, {"params": {"kernel": jnp.ones(2)}})
    before = contents(tmp_path)
    words = {"converted": "train.init_from=", "hugging face": "no run's", "file": "is a file|Not a"}
    with pytest.raises(UserError, match=words[kind]):
        train(workdir)
    assert contents(tmp_path) == before


def test_a_config_that_changed_is_kept(tmp_path: Path) -> None:
    config = {"train": {"num_steps": 3, "pair": (1, 2)}}
    assert save_config(tmp_path, config) is None
    assert save_config(tmp_path, config, done_steps=3) is None
    later = {"train": {"num_steps": 5, "pair": (1, 2)}}
    assert checkpoint.config_changes(tmp_path, later) == ["train.num_steps 3 -> 5"]
    assert save_config(tmp_path, later, done_steps=3) == "config_until_step_3.json"
    # Nothing was saved since: the one that made the checkpoint stays.
    save_config(tmp_path, config, done_steps=3)
    kept = json.loads((tmp_path / "config_until_step_3.json").read_text())
    assert kept["train"]["num_steps"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "config_until_step_3.json",
    ]


@pytest.mark.parametrize("file", ["small_coco.py", "small_coco.py:/nowhere", "small_folder.py"])
def test_configs_say_what_they_take(file: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"takes the folder .*\.py:FOLDER; found"):
        read_config(f"configs/{file}")


def test_an_argument_too_many_is_named() -> None:
    with pytest.raises(ConfigError, match="takes 0 positional arguments"):
        read_config("configs/demo.py:x")
