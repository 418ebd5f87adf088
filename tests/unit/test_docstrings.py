"""First lines of docstrings name a thing; what begins with "Of" or "Whether" names none."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "sam_jax"
QUESTIONS = {"How", "In", "Of", "So", "What", "When", "Where", "Whether", "Which", "Why"}


def questions(source: str) -> Iterator[str]:
    """``line: first line`` of docstrings that begin with one of ``QUESTIONS``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if first.partition(" ")[0].rstrip(",:;.") in QUESTIONS:
                yield f"{node.body[0].lineno}: {first}"


def test_first_lines_name_things() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{question}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for question in questions(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "name the thing, verb or noun:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Of all devices."""', ["1: Of all devices."]),
        ('"""Offsets of blocks."""', []),
        ('class A:\n    """A thing.\n\n    What it does.\n    """', []),
        ('async def f():\n    """Whether: it is."""', ["2: Whether: it is."]),
        ("def f():\n    return 'What'", []),
    ],
)
def test_questions_are_found(source: str, expected: list[str]) -> None:
    assert list(questions(source)) == expected
