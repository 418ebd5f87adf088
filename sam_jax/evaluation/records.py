"""Records of an evaluation's examples, kept so that stopping loses none and none counts twice."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam_jax.errors import ConfigError
from sam_jax.evaluation.evaluation import Record
from sam_jax.weights.files import written_whole

SETTINGS_NAME = "settings.json"


@runtime_checkable
class Records(Protocol):
    """Records by the number of their example."""

    def done(self) -> set[int]:
        """The examples that have a record already, of all hosts."""
        ...

    def add(self, index: int, record: Record) -> None:
        """Keeps the record of an example."""
        ...

    def gathered(self, count: int) -> list[Record]:
        """The records of examples 0 to ``count``, of all hosts; every host must call this."""
        ...


class RecordsInMemory:
    """Records that are gone with the program, as of an evaluation during training."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}

    def done(self) -> set[int]:
        """None: see ``Records``."""
        return set()

    def add(self, index: int, record: Record) -> None:
        """Keeps the record of an example."""
        self._records[index] = record

    def gathered(self, count: int) -> list[Record]:
        """The records of all hosts, exchanged as text; see ``Records``."""
        merged: dict[int, Record] = {}
        for text in _all_gathered(json.dumps(list(self._records.items()))):
            merged.update(json.loads(text))
        return [merged[index] for index in range(count)]


class RecordsInFolder:
    """Records in files of a folder, one line each, which every host appends to its own.

    The folder's name tells what the records were made with, so those of other weights or options
    are never mixed with them. All hosts must see the same folder. A line that was cut short, as
    when the program was killed, is removed, and its example done again.

    Args:
      parent: where the folder of the records is.
      made_with: values of JSON that records depend on: options, and the weights' fingerprint.

    Raises:
      ConfigError: a file of records is damaged.
      OSError: the folder cannot be written to.
    """

    def __init__(self, parent: Path, made_with: Mapping[str, Any]):
        text = json.dumps(made_with, indent=2, sort_keys=True)
        self.folder = parent / f"records-{hashlib.blake2b(text.encode()).hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.folder / f"host-{jax.process_index():05d}.jsonl"
        _remove_last_line_if_cut(self._file)
        if jax.process_index() == 0:
            with written_whole(self.folder / SETTINGS_NAME) as unfinished:
                unfinished.write_text(text + "\n", encoding="utf-8")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("records")
            if not (self.folder / SETTINGS_NAME).is_file():
                raise ConfigError(
                    f"{self.folder} of process 0 is not seen by process {jax.process_index()}: "
                    "--out must be a folder that all hosts share"
                )

    def done(self) -> set[int]:
        """The examples that have a record already, of all hosts."""
        return {index for index, _ in self._read()}

    def add(self, index: int, record: Record) -> None:
        """Appends the record of an example."""
        line = json.dumps({"example": index, **record}, allow_nan=False)
        with self._file.open("a", encoding="utf-8") as opened:
            opened.write(line + "\n")

    def gathered(self, count: int) -> list[Record]:
        """The records of all hosts; see ``Records``."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("records")
        found = dict(self._read())
        return [found[index] for index in range(count)]

    def _read(self) -> Iterator[tuple[int, Record]]:
        return read_records(self.folder)


def read_records(folder: Path) -> Iterator[tuple[int, Record]]:
    """Records of a folder with the numbers of their examples; those of several files in any order.

    Raises:
      ConfigError: a line is none of ours.
    """
    for path in sorted(folder.glob("host-*.jsonl")):
        # Bytes, so that what is no text is found in its line.
        with path.open("rb") as opened:
            for number, line in enumerate(opened, start=1):
                if not line.endswith(b"\n"):
                    break  # another host is writing it
                try:
                    record = json.loads(line.decode())
                    index = record.pop("example")
                except (ValueError, KeyError, AttributeError, TypeError) as error:
                    raise ConfigError(
                        f"{path}, line {number} is damaged: expected a record with its number "
                        "under 'example'; remove that line, and run the evaluation again"
                    ) from error
                yield index, record


def _remove_last_line_if_cut(path: Path) -> None:
    """Removes what follows the last end of a line."""
    if not path.exists():
        return
    with path.open("r+b") as opened:
        content = opened.read()
        opened.truncate(content.rfind(b"\n") + 1)


def _all_gathered(text: str) -> Iterable[str]:
    """A text of every host, in their order; every host must call this."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(encoded.size))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: encoded.size] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
