"""The benchmark's compiled part, which is an optional dependency."""

from types import ModuleType

from sam_jax.errors import ConfigError


def import_counts() -> ModuleType:
    """The module ``counts``, or a word on how to get what it needs.

    Raises:
      ConfigError: Numba is not installed.
    """
    try:
        from sam_jax.evaluation.edges import counts
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] not in ("numba", "llvmlite"):
            raise
        raise ConfigError("scoring edges needs Numba: pip install 'sam-jax[edges]'") from None
    return counts
