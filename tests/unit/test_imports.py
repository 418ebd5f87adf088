"""The layout's rules that no other tool checks: who imports whom, and what files may be called."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sam_jax"

# What each part of the package may import from the package, besides itself. The order is the
# dependency order; a part that is not listed here has no place yet: decide it, then add a line.
LEAVES = {
    "arrays",
    "buckets",
    "configuration",
    "digests",
    "errors",
    "host_memory",
    "places",
    "tracing",
}
BASE = LEAVES | {"ops"}
LOWER = BASE | {
    "channel_statistics",
    "checkpoint",
    "data",
    "dataset_statistics",
    "export",
    "files",
    "flop_counts",
    "hlo",
    "hosts",
    "image_channels",
    "images",
    "losses",
    "mask_shapes",
    "model_config",
    "models",
    "parallel",
    "resizing",
    "rle",
    "sharding",
    "simulated_user",
    "trained_parameters",
    "visualize",
    "weights",
}
MAY_IMPORT = {
    "arrays": set[str](),
    "buckets": {"errors"},
    "channel_statistics": {"arrays", "errors", "files", "image_channels", "images"},
    "configuration": {"errors"},
    "digests": set[str](),
    "errors": set[str](),
    "files": {"buckets", "errors"},
    "host_memory": set[str](),
    "images": {"arrays", "errors"},
    "image_channels": {"arrays", "errors", "images"},
    "resizing": {"arrays"},
    "rle": {"arrays", "errors", "images"},
    "ops": {"arrays", "errors"},
    "places": {"errors"},
    "models": BASE,
    "model_config": BASE | {"models"},
    "parallel": BASE | {"models", "sharding"},
    "losses": BASE,
    "mask_shapes": {"arrays"},
    "dataset_statistics": BASE | {"data", "mask_shapes", "rle", "visualize"},
    "data": BASE | {"files", "image_channels", "images", "resizing", "rle"},
    "simulated_user": BASE,
    "sharding": LEAVES,
    "tracing": set[str](),
    "hlo": set[str](),
    "hosts": LEAVES,
    "flop_counts": BASE | {"models", "simulated_user"},
    "checkpoint": LEAVES | {"hosts", "sharding"},
    "trained_parameters": {"errors"},
    "weights": BASE | {"checkpoint", "model_config", "models", "trained_parameters"},
    "export": BASE | {"models", "weights"},
    "visualize": BASE,
    "training": LOWER,
    # Neither data nor inference knows of the other: they meet in pictures, files and run lengths.
    "inference": BASE
    | {
        "files",
        "image_channels",
        "images",
        "models",
        "parallel",
        "resizing",
        "rle",
        "visualize",
        "weights",
    },
    "evaluation": LOWER | {"inference"},
    "cost_report": LOWER | {"training"},
    "cli": LOWER | {"cli_results", "cost_report", "evaluation", "inference", "training"},
    "run_report": LOWER | {"training"},
    "cli_results": LOWER | {"evaluation", "run_report"},
    # sam_jax/__init__.py: the public names
    "__init__": LOWER | {"evaluation", "inference", "training"},
}

# The library knows nothing of the programs around it, nor of how they are configured.
FORBIDDEN_IN_PACKAGE = (
    "absl.flags",
    "benchmarks",
    "configs",
    "eval",
    "ml_collections",
    "tests",
    "train",
)


def source_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def project_files() -> list[Path]:
    folders = ("benchmarks", "configs", "sam_jax", "tests")
    return [path for name in folders for path in source_files(ROOT / name)] + sorted(
        ROOT.glob("*.py")
    )


def imported_names(source: str) -> Iterator[str]:
    """Dotted names of what `source` imports, those inside functions and type checks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# What the models know nothing of: they read like the paper, on one device, without kernels.
NOT_FOR_MODELS = ("sam_jax.ops.tpu", "sam_jax.ops.dispatch", "sam_jax.parallel", "sam_jax.sharding")
WORDS_NOT_FOR_MODELS = ("pallas", "shard_map", "all_gather", "psum", "interpret=", "placement")


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def wrong_imports(part: str, source: str) -> list[str]:
    wrong = []
    for name in imported_names(source):
        if any(is_within(name, outside) for outside in FORBIDDEN_IN_PACKAGE):
            wrong.append(name)
        elif is_within(name, "sam_jax"):
            # `from sam_jax import Sam` goes through every public name, so it counts as a cycle.
            target = name.split(".")[1] if "." in name else "__init__"
            if target != part and target not in MAY_IMPORT[part]:
                wrong.append(name)
    return wrong


def test_every_import_follows_the_layout() -> None:
    wrong = []
    for path in source_files(PACKAGE):
        part = part_of(path)
        assert part in MAY_IMPORT, f"{path.relative_to(ROOT)}: add {part!r} to MAY_IMPORT"
        wrong += [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in wrong_imports(part, path.read_text(encoding="utf-8"))
        ]
    assert not wrong, "\n".join(wrong)


def wrong_in_models(source: str) -> list[str]:
    """Imports and words of a file of models that models must know nothing of."""
    imported = [
        found
        for found in imported_names(source)
        if any(is_within(found, outside) for outside in NOT_FOR_MODELS)
    ]
    return imported + [word for word in WORDS_NOT_FOR_MODELS if word in source.lower()]


def test_models_know_nothing_of_devices_and_kernels() -> None:
    files = source_files(PACKAGE / "models")
    assert files
    found = {path.name: wrong_in_models(path.read_text("utf-8")) for path in files}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from sam_jax.ops.dispatch import Kernels", ["sam_jax.ops.dispatch.Kernels"]),
        ("from sam_jax.ops.dispatch import Target", ["sam_jax.ops.dispatch.Target"]),
        ("from sam_jax.ops import dispatch", ["sam_jax.ops.dispatch"]),
        ("import sam_jax.ops.tpu.kernel", ["sam_jax.ops.tpu.kernel"]),
        ("from sam_jax.parallel import Parallel", ["sam_jax.parallel.Parallel"]),
        ("from sam_jax.ops.linear import dense", []),
        ("y = jax.lax.psum(y, 'x')  # Placement", ["psum", "placement"]),
    ],
)
def test_what_models_must_not_know_is_found(source: str, expected: list[str]) -> None:
    assert wrong_in_models(source) == expected


def test_only_operations_import_kernels() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in source_files(PACKAGE)
        for name in imported_names(path.read_text(encoding="utf-8"))
        if is_within(name, "sam_jax.ops.tpu")
    }
    assert {path.split("/")[0] for path in users} == {"ops"}
    # Kernels of Pallas stand in one folder.
    written = {
        str(path.relative_to(PACKAGE))
        for path in source_files(PACKAGE)
        for name in imported_names(path.read_text(encoding="utf-8"))
        if is_within(name, "jax.experimental.pallas")
    }
    assert {path.rpartition("/")[0] for path in written} == {"ops/tpu"}


@pytest.mark.parametrize(
    ("part", "source", "expected"),
    [
        ("ops", "from sam_jax.arrays import Float", []),
        ("ops", "from sam_jax.models import sam", ["sam_jax.models.sam"]),
        ("models", "from sam_jax.ops.packed_masks import to_image\nimport sam_jax.ops", []),
        ("models", "def f():\n    import sam_jax.rle", ["sam_jax.rle"]),
        ("data", "from sam_jax import models", ["sam_jax.models"]),
        ("data", "from sam_jax import Sam", ["sam_jax.Sam"]),
        ("data", "import sam_jax", ["sam_jax"]),
        (
            "training",
            "from sam_jax.evaluation.run import evaluate",
            ["sam_jax.evaluation.run.evaluate"],
        ),
        ("training", "from sam_jax.training import step\nimport jax", []),
        ("cli", "from absl import flags, logging", ["absl.flags"]),
        ("cli", "import configs.demo\nimport ml_collections", ["configs.demo", "ml_collections"]),
        ("cli", "import training_tools\nimport trainer", []),
    ],
)
def test_wrong_imports_are_found(part: str, source: str, expected: list[str]) -> None:
    assert wrong_imports(part, source) == expected


def test_relative_imports_are_refused() -> None:
    with pytest.raises(AssertionError, match="relative imports"):
        list(imported_names("from . import masks"))


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_programs_stay_short(name: str) -> None:
    path = ROOT / name
    if path.exists():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_no_file_is_named_for_nothing_in_particular() -> None:
    vague = {"common", "helpers", "misc", "util", "utils"}
    found = {str(path.relative_to(ROOT)) for path in project_files() if path.stem in vague}
    assert found <= {str(Path("configs", "common.py"))}


def test_importing_the_package_is_light() -> None:
    """Whoever only trains should not wait for, or need, what other parts use."""
    heavy = ("matplotlib", "tensorflow", "torch")
    program = f"import sam_jax, sys; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]"
