"""Attributes of images and masks, from a table of somebody's, joined to the masks of records."""

import csv
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from sam_jax.data.tally import Tally
from sam_jax.errors import ConfigError
from sam_jax.evaluation.evaluation import Record

# Headings of the columns that say what a row is about.
IMAGE_COLUMNS = ("image", "file_name", "file")
DATASET_COLUMN, MASK_COLUMN, ID_COLUMN = "dataset", "mask", "annotation_id"
NO_IMAGE = "rows of an image that is not among the evaluated"
NO_MASK = "rows of a mask that is not among the evaluated"
# Kinds of sources whose option crowd decides which annotations of a COCO file are masks.
_WITH_CROWDS = ("coco", "video_coco")

# Numbers of masks, as records have them, by the end of an image's path and the annotation's id.
MaskNumbers: TypeAlias = Mapping[str, Mapping[str, int]]


@dataclasses.dataclass(frozen=True)
class AttributeRow:
    """A row of the table.

    Attributes:
      line: its number in the file, from 1.
      image: the end of an image's path.
      dataset: the image's data set; None if no column says it.
      mask: number of the mask among the usable ones of its image; None for all of them.
      annotation_id: of the mask, in its stead.
      values: by attribute; empty where nothing is known.
    """

    line: int
    image: str
    dataset: str | None
    mask: int | None
    annotation_id: str | None
    values: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class AttributeTable:
    """A file of attributes: its path, the attributes, its rows."""

    path: Path
    attributes: tuple[str, ...]
    rows: tuple[AttributeRow, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class AttributedMask:
    """A mask of a record with its attributes.

    Attributes:
      image: data set and name of its image.
      ious: by measure.
      values: by attribute.
    """

    image: tuple[str, str]
    ious: Mapping[str, float]
    values: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class AttributedMasks:
    """The masks that a row is about, and counts of what fits nothing.

    Attributes:
      masks: in the order of records.
      num_without_row: masks that no row is about.
      unmatched: rows that are about no mask, by reason.
    """

    masks: tuple[AttributedMask, ...]
    num_without_row: int
    unmatched: Tally


def read_attributes(path: Path, attributes: Sequence[str] = ()) -> AttributeTable:
    """The attributes in a CSV file with a heading.

    A column ``image`` (or ``file_name``, ``file``) holds images' names, or as much of the end of
    their paths as tells them apart. With ``dataset``, images are looked for in that data set;
    with ``mask`` or ``annotation_id``, a row is about one mask and not about all of the image. All
    other columns are attributes.

    Args:
      path: the file, in UTF-8, with commas.
      attributes: which columns to take; by default all.

    Raises:
      ConfigError: a column is missing or twice there, a row has another number of values, or a
        number is none; the message names the line.
      OSError: the file cannot be read.
    """
    header, lines = _read_csv(path)
    image_column = next((name for name in IMAGE_COLUMNS if name in header), None)
    if image_column is None:
        raise ConfigError(
            f"{path} has no column {' or '.join(IMAGE_COLUMNS)}; its heading is {', '.join(header)}"
        )
    if MASK_COLUMN in header and ID_COLUMN in header:
        raise ConfigError(f"{path} has columns {MASK_COLUMN} and {ID_COLUMN}; keep one")
    about = {image_column, DATASET_COLUMN, MASK_COLUMN, ID_COLUMN}
    found = [name for name in header if name not in about]
    missing = [name for name in attributes if name not in found]
    if missing or not found:
        raise ConfigError(
            f"{path} has no column for the attribute {', '.join(missing) or 'of any kind'}; there "
            f"are {', '.join(found) or 'only columns that say which mask is meant'}"
        )
    chosen = tuple(attributes or found)
    rows = []
    for line, values in lines:
        row = dict(zip(header, values, strict=True))
        where = f"{path}, line {line}"
        rows.append(
            AttributeRow(
                line=line,
                image=_filled(row, image_column, where).replace("\\", "/"),
                dataset=_filled(row, DATASET_COLUMN, where) if DATASET_COLUMN in row else None,
                mask=_whole(row, MASK_COLUMN, where) if MASK_COLUMN in row else None,
                annotation_id=_filled(row, ID_COLUMN, where) if ID_COLUMN in row else None,
                values={name: row[name] for name in chosen},
            )
        )
    if not rows:
        raise ConfigError(f"{path} has a heading and no row")
    return AttributeTable(path, chosen, tuple(rows))


def join_attributes(
    table: AttributeTable, records: Sequence[Record], numbers: MaskNumbers | None = None
) -> AttributedMasks:
    """The masks of records with the attributes that rows give them.

    Args:
      table: the attributes.
      records: of prompted masks.
      numbers: of masks by annotation id, which a table with such ids needs.

    Raises:
      ConfigError: two rows are about one mask, an image's name may mean several, or ids are of
        unknown masks.
    """
    examples = _Examples(records)
    # Names from other systems have backslashes.
    by_name = numbers and {name.replace("\\", "/"): of for name, of in numbers.items()}
    unmatched = Tally()
    rows: dict[tuple[int, int], AttributeRow] = {}
    for row in table.rows:
        where = f"{table.path}, line {row.line}"
        example = examples.find(row, where)
        if example is None:
            unmatched.add(NO_IMAGE, f"{where}: {row.image}")
            continue
        there = [mask["mask"] for mask in records[example]["masks"]]
        mask = row.mask
        if row.annotation_id is not None:
            mask = _number(row.annotation_id, records[example]["image"], by_name, where)
        is_of_all = row.mask is None and row.annotation_id is None
        meant = there if is_of_all else [number for number in there if number == mask]
        if not meant:
            unmatched.add(NO_MASK, f"{where}: {row.image}, {row.annotation_id or row.mask}")
        for number in meant:
            other = rows.setdefault((example, number), row)
            if other is not row:
                raise ConfigError(
                    f"{where} and line {other.line} are about the same mask, {number} of "
                    f"{row.image}; a mask has one row"
                )
    masks, num_without_row = [], 0
    for example, record in enumerate(records):
        for mask in record.get("masks", ()):
            row_of_mask = rows.get((example, mask["mask"]))
            if row_of_mask is None:
                num_without_row += 1
                continue
            image = (record["dataset"], record["image"])
            masks.append(AttributedMask(image, mask["ious"], row_of_mask.values))
    return AttributedMasks(tuple(masks), num_without_row, unmatched)


def keeps_crowds(settings: Mapping[str, Any], annotations: Path) -> bool:
    """True if crowds of a COCO file were objects of an evaluation, and so have numbers.

    Sources whose file has the name of this one tell, or all of COCO's form if none has.

    Args:
      settings: of the evaluation.
      annotations: the file, which may lie elsewhere by now.

    Raises:
      ConfigError: sources differ in it.
    """
    sources = [s for s in _sources(settings.get("sources")) if s.get("kind") in _WITH_CROWDS]
    same = [s for s in sources if PurePath(str(s.get("path"))).name == annotations.name]
    found = sorted({s.get("crowd") or "skip" for s in same or sources})
    if len(found) > 1:
        raise ConfigError(
            f"{annotations}: its annotations with iscrowd have a number or none, by the option "
            f"crowd of the evaluated sources, and these differ in it: {' and '.join(found)}; "
            "expected one; evaluate each on its own, or make a column mask"
        )
    return found == ["keep"]


def _sources(sources: Any) -> Iterator[Mapping[str, Any]]:
    """Sources of settings, and the parts of which they are joined."""
    for source in sources or ():
        yield source
        yield from _sources(source.get("parts"))


class _Examples:
    """Records with masks, by the ends of their images' paths."""

    def __init__(self, records: Sequence[Record]):
        self._records = records
        self._by_end: dict[str, list[int]] = {}
        for number, record in enumerate(records):
            if record.get("masks"):
                for end in path_ends(record["image"]):
                    self._by_end.setdefault(end, []).append(number)

    def find(self, row: AttributeRow, where: str) -> int | None:
        """The record that a row is about; None if there is none.

        Raises:
          ConfigError: there are several.
        """
        found = [
            number
            for number in self._by_end.get(row.image, ())
            if row.dataset in (None, self._records[number]["dataset"])
        ]
        if len(found) > 1:
            first, second = (
                f"{self._records[n]['image']} of {self._records[n]['dataset']}" for n in found[:2]
            )
            raise ConfigError(
                f"{where}: image {row.image} may be {first} or {second}; write more of its path, "
                f"or a column {DATASET_COLUMN}"
            )
        return found[0] if found else None


def path_ends(path: str) -> list[str]:
    """A path and what is left of it without its first parts, down to its name."""
    parts = re.split("/|::", path.replace("\\", "/"))
    # The path as it stands may begin at the root, or name a member of a tar.
    return list(dict.fromkeys([path, *("/".join(parts[i:]) for i in range(len(parts)))]))


def _number(annotation_id: str, image: str, numbers: MaskNumbers | None, where: str) -> int | None:
    """The number of a mask of a record's image, whose path ends in the annotation file's name."""
    if numbers is None:
        raise ConfigError(
            f"{where}: records number the masks of an image, and do not know annotation ids: name "
            "the annotation file that was evaluated on, or make a column mask"
        )
    for end in path_ends(image):
        if end in numbers:
            return numbers[end].get(annotation_id)
    return None


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The heading, and each row with the number of its line; empty lines are left out."""
    try:
        # Spreadsheets write a byte order mark.
        with path.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, strict=True)
            lines = [(reader.line_num, [v.strip() for v in values]) for values in reader if values]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no CSV file in UTF-8: {error}") from error
    if not lines:
        raise ConfigError(f"{path} is empty; expected a heading and rows")
    header = lines[0][1]
    twice = sorted({name for name in header if header.count(name) > 1 or not name})
    if twice:
        raise ConfigError(f"{path}: columns need names of their own; twice or empty: {twice}")
    for line, values in lines[1:]:
        if len(values) != len(header):
            raise ConfigError(
                f"{path}, line {line} has {len(values)} values; its heading has {len(header)}"
            )
    return header, lines[1:]


def _filled(row: Mapping[str, str], column: str, where: str) -> str:
    if not row[column]:
        raise ConfigError(f"{where}: {column} is empty")
    return row[column]


def _whole(row: Mapping[str, Any], column: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", row[column]):
        raise ConfigError(f"{where}: {column} is {row[column]!r}; expected a number from 0")
    return int(row[column])
