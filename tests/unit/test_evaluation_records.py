"""Records of evaluations: none is lost, none counts twice, and hosts put theirs together."""

import json
import threading

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from sam_jax.errors import ConfigError
from sam_jax.evaluation.records import RecordsInFolder, RecordsInMemory, read_records

MADE_WITH = {"weights": "1a2b", "evaluation": {"seed": 0}}


def test_records_are_found_again(tmp_path):
    records = RecordsInFolder(tmp_path, MADE_WITH)
    assert records.done() == set()
    for index in (2, 0, 1):
        records.add(index, {"iou": index / 3, "name": "\u00e9\n"})
    again = RecordsInFolder(tmp_path, MADE_WITH)
    assert again.folder == records.folder
    assert again.done() == {0, 1, 2}
    assert again.gathered(3) == [{"iou": index / 3, "name": "\u00e9\n"} for index in range(3)]


@pytest.mark.parametrize("changed", [{"weights": "ffff"}, {"evaluation": {"seed": 1}}])
def test_records_of_other_weights_or_options_are_not_taken(tmp_path, changed):
    RecordsInFolder(tmp_path, MADE_WITH).add(0, {"iou": 0.5})
    other = RecordsInFolder(tmp_path, MADE_WITH | changed)
    assert other.done() == set()
    other.add(0, {"iou": 0.25})
    assert RecordsInFolder(tmp_path, MADE_WITH).gathered(1) == [{"iou": 0.5}]
    settings = json.loads((other.folder / "settings.json").read_text())
    assert settings == MADE_WITH | changed


@pytest.mark.parametrize("num_bytes_left", range(1, 26, 4))
def test_a_line_that_was_cut_short_is_done_again(tmp_path, num_bytes_left):
    records = RecordsInFolder(tmp_path, MADE_WITH)
    for index in range(3):
        records.add(index, {"iou": 0.5})
    (file,) = records.folder.glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines[2]) == 27
    file.write_bytes(b"".join(lines[:2]) + lines[2][:num_bytes_left])
    again = RecordsInFolder(tmp_path, MADE_WITH)
    assert again.done() == {0, 1}
    again.add(2, {"iou": 0.75})
    assert again.gathered(3) == [{"iou": 0.5}, {"iou": 0.5}, {"iou": 0.75}]


def test_examples_that_two_programs_did_count_once(tmp_path):
    one, other = RecordsInFolder(tmp_path, MADE_WITH), RecordsInFolder(tmp_path, MADE_WITH)
    for records in (one, other):
        for index in range(2):
            records.add(index, {"iou": 0.5})
    assert one.gathered(2) == [{"iou": 0.5}] * 2


@pytest.mark.parametrize("line", [b"{", b"[1]", b"{}", b"7", b"\xff\xfe\x80x", b"\0{"])
def test_damaged_lines_are_named(tmp_path, line):
    records = RecordsInFolder(tmp_path, MADE_WITH)
    records.add(0, {"iou": 0.5})
    (file,) = records.folder.glob("*.jsonl")
    file.write_bytes(file.read_bytes() + line + b"\n" + b'{"example": 1}\n')
    with pytest.raises(ConfigError, match=r"host-00000\.jsonl, line 2 is damaged"):
        records.done()


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    records = RecordsInFolder(tmp_path, MADE_WITH)
    with pytest.raises(ValueError, match="JSON"):
        records.add(0, {"iou": float("nan")})
    assert list(read_records(records.folder)) == []


def test_hosts_exchange_records_in_memory(monkeypatch):
    """Three hosts with shares of different length, as threads that exchange arrays."""
    barrier, arrays = threading.Barrier(3), {}

    def allgather(array):
        host = threading.current_thread().name
        arrays[host] = np.asarray(array)
        barrier.wait(30)
        gathered = np.stack([arrays[name] for name in ("host0", "host1", "host2")])
        barrier.wait(30)
        return gathered

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", allgather)
    found = {}

    def run(host):
        records = RecordsInMemory()
        for index in range(host, 4, 3):
            records.add(index, {"name": "\u00e9" * index, "iou": 1 / 3})
        found[host] = records.gathered(4)

    threads = [threading.Thread(target=run, args=(h,), name=f"host{h}") for h in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == [{"name": "\u00e9" * index, "iou": 1 / 3} for index in range(4)]
    assert found[0] == found[1] == found[2]
