"""Sub-commands that look at data and results and need no model."""

import contextlib
import enum
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sam_jax.errors import ConfigError

Out = Annotated[
    Path | None, typer.Option(help="Folder for the numbers as JSON and the figure as PNG.")
]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
Draws = Annotated[int | None, typer.Option(help="Draws of the bootstrap.", min=1)]


class Resampled(enum.StrEnum):
    """Units that the bootstrap can draw."""

    images = "images"
    masks = "masks"


def channels(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Images of a data set: a folder (sub-folders included), a file, or a pattern in "
            "quotes, as 'tiles/*.npy'.",
            show_default=False,
        ),
    ],
) -> None:
    """Mean and deviation of each channel of images, as model.pixel_mean and pixel_std take them.

    Values are taken as files store them: .npy, TIFF of any channels, and ordinary pictures. Stopped
    by a key, it says what it has.
    """
    import shlex

    from rich.table import Table
    from rich.text import Text

    from sam_jax.channel_statistics import ChannelTotals, image_files

    paths = image_files(files)
    totals, stopped = ChannelTotals(), False
    console = Console(stderr=True, highlight=False)
    try:
        with console.status("reading") as status:
            for number, path in enumerate(paths, start=1):
                totals.add_file(path)
                status.update(Text(f"{number} of {len(paths)}  {path.name}"))
    except KeyboardInterrupt:
        stopped = True
    for line in totals.unreadable[:5]:
        typer.echo(f"left out: {line}", err=True)
    if not totals.num_images:
        raise ConfigError(
            f"none of {len(paths)} files was read"
            + (f": {totals.unreadable[0]}" if totals.unreadable else "; it was stopped before")
        )
    found = totals.statistics()
    dtypes = ", ".join(sorted(totals.dtypes))
    table = Table(title=f"{totals.num_images} images, {found.num_channels} channels, {dtypes}")
    for title in ("channel", "min", "max", "mean", "std"):
        table.add_column(title, justify="right")
    for channel, row in enumerate(
        zip(found.minimum, found.maximum, found.mean, found.std, strict=True)
    ):
        table.add_row(str(channel), *(f"{value:.6g}" for value in row))
    # A file takes lines of any length.
    Console(width=None if console.is_terminal else 100).print(table)
    left = len(paths) - totals.num_images - len(totals.unreadable)
    if totals.unreadable:
        typer.echo(f"{len(totals.unreadable)} files could not be read, and are left out", err=True)
    if flat := [str(channel) for channel, std in enumerate(found.std) if not std > 0]:
        typer.echo(
            f"channel {', '.join(flat)} is the same everywhere: its deviation of 0 divides "
            "nothing; leave the channel out of the files, or write 1",
            err=True,
        )
    options = {
        "in_channels": str(found.num_channels),
        "pixel_mean": _tuple(found.mean),
        "pixel_std": _tuple(found.std),
    }
    typer.echo("\nfor train.py and eval.py:")
    typer.echo(
        " ".join(f"--config.model.{key}={shlex.quote(value)}" for key, value in options.items())
    )
    typer.echo("\nfor sam-jax plan:")
    typer.echo(
        " ".join("--set " + shlex.quote(f"model.{key}={value}") for key, value in options.items())
    )
    if stopped:
        typer.echo(f"stopped: {left} of {len(paths)} files were not read", err=True)
        raise typer.Exit(130)


def _tuple(values: Any) -> str:
    """Numbers of seven digits, as many as float32 has, as Python writes a tuple."""
    return "(" + ", ".join(f"{value:.7g}" for value in values) + ",)"


def stats(
    stores: Annotated[
        list[str],
        typer.Argument(
            metavar="STORE...",
            help="A COCO JSON; SA-1B's files: a JSON, a tar, a folder, a pattern; what masks "
            "wrote; a folder with images and masks; or kind=mask_folder,path=A,masks=B and so on.",
            show_default=False,
        ),
    ],
    out: Out = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Name of a store, in their order; may be repeated.")
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(help="Most images of each store, drawn by --seed.", min=1)
    ] = None,
    seed: Seed = 0,
    workers: Annotated[
        int | None, typer.Option(help="Processes; by default one for each core.", min=1)
    ] = None,
) -> None:
    """Statistics of data sets' masks: centres, masks per image, relative size, concavity.

    Several data sets are set side by side. Pictures are not read where annotations say their size.
    """
    from sam_jax.data.mask_stores import open_store
    from sam_jax.dataset_statistics.counting import count_masks
    from sam_jax.dataset_statistics.figure import draw_statistics
    from sam_jax.dataset_statistics.report import DatasetReport, StoreStatistics

    names: list[str | None] = [*(name or [])]
    if len(names) not in (0, len(stores)):
        raise ConfigError(f"{len(stores)} stores need as many --name, or none; got {len(names)}")
    _check_out(out)
    found: list[StoreStatistics] = []
    for path, chosen in zip(stores, names or [None] * len(stores), strict=True):
        store = open_store(path, chosen)
        if store.name in [other.name for other in found]:
            raise ConfigError(f"two stores are called {store.name}: give them names by --name")
        start = time.monotonic()
        with progress_bar(store.name) as advance:
            counts = count_masks(
                store, max_images=max_images, seed=seed, num_workers=workers, on_progress=advance
            )
        if not counts.num_masks:
            skipped = "; ".join(str(t) for t in (counts.skipped_images, counts.skipped_masks) if t)
            raise ConfigError(f"{path} has no mask that can be used: {skipped or 'all are empty'}")
        seconds = time.monotonic() - start
        found.append(StoreStatistics(store.name, counts, store.left_out, seconds))
    report = DatasetReport(tuple(found), max_images, seed)
    report.print_table(_console())
    if out is not None:
        _write(out, "stats", report.as_json(), draw_statistics(report))


def compare(
    a: Annotated[
        Path, typer.Argument(help="report.json of eval.py, or its folder.", show_default=False)
    ],
    b: Annotated[Path, typer.Argument(help="The same of another checkpoint.", show_default=False)],
    out: Out = None,
    measure: Annotated[
        list[str] | None, typer.Option(help="Which measures; may be repeated; by default all.")
    ] = None,
    draws: Draws = None,
    seed: Seed = 0,
) -> None:
    """Sets two checkpoints side by side: differences with paired bootstrap intervals.

    Both must have been evaluated with the same config on the same data, which need not be here.
    """
    from sam_jax.evaluation.comparison.checkpoints import compare as compare_results
    from sam_jax.evaluation.results import read_results

    _check_out(out)
    results = [read_results(path) for path in (a, b)]
    with progress_bar("draws") as advance:
        comparison = compare_results(
            *results,
            measures=measure or (),
            num_draws=draws,
            seed=seed,
            on_progress=advance,
        )
    comparison.print_table(_console())
    if out is not None:
        picture = comparison.figure(measure[0] if measure else None)
        _write(out, "comparison", comparison.as_json(), picture)


def fairness(
    results: Annotated[
        Path, typer.Argument(help="report.json of eval.py, or its folder.", show_default=False)
    ],
    attributes: Annotated[
        Path,
        typer.Option(
            help="CSV: a column image; dataset, mask or annotation_id if wanted; attributes."
        ),
    ],
    out: Out = None,
    attribute: Annotated[
        list[str] | None, typer.Option(help="Which columns; may be repeated; by default all.")
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="Which measures; may be repeated; by default one and three clicks, and the box."
        ),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO JSON that was evaluated on, for annotation_id.")
    ] = None,
    resample: Annotated[
        Resampled, typer.Option(help="What the bootstrap draws.")
    ] = Resampled.images,
    draws: Draws = None,
    seed: Seed = 0,
) -> None:
    """Mean IoU by group, with bootstrap intervals, from an evaluation's records and a table."""
    from sam_jax.data.annotation_ids import mask_numbers
    from sam_jax.evaluation.comparison.attributes import (
        join_attributes,
        keeps_crowds,
        read_attributes,
    )
    from sam_jax.evaluation.comparison.bootstrap import NUM_DRAWS
    from sam_jax.evaluation.comparison.fairness import mean_iou_by_group
    from sam_jax.evaluation.kinds import DEFAULT_KIND
    from sam_jax.evaluation.results import read_results

    _check_out(out)
    table = read_attributes(attributes, attribute or ())
    evaluated = read_results(results)
    if evaluated.kind != DEFAULT_KIND:
        raise ConfigError(
            f"{results} is of kind {evaluated.kind!r}; groups need the IoUs of prompted masks, "
            f"kind {DEFAULT_KIND!r}"
        )
    numbers = None
    if annotations is not None:
        keep = keeps_crowds(evaluated.settings, annotations)
        numbers = mask_numbers(annotations, keep_crowds=keep)
    joined = join_attributes(table, evaluated.records, numbers)
    with progress_bar("groups") as advance:
        report = mean_iou_by_group(
            table,
            joined,
            measures=measure or (),
            unit=resample.value,
            num_draws=draws or NUM_DRAWS,
            seed=seed,
            on_progress=advance,
        )
    report.print_table(_console())
    if out is not None:
        content = {"results": str(evaluated.folder), "attributes": str(attributes)}
        _write(out, "fairness", content | report.as_json(), report.figure())


def report(
    run: Annotated[
        Path, typer.Argument(help="The --workdir of a training run.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; by default report.html in the run's folder.")
    ] = None,
) -> None:
    """One page of a training run: curves, scores, pictures, data left out, starts, config.

    The page needs no other file. The run may be going on, or have broken.
    """
    from sam_jax import places, run_report

    path = run / "report.html" if out is None else out
    found = run_report.read_run(run)
    places.check_file(path)
    places.write_text(path, run_report.report_html(found))
    for fault in found.faults:
        typer.echo(f"{fault}; the page says so", err=True)
    typer.echo(f"wrote {path}")


def _check_out(out: Path | None) -> None:
    from sam_jax import places

    if out is not None:
        places.check_folder(out)


def _write(out: Path, name: str, content: Mapping[str, Any], picture: Any) -> None:
    """Writes ``name.json`` and ``name.png``; without a picture, says that there is none."""
    import json

    from sam_jax.visualize import save_picture
    from sam_jax.weights.files import written_whole

    with written_whole(out / f"{name}.json") as unfinished:
        unfinished.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    written = [out / f"{name}.json"]
    if picture is not None:
        with written_whole(out / f"{name}.png") as unfinished:
            save_picture(unfinished, picture)
        written.append(out / f"{name}.png")
    typer.echo(f"wrote {' and '.join(map(str, written))}")


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=100, highlight=False)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A bar on the terminal's error stream, nothing if it is none.

    It moves by ``advance(done, total, last="")``, of which the last stands behind it.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, last="")

        def advance(done: int, total: int, last: str = "") -> None:
            bar.update(task, completed=done, total=total, last=last)

        yield advance
