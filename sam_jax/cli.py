"""The console script ``sam-jax``: each sub-command calls one public function."""

import contextlib
import enum
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam_jax.errors import ConfigError, readable_errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Segment Anything in JAX: weights in and out, and masks from prompts.",
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
DecoderHeads = Annotated[
    int | None,
    typer.Option(
        help="Heads of the decoder's attention, which a file of unpublished width does not tell."
    ),
]


class ConvertTarget(enum.StrEnum):
    """Forms that ``convert`` writes."""

    official = "official"
    hugging_face = "hugging-face"
    orbax = "orbax"


class Platform(enum.StrEnum):
    """What StableHLO may be exported for."""

    cpu = "cpu"
    cuda = "cuda"
    tpu = "tpu"


class ExportTarget(enum.StrEnum):
    """Forms that ``export`` writes."""

    onnx = "onnx"
    stablehlo = "stablehlo"


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="File (.pth) or new folder to write.")],
    to: Annotated[
        ConvertTarget | None,
        typer.Option(help="What to write; a target that ends in .pth says it."),
    ] = None,
    step: Step = None,
    decoder_heads: DecoderHeads = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of what a masked autoencoder lacks; gives a start for training."),
    ] = None,
) -> None:
    """Writes a checkpoint in another form: for PyTorch, Hugging Face, or train.py and eval.py."""
    from sam_jax.convert.checkpoints import convert as convert_checkpoint

    if to is None:
        if target.suffix != ".pth":
            raise ConfigError(
                f"{target} does not end in .pth: say what it shall be with --to, one of "
                f"{', '.join(ConvertTarget)}"
            )
        to = ConvertTarget.official
    if to is ConvertTarget.official and target.suffix != ".pth":
        raise ConfigError(f"{target} must end in .pth, as PyTorch's users expect")
    with _progress() as say:
        described = convert_checkpoint(
            source,
            target,
            to.value,
            step=step,
            decoder_heads=decoder_heads,
            seed=seed,
            on_progress=say,
        )
    typer.echo(f"{target}: {described}")


@app.command()
def export(
    source: Source,
    target: Annotated[Path, typer.Argument(help="New folder to write.")],
    to: Annotated[ExportTarget, typer.Option(help="What to write.")] = ExportTarget.onnx,
    step: Step = None,
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
    from sam_jax.convert import checkpoints, onnx_decoder, onnx_export, stablehlo
    from sam_jax.models.sam import Sam

    of_onnx = int8 or single_mask or stability_score or extra_metrics
    if to is ExportTarget.onnx and platform:
        raise ConfigError("--platform is for --to stablehlo; ONNX runs on all")
    if to is ExportTarget.stablehlo and of_onnx:
        raise ConfigError(
            "--int8, --single-mask, --stability-score and --extra-metrics are for --to onnx"
        )
    with _progress() as say:
        say(f"reading {source}")
        weights = checkpoints.open_weights(source, step=step, decoder_heads=decoder_heads)
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
    decoder_heads: DecoderHeads = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Says what a checkpoint is: form, variant, shapes, types, counts, and what is missing."""
    from sam_jax.convert.checkpoints import describe

    with _progress() as say:
        say(f"reading {source}")
        found = describe(source, step=step, decoder_heads=decoder_heads)
    encoder, decoder = found.config.image_encoder, found.config.mask_decoder
    height, width = encoder.image_size
    table = Table(show_header=False, box=None)
    rows: dict[str, Any] = {
        "path": found.path,
        "form": found.form.replace("_", " "),
        "variant": found.variant,
        "image size": f"{height} x {width}, patches of {encoder.patch_size}",
        "encoder": f"{encoder.depth} blocks of width {encoder.embed_dim}, {encoder.num_heads} "
        f"heads, windows of {encoder.window_size}, "
        f"global {list(encoder.global_attention_blocks)}",
        "decoder": f"{decoder.depth} layers of width {encoder.output_dim}, "
        f"{decoder.num_heads} heads",
        "parameters": f"{found.num_parameters:,}",
        "tensors": ", ".join(f"{n} {dtype}" for dtype, n in found.dtypes.items())
        + f"; {found.num_bytes / 2**20:,.1f} MiB",
        "loads": "no" if found.problems else "yes",
    }
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
    checkpoint: Annotated[str, typer.Option(help="What to load, as SOURCE of convert.")],
    out: Annotated[Path, typer.Option(help="PNG to write: the picture with prompts and mask.")],
    points: Annotated[
        list[str] | None,
        typer.Option(help="x,y on the object, or x,y,0 beside it; may be repeated."),
    ] = None,
    box: Annotated[str | None, typer.Option(help="x0,y0,x1,y1 around the object.")] = None,
    mask_out: Annotated[
        Path | None, typer.Option(help="PNG to write: the mask alone, 255 on the object.")
    ] = None,
    step: Step = None,
    decoder_heads: DecoderHeads = None,
) -> None:
    """Segments one object of a picture from clicks, a box, or both."""
    import numpy as np

    from sam_jax.inference.images import open_image
    from sam_jax.inference.predictor import Predictor
    from sam_jax.inference.prompts import Prompt
    from sam_jax.visualize import draw_boxes, draw_points, overlay_masks, save_picture

    clicks = [_numbers(text, "--points", (2, 3)) for text in points or []]
    corners = None if box is None else _numbers(box, "--box", (4,))
    prompt = Prompt(
        points=[click[:2] for click in clicks],
        labels=[click[2] if len(click) == 3 else 1.0 for click in clicks],
        box=corners,
    )
    pixels = open_image(image)
    with _progress() as say:
        say(f"reading {checkpoint}")
        predictor = Predictor.load(checkpoint, step=step, decoder_heads=decoder_heads)
        say("segmenting")
        # Several prompts leave no doubt about what is meant; a lone click does.
        embeddings = predictor.embed([pixels])
        (found,) = predictor.predict(
            embeddings, [[prompt]], multimask_output=len(clicks) + 2 * (corners is not None) == 1
        )
    mask = found.mask(0)
    picture = overlay_masks(pixels, mask[None])
    if corners is not None:
        picture = draw_boxes(picture, np.array([corners]))
    if clicks:
        picture = draw_points(
            picture,
            np.array([click[:2] for click in clicks]),
            np.array([int(click[2]) if len(click) == 3 else 1 for click in clicks]),
        )
    save_picture(out, picture)
    if mask_out is not None:
        save_picture(mask_out, mask.astype(np.uint8) * 255)
    typer.echo(
        f"{out}: {mask.mean():.1%} of the picture, predicted IoU "
        f"{found.iou_predictions[0].max():.2f}"
    )


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


def main() -> None:
    """Runs the command line; what the user can mend is a message and not a traceback."""
    with readable_errors():
        app()
