"""What every test runs under: eight virtual CPU devices, full precision, no hidden skips in CI."""

import os
import sys

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

import importlib.util  # noqa: E402
from collections.abc import Generator  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

IN_CI = os.environ.get("CI") == "true"
MISSING_FOR_PARITY = [
    name
    for name in ("torch", "segment_anything", "transformers")
    if importlib.util.find_spec(name) is None
]

# The first example of a property test compiles, so no example has a deadline.
hypothesis.settings.register_profile("sam_jax", deadline=None, derandomize=IN_CI)
hypothesis.settings.load_profile("sam_jax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING_FOR_PARITY:
        reason = f"needs requirements-torch.lock: no {', '.join(MISSING_FOR_PARITY)}"
        for item in items:
            if item.get_closest_marker("parity"):
                item.add_marker(pytest.mark.skip(reason=reason))


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
def segment_anything() -> ModuleType:
    """The published PyTorch code, whole.

    It imports four functions of torchvision, which not every platform has a build of that fits
    its build of torch. Where torchvision is missing, stand-ins with the same results take their
    place, and only while `segment_anything` is imported: other packages see the truth.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("segment_anything")
    functional = ModuleType("torchvision.transforms.functional")
    functional.__dict__.update(resize=_resize, to_pil_image=_to_pil_image)
    boxes = ModuleType("torchvision.ops.boxes")
    boxes.__dict__.update(batched_nms=_batched_nms, box_area=_box_area)
    stand_ins = {functional.__name__: functional, boxes.__name__: boxes}
    for name in ("torchvision", "torchvision.ops", "torchvision.transforms"):
        stand_ins[name] = ModuleType(name)
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("segment_anything")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _to_pil_image(image: Any) -> Any:
    from PIL import Image

    return Image.fromarray(image)


def _resize(image: Any, size: tuple[int, int]) -> Any:
    from PIL import Image

    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def _box_area(boxes: Any) -> Any:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _batched_nms(boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> Any:
    import torch

    left_top = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    right_bottom = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    overlap = (right_bottom - left_top).clamp(min=0).prod(dim=-1)
    area = _box_area(boxes)
    iou = overlap / (area[:, None] + area[None, :] - overlap)
    rivals = (iou > iou_threshold) & (idxs[:, None] == idxs[None, :])
    kept: list[int] = []
    for index in torch.argsort(scores, descending=True, stable=True).tolist():
        if not rivals[index, kept].any():
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64)
