"""The table of kinds of evaluations; a new one is a file of its own, a line here and a config."""

from collections.abc import Mapping

from sam_jax.evaluation.evaluation import EvaluationKind
from sam_jax.evaluation.mean_ious import MeanIous
from sam_jax.evaluation.prompted import EvalConfig, PromptedMasks

DEFAULT_KIND = "prompts"
# By the names that configs use.
KINDS: Mapping[str, EvaluationKind] = {
    DEFAULT_KIND: EvaluationKind(EvalConfig, PromptedMasks, MeanIous),
}
