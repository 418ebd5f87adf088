"""The box protocol: each mask's own tight box, answered once."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from sam_jax.evaluation.baselines import BOX_BASELINES
from sam_jax.evaluation.metrics import mask_iou
from sam_jax.evaluation.protocols.protocol import ORACLE, Outcome, ProtocolContext, ReportTable
from sam_jax.evaluation.targets import TargetBatch, TargetMask
from sam_jax.inference.prompts import Prompt
from sam_jax.visualize import GREEN, Curve


@dataclasses.dataclass(frozen=True)
class BoxProtocol:
    """Boxes: of the three answers, the favourite counts as ``box``, the best as ``box_oracle``."""

    name: str = "box"
    first_click: None = None
    table: ReportTable = ReportTable("Mean IoU (%) from the box")
    row: str = ""

    def run(self, batch: TargetBatch, context: ProtocolContext) -> list[Outcome]:
        """Outcomes of prompting with each mask's own tight box."""
        prompts = {
            target: Prompt(box=target.prompt_box_xyxy(batch.resized_hw(target)))
            for target in batch.targets
        }
        answers = batch.predict(context.predictor, prompts, multimask_output=True)

        def score(target: TargetMask) -> Outcome:
            answer = answers[target]
            num_candidates = answer.iou_predictions.shape[1]
            predictions = [answer.mask(0, candidate) for candidate in range(num_candidates)]
            ious = [mask_iou(prediction, target.ground_truth) for prediction in predictions]
            choice = int(answer.iou_predictions[0].argmax())
            scores = {self.name: ious[choice], f"{self.name}_{ORACLE}": max(ious)}
            return Outcome(target, scores, predictions[choice])

        return list(context.pool.map(score, batch.targets))

    def headline(self, num_clicks: Sequence[int]) -> str:
        """The favourite's measure."""
        return self.name

    def columns(self, measured: Collection[str], num_clicks: Sequence[int]) -> dict[str, str]:
        """Measures of the model, and of what else answers boxes; see ``EvalProtocol``."""
        columns = {"model": self.name, "best of 3": f"{self.name}_{ORACLE}"}
        columns |= {baseline.column: name for name, baseline in BOX_BASELINES.items()}
        return {heading: measure for heading, measure in columns.items() if measure in measured}

    def curves(self, miou: Mapping[str, float], num_clicks: Sequence[int]) -> list[Curve]:
        """A level, since no click is made; see ``EvalProtocol``."""
        if self.name not in miou:
            return []
        return [Curve("box prompt", [], [100 * miou[self.name]], GREEN, "level")]
