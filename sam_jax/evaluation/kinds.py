"""The table of kinds of evaluations; a new one is a file of its own, a line here and a config."""

from collections.abc import Mapping

from sam_jax.evaluation.detection import instances, proposals
from sam_jax.evaluation.detection.instances import InstancesConfig, InstancesFromBoxes
from sam_jax.evaluation.detection.proposals import ObjectProposals, ProposalsConfig
from sam_jax.evaluation.edges.evaluation import EdgeEvalConfig, EdgeEvaluation
from sam_jax.evaluation.edges.report import measures as edge_measures
from sam_jax.evaluation.evaluation import EvaluationKind
from sam_jax.evaluation.mean_ious import MeanIous
from sam_jax.evaluation.prompted import EvalConfig, PromptedMasks

DEFAULT_KIND = "prompts"
# By the names that configs use.
KINDS: Mapping[str, EvaluationKind] = {
    DEFAULT_KIND: EvaluationKind(EvalConfig, PromptedMasks, MeanIous),
    "edges": EvaluationKind(EdgeEvalConfig, EdgeEvaluation, edge_measures),
    "proposals": EvaluationKind(ProposalsConfig, ObjectProposals, proposals.measures),
    "instances": EvaluationKind(InstancesConfig, InstancesFromBoxes, instances.measures),
}
