"""The console script ``sam-jax``: each sub-command calls one public function."""

import contextlib
import enum
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam_jax.cli_results import channels, compare, fairness, progress_bar, report, stats
from sam_jax.errors import ConfigError, readable_errors
from sam_jax.host_memory import keep_freed_memory

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Segment Anything in JAX: weights, masks from prompts, and what training will cost.",
)

Source = Annotated[
    str,
    typer.Argument(
        help="A training run's folder, a .pth or .safetensors file, a Hugging Face folder or name, "
        "or a masked autoencoder.",
        show_default=False,
    ),
]
Step = Annotated[
    int | None, typer.Option(help="Which checkpoint of a training run; by default the newest.")
]
Ema = Annotated[
    bool,
    typer.Option(help="Whether to take a training run's averaged parameters, where it keeps them."),
]
DecoderHeads = Annotated[
    int | None,
    typer.Option(
        help="Heads of the decoder's attention, which a file of unpublished width does not tell."
    ),
]


Checkpoint = Annotated[str, typer.Option(help="What to load, as SOURCE of convert.")]
CompilationCache = Annotated[
    Path | None,
    typer.Option(help="Folder that keeps compiled programs, for a faster start the next time."),
]


class ConvertTarget(enum.StrEnum):
    """Forms that ``convert`` writes."""

    official = "official"
    hugging_face = "hugging-face"
    orbax = "orbax"
    mae = "mae"


class Platform(enum.StrEnum):
    """Platforms that StableHLO can be exported for."""

    cpu = "cpu"
    cuda = "cuda"
    tpu = "tpu"


class Preset(enum.StrEnum):
    """Sets of options that ``masks`` starts from."""

    released = "released"
    sa1b = "sa1b"


class ExportTarget(enum.StrEnum):
    """Forms that ``export`` writes."""

    onnx = "onnx"
    stablehlo = "stablehlo"


@app.command()
def convert(
    source: Source,
    target: Annotated[
        Path, typer.Argument(help="File (.pth, .pt, .safetensors) or new folder to write.")
    ],
    to: Annotated[
        ConvertTarget | None,
        typer.Option(help="What to write; a target that ends like a file of weights says it."),
    ] = None,
    step: Step = None,
    ema: Ema = True,
    decoder_heads: DecoderHeads = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of what a masked autoencoder lacks; gives a start for training."),
    ] = None,
    with_adapters: Annotated[
        Path | None,
        typer.Option(help="File of adapters to put on top of the source, and merge."),
    ] = None,
    only_adapters: Annotated[
        bool,
        typer.Option(
            "--only-adapters",
            help="Write what a run has trained alone, such as adapters and decoder: .safetensors.",
        ),
    ] = False,
) -> None:
    """Writes a checkpoint in another form: for PyTorch, Hugging Face, or train.py and eval.py."""
    from sam_jax.weights.load import FILE_TARGETS, OFFICIAL_SUFFIXES
    from sam_jax.weights.load import convert as convert_checkpoint

    if only_adapters:
        if to or with_adapters or seed is not None:
            raise ConfigError("--only-adapters goes with none of --to, --with-adapters and --seed")
        from sam_jax.weights.adapters import write_adapters

        with _progress() as say:
            say(f"reading {source}")
            described = write_adapters(source, target, step=step, ema=ema)
        typer.echo(f"{target}: {described}")
        return
    endings = ", ".join(OFFICIAL_SUFFIXES)
    if to is None:
        if target.suffix not in OFFICIAL_SUFFIXES:
            raise ConfigError(
                f"{target} does not end in {endings}: say what it shall be with --to, one of "
                f"{', '.join(ConvertTarget)}"
            )
        to = ConvertTarget.official
    if to.value in FILE_TARGETS and target.suffix not in OFFICIAL_SUFFIXES:
        raise ConfigError(f"{target} must end in one of {endings}")
    with _progress() as say:
        described = convert_checkpoint(
            source,
            target,
            to.value,
            step=step,
            ema=ema,
            decoder_heads=decoder_heads,
            seed=seed,
            adapters=with_adapters,
            on_progress=say,
        )
    typer.echo(f"{target}: {described}")


@app.command()
def export(
    source: Source,
    target: Annotated[Path, typer.Argument(help="New folder to write.")],
    to: Annotated[ExportTarget, typer.Option(help="What to write.")] = ExportTarget.onnx,
    step: Step = None,
    ema: Ema = True,
    decoder_heads: DecoderHeads = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="ONNX: write 8-bit files too, for browsers.")
    ] = False,
    single_mask: Annotated[
        bool, typer.Option("--single-mask", help="ONNX: answer the best mask only.")
    ] = False,
    stability_score: Annotated[
        bool, typer.Option("--stability-score", help="ONNX: score masks by their stability.")
    ] = False,
    extra_metrics: Annotated[
        bool, typer.Option("--extra-metrics", help="ONNX: answer stability and area too.")
    ] = False,
    platform: Annotated[
        list[Platform] | None,
        typer.Option(help="StableHLO: where it shall run; may be repeated; by default all."),
    ] = None,
) -> None:
    """Writes encoder and decoder to run elsewhere, as ONNX or StableHLO."""
    from sam_jax.export import onnx as onnx_export
    from sam_jax.export import onnx_decoder, stablehlo
    from sam_jax.models.sam import Sam
    from sam_jax.weights import load as checkpoints

    of_onnx = int8 or single_mask or stability_score or extra_metrics
    if to is ExportTarget.onnx and platform:
        raise ConfigError("--platform is for --to stablehlo; ONNX runs on all")
    if to is ExportTarget.stablehlo and of_onnx:
        raise ConfigError(
            "--int8, --single-mask, --stability-score and --extra-metrics are for --to onnx"
        )
    checkpoints.check_target(target)
    with _progress() as say:
        say(f"reading {source}")
        weights = checkpoints.open_weights(source, step=step, ema=ema, decoder_heads=decoder_heads)
        variables = checkpoints.native_variables(weights)
        if to is ExportTarget.onnx:
            options = onnx_decoder.DecoderOptions(single_mask, stability_score, extra_metrics)
            onnx_export.export_onnx(
                target, weights.config, variables, options=options, int8=int8, on_progress=say
            )
        else:
            platforms = tuple(p.value for p in platform or Platform)
            say(f"writing StableHLO for {', '.join(platforms)}")
            stablehlo.export_stablehlo(target, Sam(weights.config), variables, platforms=platforms)
    for file in sorted(target.iterdir()):
        typer.echo(f"{file}: {file.stat().st_size / 2**20:,.1f} MiB")


@app.command()
def inspect(
    source: Source,
    step: Step = None,
    ema: Ema = True,
    decoder_heads: DecoderHeads = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Says what a checkpoint is: form, variant, shapes, types, counts, and what is missing."""
    from sam_jax.weights.load import describe

    with _progress() as say:
        say(f"reading {source}")
        found = describe(source, step=step, ema=ema, decoder_heads=decoder_heads)
    encoder, decoder = found.config.image_encoder, found.config.mask_decoder
    height, width = encoder.image_size
    table = Table(show_header=False, box=None)
    rows: dict[str, Any] = {
        "path": found.path,
        "form": found.form.replace("_", " "),
        "variant": found.variant,
        "image size": f"{height} x {width}, patches of {encoder.patch_size}",
        "channels": str(found.config.channels),
        "encoder": str(encoder),
        "decoder": f"{decoder.depth} layers of width {encoder.output_dim}, "
        f"{decoder.num_heads} heads",
        "parameters": f"{found.num_parameters:,}",
        "tensors": ", ".join(f"{n} {dtype}" for dtype, n in found.dtypes.items())
        + f"; {found.num_bytes / 2**20:,.1f} MiB",
        "loads": "no" if found.problems else "yes",
    }
    if found.left_out:
        rows["left out"] = f"{len(found.left_out)} tensors that segment nothing: " + ", ".join(
            sorted({name.rpartition(".")[0] for name in found.left_out})
        )
    for name, value in rows.items():
        # Text, since names of files may hold what looks like markup.
        table.add_row(name, Text(str(value), overflow="fold"))
    console = Console(highlight=False)
    console.print(table)
    if tensors:
        for name, (shape, dtype) in found.tensors.items():
            typer.echo(f"{name}  {' x '.join(map(str, shape)) or 'scalar'}  {dtype}")
    if found.problems:
        console.print(found.problems, markup=False)
        raise typer.Exit(1)


@app.command()
def predict(
    image: Annotated[Path, typer.Argument(help="A picture file.", show_default=False)],
    checkpoint: Checkpoint,
    out: Annotated[
        Path,
        typer.Option(help="Picture to write: the one given, with prompts and mask; PNG, JPEG..."),
    ],
    points: Annotated[
        list[str] | None,
        typer.Option(help="x,y on the object, or x,y,0 beside it; may be repeated."),
    ] = None,
    box: Annotated[str | None, typer.Option(help="x0,y0,x1,y1 around the object.")] = None,
    mask_out: Annotated[
        Path | None,
        typer.Option(help="Picture to write: the mask alone, 255 on the object; not as JPEG."),
    ] = None,
    step: Step = None,
    ema: Ema = True,
    decoder_heads: DecoderHeads = None,
) -> None:
    """Segments one object of a picture from clicks, a box, or both."""
    keep_freed_memory()
    import numpy as np

    from sam_jax import places
    from sam_jax.image_channels import read_pixels, rgb_view
    from sam_jax.inference.predictor import Predictor
    from sam_jax.inference.prompts import Prompt
    from sam_jax.visualize import (
        draw_boxes,
        draw_points,
        overlay_masks,
        picture_form,
        save_picture,
    )
    from sam_jax.weights.files import failing_as_os_error, written_whole

    clicks = [_numbers(text, "--points", (2, 3)) for text in points or []]
    corners = None if box is None else _numbers(box, "--box", (4,))
    prompt = Prompt(
        points=[click[:2] for click in clicks],
        labels=[click[2] if len(click) == 3 else 1.0 for click in clicks],
        box=corners,
    )
    targets = {out: picture_form(out)}
    if mask_out is not None:
        if mask_out == out:
            raise ConfigError(f"{out}: --out and --mask-out are the same file")
        targets[mask_out] = picture_form(mask_out, is_mask=True)
    for target in targets:
        places.check_file(target)
        if target.exists() and target.samefile(image):
            raise ConfigError(f"{target} is the picture itself: name another file to write")
    pixels = read_pixels(image, _in_channels(checkpoint, decoder_heads))
    with _progress() as say:
        say(f"reading {checkpoint}")
        predictor = Predictor.load(checkpoint, step=step, ema=ema, decoder_heads=decoder_heads)
        say("segmenting")
        # A lone click is ambiguous; several prompts are not.
        embeddings = predictor.embed([pixels])
        (found,) = predictor.predict(
            embeddings, [[prompt]], multimask_output=len(clicks) + 2 * (corners is not None) == 1
        )
    mask = found.mask(0)
    picture = overlay_masks(rgb_view(pixels), mask[None])
    if corners is not None:
        picture = draw_boxes(picture, np.array([corners]))
    if clicks:
        picture = draw_points(
            picture,
            np.array([click[:2] for click in clicks]),
            np.array([int(click[2]) if len(click) == 3 else 1 for click in clicks]),
        )
    for target, content in ((out, picture), (mask_out, mask.astype(np.uint8) * 255)):
        if target is not None:
            # Pillow raises ValueError for pictures too large for a format.
            with written_whole(target) as unfinished, failing_as_os_error(ValueError):
                save_picture(unfinished, content, targets[target])
    typer.echo(
        f"{out}: {mask.mean():.1%} of the picture, predicted IoU "
        f"{found.iou_predictions[0].max():.2f}"
    )


@app.command()
def masks(
    source: Annotated[
        Path, typer.Argument(help="A picture, or a folder of them.", show_default=False)
    ],
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder to write to, outside of the source.")],
    preset: Annotated[
        Preset, typer.Option(help="The published generator's options, or those behind SA-1B.")
    ] = Preset.released,
    points_per_side: Annotated[
        int | None, typer.Option(help="Points along each side of the grid.", show_default="32")
    ] = None,
    pred_iou_thresh: Annotated[
        float | None, typer.Option(help="Least predicted IoU.", show_default="0.88")
    ] = None,
    stability_score_thresh: Annotated[
        float | None, typer.Option(help="Least stability.", show_default="0.95")
    ] = None,
    crop_n_layers: Annotated[
        int | None, typer.Option(help="Layers of crops besides the whole.", show_default="0")
    ] = None,
    tile_px: Annotated[
        int | None, typer.Option(help="Side of tiles, for large pictures.", show_default="none")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of any other of AutomaticOptions; may be repeated."),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(
            help="Boxes of a detector, of which masks are made in place of everything: COCO's "
            "results JSON, or by file name as Hugging Face's pipelines answer.",
            show_default="none",
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(help="With --boxes: leave out boxes of a lower score.", show_default="0"),
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="With --boxes: feed each mask back with its box.")
    ] = False,
    coco: Annotated[
        bool, typer.Option("--coco", help="Write coco.json, of all pictures, as well.")
    ] = False,
    overlays: Annotated[bool, typer.Option(help="Write pictures of the masks, too.")] = True,
    label_maps: Annotated[
        bool, typer.Option("--label-maps", help="Write 16-bit PNGs without overlaps, too.")
    ] = False,
    link_pictures: Annotated[
        bool, typer.Option("--link-pictures", help="Link pictures to annotations, to train on.")
    ] = False,
    step: Step = None,
    ema: Ema = True,
    decoder_heads: DecoderHeads = None,
    compilation_cache: CompilationCache = None,
) -> None:
    """Segments everything in a picture or a folder, or what is in boxes, in SA-1B's form.

    A folder may be stopped at any time: the same command goes on where it was.
    """
    keep_freed_memory()
    import jax

    from sam_jax.inference import folder
    from sam_jax.inference.box_masks import BoxOptions
    from sam_jax.inference.picture_boxes import boxes_of_pictures
    from sam_jax.inference.predictor import Buckets, Predictor, use_compilation_cache

    named: dict[str, Any] = {
        "points_per_side": points_per_side,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_score_thresh,
        "crop_n_layers": crop_n_layers,
        "tile_px": tile_px,
    }
    automatic = _automatic_options(preset, named, option or [])
    if boxes is None and (refine or min_score is not None):
        raise ConfigError("--refine and --min-score are for --boxes")
    if boxes is not None and automatic != _automatic_options(Preset.released, {}, []):
        raise ConfigError("--boxes takes no options of the grid: no grid is searched")
    # Before minutes are spent on loading.
    in_channels = _in_channels(checkpoint, decoder_heads)
    pictures = folder.list_pictures(source, in_channels)
    folder.check_target(source, out)
    picture_boxes, box_options = None, BoxOptions(refine)
    if boxes is not None:
        root = source if source.is_dir() else source.parent
        picture_boxes = boxes_of_pictures(boxes, pictures, root, min_score, in_channels)
        for remark in picture_boxes.remarks:
            typer.echo(remark, err=True)
    if compilation_cache is not None:
        use_compilation_cache(compilation_cache)
    buckets = Buckets(images=(automatic.regions_per_batch,))
    with _progress() as say:
        say(f"reading {checkpoint}")
        predictor = Predictor.load(
            checkpoint,
            buckets=buckets if boxes is None else box_options.buckets(),
            devices=jax.local_devices(),
            step=step,
            ema=ema,
            decoder_heads=decoder_heads,
        )
    try:
        with _picture_bar("masks") as advance:
            summary = folder.annotate_folder(
                predictor,
                source,
                out,
                automatic if boxes is None else box_options,
                boxes=picture_boxes,
                coco=coco,
                overlays=overlays,
                label_maps=label_maps,
                link_pictures=link_pictures,
                on_progress=advance,
            )
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on from what is in {out}", err=True)
        raise typer.Exit(130) from None
    before = f", {summary.num_before} were there before" if summary.num_before else ""
    if summary.num_completed:
        before += f" ({summary.num_completed} of them lacked a picture of masks, a map or a link)"
    typer.echo(f"{out}: {summary.num_masks} masks of {summary.num_annotated} pictures{before}")
    if summary.num_annotated and not summary.num_masks and boxes is None:
        typer.echo(
            f"no mask passed: pred_iou_thresh is {automatic.pred_iou_thresh}, "
            f"stability_score_thresh {automatic.stability_score_thresh}, which a model of "
            "little training does not reach",
            err=True,
        )
    if summary.skipped:
        typer.echo(
            f"{len(summary.skipped)} skipped, see {out / folder.SKIPPED_NAME}; the first: "
            f"{summary.skipped[0]}",
            err=True,
        )
        if not summary.num_annotated and not summary.num_before:
            raise typer.Exit(1)


@app.command()
def score_edges(
    maps: Annotated[
        Path,
        typer.Argument(
            help="Folder of grey pictures, white where edges are, named like the images.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Folder with images/ and groundTruth/, laid out as BSDS500.")
    ],
    split: Annotated[
        str, typer.Option(help="Folder in each of these, as test.", show_default="none")
    ] = "",
    suppression: Annotated[
        str, typer.Option(help="What is done to the maps first: canny, structured, opencv, none.")
    ] = "none",
    thresholds: Annotated[int, typer.Option(help="How many, evenly spaced.")] = 99,
    max_distance_rate: Annotated[
        float, typer.Option(help="How far off an edge may be, over the image's diagonal.")
    ] = 0.0075,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json and the curve, too.")
    ] = None,
) -> None:
    """Scores edge maps of any method by the BSDS500 benchmark: ODS, OIS, AP and R50."""
    import json

    from sam_jax import places
    from sam_jax.evaluation.edges.ready_made import score_maps
    from sam_jax.visualize import save_picture
    from sam_jax.weights.files import written_whole

    if out is not None:
        places.check_folder(out)
    with _progress() as say:
        report = score_maps(
            maps,
            data,
            split=split,
            suppression=suppression,
            num_thresholds=thresholds,
            max_distance_rate=max_distance_rate,
            on_progress=lambda done, total: say(f"scored {done} of {total} images"),
        )
    report.print_table()
    if out is not None:
        text = json.dumps({"kind": "edges", **report.as_json()}, indent=2, allow_nan=False)
        with written_whole(out / "report.json") as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")
        for name, picture in report.pictures.items():
            with written_whole(out / f"{name}.png") as unfinished:
                save_picture(unfinished, picture)
        typer.echo(f"{out}: the numbers and the curve")


@app.command()
def plan(
    config: Annotated[str, typer.Option(help="As for train.py: FILE.py or FILE.py:ARGUMENT.")],
    topology: Annotated[
        str,
        typer.Option(
            help="Devices, as in v5e:16x16 or v5p:4x4x4; 'local' for those of this machine."
        ),
    ] = "local",
    batch: Annotated[
        int | None, typer.Option(help="Images of a step on all devices; by default the config's.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Changes the config."),
    ] = None,
    remat: Annotated[
        list[str] | None,
        typer.Option(
            help="Compares: none, products, blocks; each takes a compilation. By default the "
            "config's alone."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for all numbers.")] = None,
) -> None:
    """Says what a training step needs on given devices, by compiling it for them.

    Nothing of the devices need be there: for TPUs it takes the compiler alone, pip install
    'sam-jax[tpu]'. A step of ViT-H compiles for some minutes.
    """
    import jax

    from sam_jax import cost_report as planning
    from sam_jax import places
    from sam_jax.training.experiment import Experiment, read_config

    if json is not None:
        places.check_file(json)
    if topology != planning.LOCAL:
        jax.config.update("jax_platforms", "cpu")
    plans: list[planning.Plan] = []
    for change in [[f"model.remat={kind}"] for kind in remat or ()] or [[]]:
        experiment = Experiment.of(read_config(config, [*(settings or []), *change]))
        if topology == planning.LOCAL and not plans and experiment.sharding.cpu_devices:
            jax.config.update("jax_num_cpu_devices", experiment.sharding.cpu_devices)
        with _progress() as say:
            say(f"compiling the step for {topology}, remat {experiment.task.remat}")
            plans.append(planning.plan(experiment, topology, batch_size=batch))
    planning.print_plans(plans)
    if json is not None:
        planning.write_json(plans, json)
        typer.echo(f"{json}: {len(plans)} plans")
    if any(made.memory.fits is False for made in plans):
        raise typer.Exit(1)


def _in_channels(checkpoint: str, decoder_heads: int | None) -> int | None:
    """Channels of the images that a checkpoint's model takes; None for 8-bit RGB."""
    from sam_jax.weights.load import shape_of

    return shape_of(checkpoint, decoder_heads=decoder_heads).channels.in_chans


def _automatic_options(preset: Preset, named: dict[str, Any], others: list[str]) -> Any:
    """Options of the generator of automatic masks: those of a preset, changed."""
    import dataclasses

    from sam_jax.inference.automatic import SA1B_OPTIONS, AutomaticOptions

    changes = {name: value for name, value in named.items() if value is not None}
    start = SA1B_OPTIONS if preset is Preset.sa1b else AutomaticOptions()
    given = _options(start, others)
    if twice := changes.keys() & given.keys():
        raise ConfigError(
            f"{', '.join(sorted(twice))}: given as an option of its own and by --option"
        )
    return dataclasses.replace(start, **changes, **given)


@app.command()
def datasets(
    name: Annotated[
        str | None, typer.Argument(help="One of the sets: what to put where.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where the sets are, to say which are there.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The page docs/datasets.md.")
    ] = False,
) -> None:
    """Lists the data sets of the paper's evaluation from clicks, and how each must lie."""
    from sam_jax.evaluation import zero_shot_sets, zero_shot_table

    if markdown:
        typer.echo(zero_shot_table.markdown(), nl=False)
        return
    if name is not None:
        typer.echo(zero_shot_table.described(zero_shot_sets.find_set(name)))
        return
    missing = None
    if folder is not None:
        missing = [one.name for one in zero_shot_sets.sets_in(folder)[1]]
    console = Console()
    if not console.is_terminal:
        # A file takes lines of any length.
        console.width = max(console.width, 200)
    console.print(zero_shot_table.rich_table(missing))
    console.print("sam-jax datasets NAME says what to put where.", highlight=False)


for command in (stats, channels, compare, fairness, report):
    app.command()(command)


def _options(known: Any, given: list[str]) -> dict[str, Any]:
    """Values of a dataclass's fields from NAME=VALUE, in the type of what is there."""
    import dataclasses
    import difflib

    values: dict[str, Any] = {}
    names = [field.name for field in dataclasses.fields(known)]
    for text in given:
        name, _, value = text.partition("=")
        name = name.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
            raise ConfigError(f"--option {text}: no such option{hint}")
        kind = type(getattr(known, name))
        try:
            values[name] = kind(value)
        except ValueError:
            raise ConfigError(f"--option {text}: expected {kind.__name__}") from None
    return values


def _numbers(text: str, option: str, counts: tuple[int, ...]) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        wanted = " or ".join(map(str, counts))
        raise ConfigError(f"{option} {text}: expected {wanted} numbers with commas between them")
    return numbers


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A spinner on the terminal's error stream, and a way to say what is being done."""
    console = Console(stderr=True, highlight=False)
    with console.status("starting") as status:

        def say(message: str) -> None:
            status.update(Text(message))
            if not console.is_terminal:
                console.print(Text(message))

        yield say


@contextlib.contextmanager
def _picture_bar(what: str) -> Iterator[Callable[[Any], None]]:
    """A bar on the terminal's error stream, or a line per picture if it is none."""
    console = Console(stderr=True, highlight=False)
    with progress_bar(what) as bar:

        def advance(progress: Any) -> None:
            count = "skipped" if progress.num_masks is None else f"{progress.num_masks} masks"
            # A name may hold bytes that are no letters.
            name = os.fsencode(progress.path.name).decode(errors="backslashreplace")
            last = f"{name}: {count}"
            bar(progress.done, progress.total, last)
            if not console.is_terminal:
                console.print(Text(f"{progress.done} of {progress.total}  {last}"))

        yield advance


def main() -> None:
    """Runs the command line; what the user can mend is a message and not a traceback."""
    with readable_errors():
        app()
