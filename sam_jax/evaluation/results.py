"""Results of an evaluation as they lie on disk: what was evaluated, and every example's record."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam_jax.errors import ConfigError
from sam_jax.evaluation.evaluation import Record
from sam_jax.evaluation.records import SETTINGS_NAME, read_records

REPORT_NAME = "report.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The records of a finished evaluation.

    Attributes:
      folder: which has its report.
      kind: of the evaluation.
      settings: all that records depend on besides the weights.
      weights: fingerprint of those.
      records: of all examples, in order.
    """

    folder: Path
    kind: str
    settings: Mapping[str, Any]
    weights: Any
    records: list[Record]


def read_results(path: Path) -> Results:
    """The results that ``eval.py`` wrote.

    Args:
      path: ``report.json``, its folder, or a folder of only one such.

    Raises:
      ConfigError: there are none, several, or they are damaged.
    """
    folder = _folder_of(path)
    report = _object(folder / REPORT_NAME)
    missing = [field for field in ("kind", "records") if not isinstance(report.get(field), str)]
    if missing:
        raise ConfigError(
            f"{folder / REPORT_NAME} lacks {' and '.join(missing)}: it is none of eval.py's "
            "reports, or of an older version, which kept no records; run the evaluation again"
        )
    # A name beside the report, whatever a file from elsewhere says.
    kept = folder / Path(report["records"]).name
    settings = _object(kept / SETTINGS_NAME)
    found = dict(read_records(kept))
    number = settings.get("num_examples", len(found))
    absent = sorted(set(range(number)) - found.keys())
    if absent or not found:
        raise ConfigError(
            f"{kept} has {len(found)} records of {number} examples; that of example "
            f"{absent[0] if absent else 0} is missing: run the evaluation again, which goes on "
            "from there"
        )
    return Results(
        folder=folder,
        kind=report["kind"],
        settings=settings.get("evaluation", {}),
        weights=settings.get("weights"),
        records=[found[index] for index in range(number)],
    )


def _folder_of(path: Path) -> Path:
    if path.is_file():
        if path.name != REPORT_NAME:
            raise ConfigError(f"{path} is no {REPORT_NAME}; name that, or its folder")
        return path.parent
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; expected a folder of results of eval.py")
    if (path / REPORT_NAME).is_file():
        return path
    inside = sorted(found.parent for found in path.glob(f"*/{REPORT_NAME}"))
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise ConfigError(f"{path} has several results; name one of {', '.join(map(str, inside))}")
    raise ConfigError(
        f"{path} has no {REPORT_NAME}: the evaluation did not finish, or went elsewhere"
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; run the evaluation again") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}; run the evaluation again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: expected an object; run the evaluation again")
    return content
