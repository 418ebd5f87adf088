"""Evaluation of trained models: simulated clicks and boxes, scores, baselines, reports."""

from sam_jax.evaluation.report import DatasetReport, EvalReport
from sam_jax.evaluation.run import EvalConfig, Evaluator

__all__ = ["DatasetReport", "EvalConfig", "EvalReport", "Evaluator"]
