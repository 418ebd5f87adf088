"""One page of HTML that tells what happened in a run, from the files in its folder."""

import base64
import html
import io
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from sam_jax.checkpoint import CHECKPOINTS, CONFIG, DAMAGED, flat_config
from sam_jax.errors import UserError
from sam_jax.training.manifest import DATA, PARAMETERS, STARTS
from sam_jax.training.sinks import METRICS, PICTURES, object_of
from sam_jax.training.skipped_steps import SKIPPED_STEPS

_MOST_ROWS = 12
_COLORS = ("#2f6db5", "#c9622b", "#3a8f5d", "#8a5aa8", "#a08a2c", "#5f6b76")
_LINE, _TEXT = "#d5dae0", "#59636e"

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d232a; background: #fff; margin: 0 }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid #d5dae0 }
p { margin: .3rem 0 .8rem } .quiet { color: #59636e }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem }
th, td { text-align: left; padding: .22rem 1.1rem .22rem 0; vertical-align: top }
th { font-weight: 600; color: #59636e; border-bottom: 1px solid #d5dae0 }
td.number, th.number { text-align: right } tbody tr:nth-child(even) td { background: #f7f8fa }
td { overflow-wrap: anywhere } .wide { overflow-x: auto }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1.2rem }
figure { margin: 0 } figcaption { font-size: .83rem; color: #59636e; margin-bottom: .25rem }
svg, img { max-width: 100%; height: auto } img { border: 1px solid #d5dae0 }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; margin-bottom: 1.4rem }
.pair.alone { grid-template-columns: minmax(0, 34rem) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.4rem; font-size: .9rem }
dt { color: #59636e } dd { margin: 0; overflow-wrap: anywhere }
code, pre { font: .82rem/1.45 ui-monospace, monospace } pre { overflow-x: auto }
summary { cursor: pointer; color: #2f6db5 } .state { font-weight: 600 } .bad { color: #b3261e }
"""


class RunReportError(UserError):
    """A folder has nothing of a run to report."""


class Run(NamedTuple):
    """Content of a run's folder; what is missing or cannot be read is empty, and a fault.

    Attributes:
      folder: of the run.
      config: the resolved config of its last start.
      starts: each time it was started, see ``training.manifest``.
      metrics: numbers by name and step, the later of two.
      skipped_steps: by step.
      data: sources, and what was left out.
      parameters: a line for each.
      pictures: files by name and step.
      checkpoints: their steps.
      damaged: names of checkpoints that were put aside.
      earlier_configs: (steps done with it, config), the first one first.
      faults: what could not be read.
    """

    folder: Path
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    metrics: dict[str, dict[int, float]]
    skipped_steps: dict[int, dict[str, Any]]
    data: dict[str, Any]
    parameters: list[str]
    pictures: dict[str, dict[int, Path]]
    checkpoints: list[int]
    damaged: list[str]
    earlier_configs: list[tuple[int, dict[str, Any]]]
    faults: list[str]

    @property
    def num_steps(self) -> int | None:
        """Steps that it shall have in all."""
        found = self.config.get("train", {}).get("num_steps")
        return found if isinstance(found, int) else None

    @property
    def done_steps(self) -> int:
        """The last step that is known of."""
        steps = (step for values in self.metrics.values() for step in values)
        return max(itertools.chain(steps, self.checkpoints), default=0)


def read_run(folder: Path) -> Run:
    """Reads a run's folder, of a run that is going on, has ended or broke in the middle.

    Raises:
      RunReportError: if there is nothing of a run in it.
    """
    if not folder.is_dir():
        raise RunReportError(f"{folder} is no folder; expected the --workdir of a training run")
    faults: list[str] = []
    metrics: dict[str, dict[int, float]] = {}
    for line in _lines_of(folder / METRICS, faults):
        step = line.pop("step", None)
        for name, value in line.items():
            if isinstance(step, int) and isinstance(value, int | float | None):
                metrics.setdefault(name, {})[step] = math.nan if value is None else value
    checkpoints = [int(path.name) for path in _inside(folder / CHECKPOINTS) if path.name.isdigit()]
    config = _json_of(folder / CONFIG, faults)
    if not (metrics or checkpoints or (folder / STARTS).exists() or "train" in config):
        raise RunReportError(
            f"{folder} has no {METRICS}, {STARTS}, {CONFIG} or {CHECKPOINTS} of a training run"
        )
    pictures: dict[str, dict[int, Path]] = {}
    for at_step in _inside(folder / PICTURES):
        for path in _inside(at_step):
            if at_step.name.isdigit() and path.suffix == ".png" and not path.name.startswith("."):
                pictures.setdefault(path.stem, {})[int(at_step.name)] = path
    earlier = [
        (int(path.stem.rpartition("_")[2]), _json_of(path, faults))
        for path in folder.glob("config_until_step_*.json")
        if path.stem.rpartition("_")[2].isdigit()
    ]
    return Run(
        folder=folder,
        config=config,
        starts=list(_lines_of(folder / STARTS, faults)),
        metrics={name: dict(sorted(values.items())) for name, values in metrics.items()},
        skipped_steps={
            line["step"]: line
            for line in _lines_of(folder / SKIPPED_STEPS, faults, required=False)
            if isinstance(line.get("step"), int)
        },
        data=_json_of(folder / DATA, faults),
        parameters=_text_of(folder / PARAMETERS, faults).splitlines(),
        pictures=pictures,
        checkpoints=sorted(checkpoints),
        damaged=sorted(path.name for path in _inside(folder / DAMAGED)),
        earlier_configs=sorted(earlier, key=lambda found: found[0]),
        faults=faults,
    )


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _text_of(path: Path, faults: list[str], *, required: bool = True) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if required:
            faults.append(f"{path.name} is missing")
    except OSError as error:
        faults.append(f"{path.name}: {error.strerror}")
    return ""


def _json_of(path: Path, faults: list[str]) -> dict[str, Any]:
    found = object_of(_text_of(path, faults))
    if found is None:
        faults.append(f"{path.name} is no JSON object")
    return found or {}


def _lines_of(path: Path, faults: list[str], *, required: bool = True) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; what was cut off, as by a kill, is counted."""
    num_bad = 0
    for line in _text_of(path, faults, required=required).splitlines():
        found = object_of(line)
        if found is None:
            num_bad += 1
        else:
            yield found
    if num_bad:
        faults.append(f"{path.name}: {num_bad} lines are cut off or garbled, and left out")


def report_html(run: Run) -> str:
    """The page, with all that it shows inside of it."""
    name = html.escape(run.folder.absolute().name)
    sections = (
        ("Curves", _curves(run)),
        ("Evaluations", _evaluations(run)),
        ("Pictures", _pictures(run)),
        ("Data", _data(run)),
        ("Steps that were skipped", _skipped(run)),
        ("Starts", _starts(run)),
        ("Config", _config(run)),
        ("Checkpoints", _checkpoints(run)),
        ("Parameters", _parameters(run)),
        ("What could not be read", _list(run.faults)),
    )
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{name}</h1>{_summary(run)}{body}</main></body></html>\n"
    )


def _summary(run: Run) -> str:
    done, total = run.done_steps, run.num_steps
    if total and done >= total:
        state = f"all {total:,} steps done"
    else:
        state = f"{done:,} of {total:,} steps done" if total else f"{done:,} steps done"
        written = [run.folder / METRICS, run.folder / CHECKPOINTS]
        times = [path.stat().st_mtime for path in written if path.exists()]
        if times:
            state += time.strftime("; last heard of at %Y-%m-%d %H:%M", time.localtime(max(times)))
    last = run.starts[-1] if run.starts else {}
    commit = last.get("commit") or {}
    changed = " with changes that are not committed" if commit.get("dirty") else ""
    devices = last.get("devices") or []
    kinds = {str(device).rpartition(" ")[0] for device in devices}
    facts = {
        "model": run.config.get("model", {}).get("variant"),
        "parameters": _num_parameters(run),
        "devices": f"{len(devices)} x {', '.join(sorted(kinds))}" if devices else None,
        "processes": last.get("processes"),
        "command": last.get("command"),
        "commit": f"{commit['hash'][:12]}{changed}" if commit.get("hash") else None,
        "versions": ", ".join(f"{k} {v}" for k, v in (last.get("versions") or {}).items()),
        "last evaluation": _headline(run),
    }
    rows = "".join(
        f"<dt>{key}</dt><dd>{html.escape(str(value))}</dd>" for key, value in facts.items() if value
    )
    return f'<p class="state">{state}</p><dl>{rows}</dl>'


def _num_parameters(run: Run) -> str | None:
    sizes = []
    for line in run.parameters:
        shape = line.partition("(")[2].partition(")")[0]
        numbers = [part.strip() for part in shape.split(",") if part.strip()]
        if all(number.isdigit() for number in numbers):
            sizes.append(math.prod(map(int, numbers)))
    return f"{sum(sizes):,} in {len(sizes)} arrays" if sizes else None


def _headline(run: Run) -> str | None:
    means = {
        name: values[max(values)]
        for name, values in run.metrics.items()
        if name.startswith("eval/") and "/mean/" in name
    }
    return ", ".join(f"{name.removeprefix('eval/')} {x:.3f}" for name, x in means.items()) or None


class _Chart(NamedTuple):
    title: str
    names: Sequence[str]
    is_log: bool = False


def _curves(run: Run) -> str:
    known = run.metrics
    ious = sorted(name for name in known if name.startswith("train/iou_round_"))
    charts = [
        _Chart("loss", ["train/loss"]),
        _Chart(
            "parts of the loss", [f"train/{part}" for part in ("focal", "dice", "iou_mse")], True
        ),
        _Chart("IoU in the first and the last round", list(dict.fromkeys([*ious[:1], *ious[-1:]]))),
        _Chart("norms", ["train/gradient_norm", "train/update_norm"], True),
        _Chart("images per second", ["train/images_per_second"]),
        _Chart("share of time that waits for data", ["train/input_wait_rate"]),
        _Chart("steps skipped between reports", ["train/skipped_steps"]),
    ]
    evaluations = sorted({name.rpartition("/")[0] for name in known if name.startswith("eval/")})
    for group in evaluations:
        names = [name for name in known if name.rpartition("/")[0] == group]
        if any(len(known[name]) > 1 for name in names):
            charts.append(_Chart(group.removeprefix("eval/"), names[: len(_COLORS)]))
    drawn = []
    for chart in charts:
        curves = {name: known[name] for name in chart.names if known.get(name)}
        if any(any(value for value in values.values()) for values in curves.values()):
            figure = _svg(curves, is_log=chart.is_log)
            drawn.append(
                f"<figure><figcaption>{html.escape(chart.title)}</figcaption>{figure}</figure>"
            )
    return f'<div class="curves">{"".join(drawn)}</div>' if drawn else ""


def _svg(curves: Mapping[str, Mapping[int, float]], *, is_log: bool) -> str:
    figure = Figure(figsize=(4.4, 2.5), layout="constrained")
    axes = figure.add_subplot()
    for color, (name, values) in zip(itertools.cycle(_COLORS), curves.items(), strict=False):
        marker = "o" if len(values) < 3 else ""
        label = name.rpartition("/")[2].replace("_", " ")
        steps, numbers = list(values), list(values.values())
        axes.plot(
            steps, numbers, color=color, linewidth=1.3, marker=marker, markersize=3, label=label
        )
    if is_log and any(value > 0 for values in curves.values() for value in values.values()):
        axes.set_yscale("log")
    axes.tick_params(colors=_TEXT, labelsize=8, length=2)
    axes.grid(color=_LINE, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=_TEXT)
    text = io.StringIO()
    # The same page for the same run, and text that can be selected.
    with matplotlib.rc_context({"svg.hashsalt": "sam_jax", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]


def _evaluations(run: Run) -> str:
    names = [name for name in run.metrics if name.startswith("eval/")]
    steps = sorted({step for name in names for step in run.metrics[name]})
    if not steps:
        return ""
    shown = steps if len(steps) <= _MOST_ROWS else [steps[0], *steps[1 - _MOST_ROWS :]]
    header = ["measure", *(f"step {step:,}" for step in shown)]
    rows = [
        [
            name.removeprefix("eval/"),
            *(_figure(run.metrics[name].get(step)) for step in shown),
        ]
        for name in names
    ]
    left = len(steps) - len(shown)
    note = f'<p class="quiet">{left} evaluations in between are left out.</p>' if left else ""
    return _table(header, rows, numbers_from=1) + note


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _pictures(run: Run) -> str:
    parts = []
    for name, by_step in sorted(run.pictures.items()):
        steps = sorted(by_step)
        shown = [steps[0], steps[-1]] if len(steps) > 1 else steps
        figures = []
        for step in shown:
            try:
                content = base64.b64encode(by_step[step].read_bytes()).decode()
            except OSError as error:
                run.faults.append(f"{by_step[step].name} of step {step}: {error.strerror}")
                continue
            when = f"after step {step:,}" if step else "before the first step"
            title = f"{name.removeprefix('eval_').replace('_', ' ')}, {when}"
            figures.append(
                f"<figure><figcaption>{html.escape(title)}</figcaption>"
                f'<img alt="{html.escape(title)}" src="data:image/png;base64,{content}"></figure>'
            )
        alone = "" if len(figures) > 1 else " alone"
        parts.append(f'<div class="pair{alone}">{"".join(figures)}</div>')
    return "".join(parts)


def _data(run: Run) -> str:
    if not run.data:
        return ""
    sources = [source for source in run.data.get("sources", []) if isinstance(source, dict)]
    rows = [
        [
            str(source.get("name", "")),
            str(source.get("kind", "")),
            str(source.get("path", "")),
            f"{source.get('num_samples', '')}",
            f"{source.get('weight', '')}",
        ]
        for source in sources
    ]
    parts = [_table(["source", "kind", "path", "samples", "weight"], rows, numbers_from=3)]
    read, processes = run.data.get("samples_read", 0), run.data.get("processes", 1)
    share = f", by the first of {processes} processes" if processes != 1 else ""
    parts.append(f"<p>{read:,} samples read so far{share}.</p>")
    left_out = [
        [
            what,
            str(case.get("reason", "")),
            f"{case.get('count', '')}",
            str(case.get("example", "")),
        ]
        for what, cases in run.data.items()
        if what != "sources" and isinstance(cases, list)
        for case in cases
        if isinstance(case, dict)
    ]
    if left_out:
        parts.append(
            _table(["what", "reason", "count", "for example"], left_out, numbers_from=None)
        )
    else:
        parts.append('<p class="quiet">Nothing was left out.</p>')
    return "".join(parts)


def _skipped(run: Run) -> str:
    steps = sorted(run.skipped_steps)
    rows = []
    for step in steps[-_MOST_ROWS:]:
        record = run.skipped_steps[step]
        samples = record.get("samples")
        named = ", ".join(map(str, samples)) if isinstance(samples, list) else ""
        rows.append(
            [f"{step:,}", str(record.get("loss")), str(record.get("gradient_norm")), named[:400]]
        )
    if not rows:
        return ""
    note = f"<p>{len(steps)} steps had a loss or a gradient that was not finite.</p>"
    return note + _table(["step", "loss", "gradient norm", "samples"], rows, numbers_from=None)


def _starts(run: Run) -> str:
    rows = [
        [
            str(start.get("time", "")),
            f"{start.get('after_step', '')}",
            f"{len(start.get('devices') or [])} on {start.get('processes', '')} processes",
            _hosts(start),
            str((start.get("commit") or {}).get("hash", ""))[:12],
            str(start.get("command", "")),
        ]
        for start in run.starts
    ]
    header = ["time", "after step", "devices", "hosts", "commit", "command"]
    return _table(header, rows, numbers_from=None) if rows else ""


def _hosts(start: Mapping[str, Any]) -> str:
    """Hosts of a start, several processes on one once; runs of earlier versions name the first."""
    named = start.get("hosts")
    hosts = list(dict.fromkeys(map(str, named))) if isinstance(named, list) else []
    return ", ".join(hosts) or str(start.get("host", ""))


def _config(run: Run) -> str:
    if not run.config:
        return ""
    configs = [*(config for _, config in run.earlier_configs), run.config]
    rows = []
    for (step, before), after in zip(run.earlier_configs, configs[1:], strict=True):
        was, now = flat_config(before), flat_config(after)
        rows += [
            [f"{step:,}", key, json.dumps(was.get(key)), json.dumps(now.get(key))]
            for key in sorted(was | now)
            if was.get(key) != now.get(key)
        ]
    changes = (
        _table(["after step", "key", "was", "became"], rows, numbers_from=None) if rows else ""
    )
    text = html.escape(json.dumps(run.config, indent=2))
    return f"{changes}<details><summary>All of it</summary><pre>{text}</pre></details>"


def _checkpoints(run: Run) -> str:
    kept = ", ".join(f"{step:,}" for step in run.checkpoints)
    parts = [f"<p>Steps {kept}.</p>"] if kept else []
    if run.damaged:
        names = ", ".join(html.escape(name) for name in run.damaged)
        parts.append(f'<p class="bad">Damaged, and put aside in {DAMAGED}: {names}.</p>')
    return "".join(parts)


def _parameters(run: Run) -> str:
    if not run.parameters:
        return ""
    text = html.escape("\n".join(run.parameters))
    return (
        "<details><summary>Path, shape, axes that split it, elements on each device</summary>"
        f"<pre>{text}</pre></details>"
    )


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int | None
) -> str:
    """A table; columns from this one on are numbers."""

    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{_numeric(index, numbers_from)}>{html.escape(value)}</{tag}>"
            for index, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _numeric(index: int, numbers_from: int | None) -> str:
    is_number = numbers_from is not None and index >= numbers_from
    return ' class="number"' if is_number else ""
