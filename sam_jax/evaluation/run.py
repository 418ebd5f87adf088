"""Runs an evaluation: one object for training and for ``eval.py``."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sam_jax.configuration import from_mapping
from sam_jax.errors import ConfigError, UserError
from sam_jax.evaluation.evaluation import Evaluation, Record, Report
from sam_jax.evaluation.kinds import DEFAULT_KIND, KINDS
from sam_jax.evaluation.records import Records, RecordsInFolder, RecordsInMemory
from sam_jax.evaluation.results import REPORT_NAME
from sam_jax.inference.predictor import Predictor
from sam_jax.inference.reconstructor import Reconstructor
from sam_jax.model_config import ModelConfig, build_autoencoder, build_model
from sam_jax.models.masked_autoencoder import AutoencoderConfig, MaskedAutoencoder
from sam_jax.models.sam import Sam
from sam_jax.ops.dispatch import Kernels
from sam_jax.weights.files import written_whole
from sam_jax.weights.load import (
    autoencoder_variables_for,
    load,
    variables_for,
)
from sam_jax.weights.runs import is_pretraining

# What can be evaluated.
Model: TypeAlias = Sam | MaskedAutoencoder
# What answers of models depend on besides the variables; other attributes change their speed.
_OF_THE_MODEL = ("config", "encoder", "channels")


class EvaluationInterruptedError(UserError):
    """Someone stopped an evaluation; its records are kept."""

    exit_code = 130


class Evaluator:
    """Evaluates variables of one model on fixed examples.

    Built once: data are opened, and every later call reuses what the first one compiled. A call
    depends on nothing but the variables. With several hosts, each evaluates its own share of the
    examples, all must call together, and all get the same report.

    Args:
      model: the model.
      evaluation: what it is tried on.
      kind: name of the evaluation's kind, for its files.
      devices: of this host; by default all.
      kernels: see ``ops.dispatch.Target``.
      show_progress: whether to draw a bar on the terminal, if there is one.
      predictor: which answers in place of the model's own, for comparisons.
    """

    def __init__(
        self,
        model: Model,
        evaluation: Evaluation,
        *,
        kind: str = DEFAULT_KIND,
        devices: Sequence[jax.Device] | None = None,
        kernels: Kernels = "auto",
        show_progress: bool = False,
        predictor: Any = None,
    ):
        self._evaluation = evaluation
        self._kind = kind
        self._identity = model_identity(model)
        self._shows_progress = show_progress and jax.process_index() == 0 and sys.stderr.isatty()
        self._predictor = predictor or _predictor(
            model, evaluation, devices or jax.local_devices(), kernels
        )

    def __call__(self, variables: Mapping[str, Any], folder: Path | None = None) -> Report:
        """The report of a model with these variables.

        Args:
          variables: ``{"params": ..., "constants": ...}``; with several hosts, shards of global
            arrays are gathered onto each device.
          folder: where records and report are kept; what was recorded there with the same options,
            model and weights is not done again. None keeps nothing.

        Raises:
          UserError: the data or the model's answers are no good; see the kinds of evaluation.
          EvaluationInterruptedError: a key stopped it, and records are kept.
        """
        start = time.monotonic()
        predictor = self._predictor.with_variables(variables)
        records: Records = RecordsInMemory()
        if folder is not None:
            records = kept = RecordsInFolder(folder, self._made_with(predictor))
        done = records.done()
        try:
            self._run(predictor, records, done)
        except KeyboardInterrupt:
            if folder is None:
                raise
            raise EvaluationInterruptedError(
                f"stopped; {len(records.done())} of {len(self._evaluation)} examples are recorded "
                f"in {kept.folder}, and the same command goes on from there"
            ) from None
        gathered = records.gathered(len(self._evaluation))
        report = self._evaluation.report(gathered, time.monotonic() - start)
        if folder is not None and jax.process_index() == 0:
            _write(report, {"kind": self._kind, "records": kept.folder.name}, folder)
        return report

    def _made_with(self, predictor: Any) -> dict[str, Any]:
        """All that records depend on."""
        return {
            "kind": self._kind,
            "model": self._identity,
            "weights": predictor.fingerprint(),
            "evaluation": self._evaluation.settings,
            "num_examples": len(self._evaluation),
        }

    def _run(self, predictor: Any, records: Records, done: set[int]) -> None:
        """Records this host's share of what is not done."""
        share = range(jax.process_index(), len(self._evaluation), jax.process_count())
        left = [index for index in share if index not in done]
        found = self._evaluation.records(predictor, left)
        for index, record in zip(
            left, self._with_progress(found, len(share), len(left)), strict=True
        ):
            records.add(index, record)

    def _with_progress(self, found: Iterator[Record], total: int, left: int) -> Iterator[Record]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not self._shows_progress,
            transient=True,
        ) as progress:
            task = progress.add_task(self._kind, total=total, completed=total - left)
            for record in found:
                yield record
                progress.advance(task)


def model_identity(model: Model) -> dict[str, str]:
    """Identity of a model besides its variables: its shape, and the type that it computes in.

    Variables alone do not tell: those of a TinyViT have the same shapes for images of any size.
    """
    fields = {name: repr(getattr(model, name)) for name in _OF_THE_MODEL if hasattr(model, name)}
    return fields | {"dtype": str(jnp.dtype(model.dtype))}


def _predictor(
    model: Model, evaluation: Evaluation, devices: Sequence[jax.Device], kernels: Kernels
) -> Predictor | Reconstructor:
    """The model at work, without variables, which each call brings."""
    buckets = evaluation.buckets(len(devices))
    if isinstance(model, MaskedAutoencoder):
        return Reconstructor(
            model, {}, images_per_device=buckets.images[-1], devices=devices, kernels=kernels
        )
    return Predictor(model, {}, buckets, devices=devices, kernels=kernels)


def build_evaluators(
    sections: Mapping[str, Mapping[str, Any]],
    model: Model,
    *,
    kernels: Kernels = "auto",
    show_progress: bool = False,
) -> dict[str, Evaluator]:
    """The evaluators that a config's section ``evals`` describes, by name.

    A section names its ``kind`` (``prompts`` if it does not), and has the options of it.

    Raises:
      ConfigError: if a section does not fit its kind, or its kind the model, before any data are
        opened; and what opening them raises.
    """
    chosen = {name: _read_section(name, section) for name, section in sections.items()}
    for name, (kind, _) in chosen.items():
        if not isinstance(model, KINDS[kind].model):
            fitting = [other for other in KINDS if isinstance(model, KINDS[other].model)]
            raise ConfigError(
                f"config.evals.{name}.kind is {kind!r}, which is not for a "
                f"{type(model).__name__}: expected {' or '.join(fitting)}"
            )
    channels = model.channels if isinstance(model, MaskedAutoencoder) else model.config.channels
    in_channels = channels.in_chans
    return {
        name: Evaluator(
            model,
            KINDS[kind].open(config, in_channels),
            kind=kind,
            kernels=kernels,
            show_progress=show_progress,
        )
        for name, (kind, config) in chosen.items()
    }


def model_of(
    sections: Mapping[str, Any], checkpoint: str, *, step: int | None, ema: bool
) -> tuple[Model, dict[str, Any], Kernels]:
    """The model to evaluate, its variables on the host, and the policy for kernels.

    Args:
      sections: a config's, whose model the checkpoint must fit; without a section ``model`` the
        checkpoint's own is taken.
      checkpoint: see ``weights.load.load``.
      step: see there.
      ema: see there.

    Raises:
      ConfigError: if the section is of no model; and what loading raises.
    """
    if sections.get("model") is None:
        model, variables = load(checkpoint, step=step, ema=ema)
        return model, variables, "auto"
    config = from_mapping(ModelConfig, sections["model"], "model")
    if is_pretraining(sections):
        of_decoder = from_mapping(AutoencoderConfig, sections["autoencoder"], "autoencoder")
        autoencoder = build_autoencoder(config, of_decoder)
        variables = autoencoder_variables_for(autoencoder, checkpoint, step=step, ema=ema)
        return autoencoder, variables, config.kernels
    model = build_model(config)
    return model, variables_for(model, checkpoint, step=step, ema=ema), config.kernels


def _read_section(name: str, section: Mapping[str, Any]) -> tuple[str, Any]:
    options = dict(section)
    kind = options.pop("kind", DEFAULT_KIND)
    if kind not in KINDS:
        raise ConfigError(f"config.evals.{name}.kind is {kind!r}; there are {', '.join(KINDS)}")
    return kind, from_mapping(KINDS[kind].config, options, f"evals.{name}")


def _write(report: Report, about: Mapping[str, Any], folder: Path) -> None:
    """Writes ``report.json`` and a PNG for each picture, each whole or not at all."""
    for name, picture in report.pictures.items():
        with written_whole(folder / f"{name}.png") as unfinished:
            Image.fromarray(picture).save(unfinished, format="PNG")
    text = json.dumps({**about, **report.as_json()}, indent=2, allow_nan=False)
    with written_whole(folder / REPORT_NAME) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
