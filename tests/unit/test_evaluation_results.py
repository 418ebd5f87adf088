"""Results on disk: found by any of their names, refused where they are not whole."""

import json

import numpy as np
import pytest

from sam_jax.errors import ConfigError
from sam_jax.evaluation.results import read_results
from tests.unit.results_fixtures import many_records, write_results


@pytest.fixture
def folder(tmp_path):
    return write_results(tmp_path / "eval" / "small", many_records(np.random.default_rng(0)))


@pytest.mark.parametrize("name", ["", "report.json", ".."])
def test_found_by_report_folder_and_parent(folder, name):
    found = read_results(folder / name if name != ".." else folder.parent)
    assert found.records == many_records(np.random.default_rng(0))
    assert (found.kind, found.weights, found.settings) == ("prompts", "w", {"seed": 0})


def test_several_results_must_be_named(folder):
    write_results(folder.parent / "other", many_records(np.random.default_rng(1)))
    with pytest.raises(ConfigError, match=r"several results; name one of .*other.*small"):
        read_results(folder.parent)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "report.json").unlink(), "has no report.json"),
        (lambda f: (f / "report.json").write_text("{"), "report.json is damaged"),
        (lambda f: (f / "report.json").write_text("[]"), "expected an object"),
        (lambda f: (f / "report.json").write_text('{"kind": "prompts"}'), "lacks records"),
        (lambda f: next(f.glob("*/settings.json")).unlink(), "settings.json is missing"),
        (lambda f: next(f.glob("*/host-00001.jsonl")).unlink(), "7 records of 14 .* example 1 is"),
        (lambda f: next(f.glob("*/host-00001.jsonl")).write_text("x\n"), "line 1 is damaged"),
    ],
)
def test_what_is_not_whole_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ConfigError, match=message):
        read_results(folder)


def test_a_report_names_no_folder_elsewhere(folder):
    report = {"kind": "prompts", "records": "/etc/../" + next(folder.glob("records-*")).name}
    (folder / "report.json").write_text(json.dumps(report))
    assert len(read_results(folder).records) == 14


def test_what_is_not_there_or_no_report(folder):
    with pytest.raises(ConfigError, match="does not exist"):
        read_results(folder / "nowhere")
    with pytest.raises(ConfigError, match=r"is no report\.json"):
        read_results(next(folder.glob("*/settings.json")))
