"""Settings of every test: eight virtual CPU devices, full precision, no hidden skips in CI."""

import gc
import os
import sys
import tempfile
import threading

# XLA and JAX read these when they start, in this process and in those that tests start.
# SAM_JAX_TEST_PLATFORM=cuda runs the suite on an accelerator instead.
assert "jax" not in sys.modules, "JAX was imported before the tests' settings were made"
os.environ["JAX_PLATFORMS"] = os.environ.get("SAM_JAX_TEST_PLATFORM", "cpu")
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
for flag in (
    "--xla_force_host_platform_device_count=8",
    # Eight devices on two busy cores wait for each other longer than XLA expects.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
# What is compiled twice in a session is compiled once: by workers of pytest-xdist and programs that
# tests start, but never by another session.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="sam-jax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "2"

import importlib.util  # noqa: E402
from collections.abc import Generator  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from _pytest.unraisableexception import gc_collect_iterations_key  # noqa: E402

IN_CI = os.environ.get("CI") == "true"
MISSING_FOR_PARITY = [
    name
    for name in ("torch", "segment_anything", "mobile_sam", "transformers")
    if importlib.util.find_spec(name) is None
]

# The first example of a property test compiles, so no example has a deadline.
hypothesis.settings.register_profile("sam_jax", deadline=None, derandomize=IN_CI)
hypothesis.settings.load_profile("sam_jax")

# Traces are many small objects that live: looking through all of them finds little.
gc.set_threshold(100_000, 20, 50)


# What is compared with frozen answers, and with the published code at its own sizes or of the whole
# model, is compiled as users compile it.
COMPILED_WELL = {
    "golden",
    "test_batches.py",
    "test_mobile_sam.py",
    "test_trained_weights.py",
    "test_vit_b.py",
}
# Besides what JAX turns off: fusions by way of MLIR take half of a CPU's compile time.
COMPILED_QUICKLY = (
    ("xla_cpu_use_fusion_emitters", False),
    ("xla_cpu_parallel_codegen_split_count", 1),
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Compiles quickly rather than well: most programs of the tests run once, on tiny arrays."""
    import jax
    from jax._src import compiler

    is_quick = not COMPILED_WELL & set(item.path.parts)
    jax.config.update("jax_disable_most_optimizations", is_quick)
    if not is_quick or os.environ["JAX_PLATFORMS"] != "cpu":
        return (yield)
    options_of = compiler.get_compile_options

    def quick_options(*args: Any, **kwargs: Any) -> Any:
        options = options_of(*args, **kwargs)
        options.env_option_overrides = [*COMPILED_QUICKLY, *options.env_option_overrides]
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", quick_options)
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives each file to one worker, which makes its fixtures once; whole runs come first."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Has the end of a session looked through once, not five times, for what nobody closed."""
    config.stash[gc_collect_iterations_key] = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _lower_in_one_context()
    if MISSING_FOR_PARITY:
        reason = f"needs requirements-torch.lock: no {', '.join(MISSING_FOR_PARITY)}"
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(pytest.mark.skip(reason=reason))


def _lower_in_one_context() -> None:
    """Has a thread keep its MLIR context, which JAX makes anew for each of thousands of programs.

    Registering all dialects takes as long as lowering a small program.
    """
    from jax._src.interpreters import mlir

    make, of_thread = mlir.make_ir_context, threading.local()

    def kept() -> Any:
        if not hasattr(of_thread, "context"):
            of_thread.context = make()
        return of_thread.context

    mlir.make_ir_context = kept


def _forbid_skip(report: pytest.CollectReport | pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: CI runs every comparison with PyTorch. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if IN_CI and "not parity" not in collector.config.option.markexpr:
        _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if IN_CI and item.get_closest_marker("parity"):
        _forbid_skip(report)
    return report


@pytest.fixture(scope="session")
def shared_data(pytestconfig: pytest.Config) -> Path:
    """The folder of real images that is too large for the repository."""
    default = pytestconfig.rootpath.parent / "shared" / "data"
    path = Path(os.environ.get("SAM_JAX_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no folder {path}; SAM_JAX_DATA names another")
    return path


@pytest.fixture(scope="session")
def mobile_sam_weights(pytestconfig: pytest.Config) -> Path:
    """The file of a trained model of MobileSAM's shape, which the repository does not hold."""
    default = pytestconfig.rootpath.parent / "shared" / "weights" / "mobile_sam.safetensors"
    path = Path(os.environ.get("SAM_JAX_MOBILE_SAM", default))
    if not path.is_file():
        pytest.skip(f"no file {path}; SAM_JAX_MOBILE_SAM names another")
    return path


@pytest.fixture(scope="session")
def segment_anything() -> ModuleType:
    """The published PyTorch code, whole."""
    from benchmarks import published

    return published.segment_anything()


@pytest.fixture(scope="session")
def mobile_sam() -> ModuleType:
    """MobileSAM's published PyTorch code, whole."""
    from benchmarks import published

    return published.mobile_sam()


@pytest.fixture(scope="session")
def tpu_compiler() -> None:
    """Lets JAX compile for TPUs that are elsewhere."""
    # Where `make setup-tpu-compiler` puts it.
    folder = Path(sys.prefix) / "tpu-compiler"
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    if importlib.util.find_spec("libtpu") is None:
        if IN_CI:
            pytest.fail("CI must compile the kernels, and there is no TPU compiler")
        pytest.skip("needs the TPU compiler: make setup-tpu-compiler")
