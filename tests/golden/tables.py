"""Tables of all parameters, a line for each kind with the range of its blocks."""

import collections
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path

_NUMBER = re.compile(r"(block|layer|mlp)_(\d+)")


def _ranges(numbers: list[str]) -> str:
    """Numbers as text, runs of them by their ends."""
    by_run = itertools.groupby(enumerate(sorted(numbers)), lambda pair: int(pair[1]) - pair[0])
    runs = [[number for _, number in group] for _, group in by_run]
    return ",".join("-".join(dict.fromkeys((run[0], run[-1]))) for run in runs)


def folded(facts: Mapping[str, str]) -> list[str]:
    """Facts by path, in one line for all blocks that share them."""
    blocks = collections.defaultdict(list)
    for path, fact in facts.items():
        blocks[_NUMBER.sub(r"\1_{}", path), fact] += [n for _, n in _NUMBER.findall(path)]
    return sorted(
        f"{path.replace('{}', '{' + _ranges(numbers) + '}')} {fact}"
        for (path, fact), numbers in blocks.items()
    )


def assert_unchanged(path: Path, tables: Mapping[str, list[str]]) -> None:
    """Holds tables by name against a file, in which a line stands once for all that have it.

    SAM_JAX_UPDATE_GOLDEN=1 writes the file again.
    """
    owners = collections.defaultdict(list)
    for name, lines in tables.items():
        for line in lines:
            owners[line].append(name)
    sections = collections.defaultdict(list)
    for line, names in owners.items():
        sections[", ".join(names)].append(line)
    text = "\n".join(
        "".join(f"{line}\n" for line in [f"# {names}", *lines]) for names, lines in sections.items()
    )
    if os.environ.get("SAM_JAX_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
