"""The paper's 23 data sets for people: a table, a set with its layout, and a page of both."""

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from sam_jax.evaluation.zero_shot_sets import EVIDENCE, ZERO_SHOT_SETS, ZeroShotSet

_UNVERIFIED = " (from memory, not verified)"
_HEAD = """# The paper's 23 data sets

Written by `sam-jax datasets --markdown`. The evaluation from clicks (Kirillov et al. 2023, appendix
D.1) is the mean over the masks of each set, and then over the 23 sets:

```
python eval.py --config configs/eval_clicks.py:FOLDER --checkpoint FILE
```

FOLDER holds a folder for each set, of its name. Sets that are not there are named at the start, and
the mean is over those that are; `configs/eval_clicks.py:FOLDER:LVIS,ADE20K` takes some. `sam-jax
datasets NAME` says what to put where.

- Nothing is loaded down here, and none of the licences was verified: read each set's own terms.
- Of sets that have more than 15,000 masks, images are drawn at random until they have 10,000
  (`sam_jax/evaluation/draw.py`). The order is a hash of seed, set and file name, so everybody with
  the same files draws the same. The paper's own draw was not published: its images were others.
- The paper blurred people's faces. That is not done here.
- Images, masks, splits and the last column, SAM's mean IoU less RITM's after one centre click, are
  the paper's.
"""


def rich_table(missing: Sequence[str] | None = None) -> Table:
    """The sets as a table for the terminal.

    Args:
      missing: names of those that are not there; None does not say.
    """
    table = Table(title="The paper's 23 data sets", show_footer=True)
    total = ZERO_SHOT_SETS
    table.add_column("set", footer=f"{len(total)}", no_wrap=True)
    if missing is not None:
        table.add_column("there", footer=f"{len(total) - len(missing)}")
    images, masks = sum(s.num_images for s in total), sum(s.num_masks for s in total)
    table.add_column("images", justify="right", footer=f"{images:,}")
    table.add_column("masks", justify="right", footer=f"{masks:,}")
    for name in ("split", "masks are", "reader"):
        table.add_column(name)
    mean = sum(s.miou_over_ritm for s in total) / len(total)
    table.add_column("over RITM", justify="right", footer=f"{mean:+.2f}")
    table.add_column("licence (unverified)")
    for one in total:
        there = [] if missing is None else ["no" if one.name in missing else "yes"]
        cells = [one.name, *there, *_cells(one), _licence(one)]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _licence(one: ZeroShotSet) -> str:
    """The licence without the word that the column says for all."""
    return one.licence.replace(", unverified", "").replace(" (unverified)", "")


def _cells(one: ZeroShotSet) -> list[str]:
    return [
        f"{one.num_images:,}",
        f"{one.num_masks:,}",
        one.split,
        one.mask_kind,
        one.reader,
        f"{one.miou_over_ritm:+.1f}",
    ]


def described(one: ZeroShotSet) -> str:
    """All that is known of a set, as lines: what to put where first."""
    origin = one.origin + ("" if one.origin_verified else _UNVERIFIED)
    size = f"{one.num_images:,} images, {one.num_masks:,} masks ({one.mask_kind})"
    width = max(len(path) for path, _ in one.layout)
    lines = [
        f"{one.name}: {one.title}",
        f"from       {origin}",
        f"licence    {one.licence}",
        f"sample     {size} of {one.split}",
        f"over RITM  {one.miou_over_ritm:+.1f} points of mean IoU after one centre click",
        f"reader     {one.reader}",
        f"layout     {EVIDENCE[one.evidence]}",
        f"FOLDER/{one.name}/",
        *(f"  {path:<{width}}  {what}" for path, what in one.layout),
    ]
    if one.conversion:
        lines.append(f"to do      {one.conversion}")
    if one.notes:
        lines.append(f"note       {one.notes}")
    return "\n".join(lines)


def markdown() -> str:
    """The page ``docs/datasets.md``."""
    return "\n".join(_markdown_lines()) + "\n"


def _markdown_lines() -> Iterator[str]:
    yield _HEAD
    yield "| set | images | masks | split | masks are | reader | over RITM | licence, unverified |"
    yield "|---|--:|--:|---|---|---|--:|---|"
    for one in ZERO_SHOT_SETS:
        yield "| " + " | ".join([one.name, *_cells(one), _licence(one)]) + " |"
    yield ""
    yield "## What lies where"
    for one in ZERO_SHOT_SETS:
        origin = one.origin + ("" if one.origin_verified else _UNVERIFIED)
        yield f"\n### {one.name}\n"
        yield f"{one.title}; {origin}. Layout: {EVIDENCE[one.evidence]}.\n"
        yield "| below `" + one.name + "/` | |\n|---|---|"
        yield from (f"| `{path}` | {what} |" for path, what in one.layout)
        for text in (one.conversion and f"To do: {one.conversion}", one.notes):
            if text:
                yield f"\n{text}"
