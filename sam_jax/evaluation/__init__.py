"""Evaluation of trained models: the paper's zero-shot experiments, their scores and reports."""

from sam_jax.evaluation.prompted import EvalConfig, PromptedMasks
from sam_jax.evaluation.report import DatasetReport, EvalReport
from sam_jax.evaluation.run import Evaluator

__all__ = ["DatasetReport", "EvalConfig", "EvalReport", "Evaluator", "PromptedMasks"]
