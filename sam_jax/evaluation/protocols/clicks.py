"""The click protocols: one click after another, each where the last answer is most wrong."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from sam_jax.evaluation.baselines import DISK_BASELINE
from sam_jax.evaluation.clicks import Click, FirstClick, correction_click, first_click
from sam_jax.evaluation.metrics import mask_iou
from sam_jax.evaluation.protocols.protocol import ORACLE, Outcome, ProtocolContext, ReportTable
from sam_jax.evaluation.targets import TargetBatch, TargetMask
from sam_jax.inference.predictor import Prediction
from sam_jax.inference.prompts import Prompt
from sam_jax.visualize import BLUE, ORANGE, Color, Curve


@dataclasses.dataclass(frozen=True)
class ClickProtocol:
    """Clicks, scored after some numbers of them as ``{name}_{number}``.

    The first click is answered with three masks of which the model's favourite counts, and the
    best as ``{name}_1_oracle``; every later one with the single mask for all clicks so far. A user
    who has nothing left to correct keeps the last score.

    Attributes:
      name: in configs and measures.
      first_click: deepest inside the mask, or anywhere in it.
      row: in the table.
      curve: in the legend of the diagram.
      color: of the curve.
      feeds_logits: whether from the second click on the model also gets the logits of its last
        answer, as it does in training; the paper's text on its evaluation does not say.

    Source: Kirillov et al. 2023, section 7.1 and appendix D.1.
    """

    name: str
    first_click: FirstClick
    row: str
    curve: str
    color: Color
    feeds_logits: bool = True
    table: ReportTable = ReportTable("Mean IoU (%) by number of clicks", "first click")

    def run(self, batch: TargetBatch, context: ProtocolContext) -> list[Outcome]:
        """Outcomes of clicking for each mask until it is found, or clicks are used up."""

        def new_user(target: TargetMask) -> _User:
            key = f"{context.seed}/{target.key}"
            return _User(target, first_click(self.first_click, target.ground_truth, key))

        users = list(context.pool.map(new_user, batch.targets))
        active = users
        for step in range(1, context.num_clicks[-1] + 1):
            answers = batch.predict(
                context.predictor,
                {user.target: user.prompt(self.feeds_logits) for user in active},
                multimask_output=step == 1,
            )
            is_last = step == context.num_clicks[-1]

            def look(user: _User, answers=answers, is_last=is_last) -> None:
                user.look(answers[user.target], is_last)

            list(context.pool.map(look, active))
            active = [user for user in active if len(user.clicks) > step]
            if not active:
                break
        return [user.outcome(self.name, context.num_clicks) for user in users]

    def headline(self, num_clicks: Sequence[int]) -> str:
        """The measure after the last click."""
        return f"{self.name}_{num_clicks[-1]}"

    def columns(self, measured: Collection[str], num_clicks: Sequence[int]) -> dict[str, str]:
        """Measures by number of clicks, the oracle's and the disk's; see ``EvalProtocol``."""
        if self._oracle not in measured:
            return {}
        columns = [(str(n), f"{self.name}_{n}") for n in num_clicks]
        columns.insert(1, ("best of 3", self._oracle))
        columns.append(("disk", f"{DISK_BASELINE}_{self.first_click}"))
        return {heading: measure for heading, measure in columns if measure in measured}

    def curves(self, miou: Mapping[str, float], num_clicks: Sequence[int]) -> list[Curve]:
        """The curve over clicks, and a mark for the oracle; see ``EvalProtocol``."""
        if self._oracle not in miou:
            return []
        heights = [100 * miou[f"{self.name}_{n}"] for n in num_clicks]
        curves = [Curve(self.curve, num_clicks, heights, self.color)]
        # Without logits fed back, the first click's answers are no others.
        if self.feeds_logits and 1 in num_clicks:
            oracle = 100 * miou[self._oracle]
            curves.append(Curve("best of three masks", [1], [oracle], self.color, "marks"))
        return curves

    @property
    def _oracle(self) -> str:
        return f"{self.name}_1_{ORACLE}"


CLICK_PROTOCOLS = (
    ClickProtocol("center", "center", "centre", "first click at the centre", BLUE),
    ClickProtocol("random", "random", "random", "random first click", ORANGE),
    ClickProtocol(
        "center_points_only",
        "center",
        "centre, points only",
        "centre, points only",
        (120, 180, 255),
        feeds_logits=False,
    ),
    ClickProtocol(
        "random_points_only",
        "random",
        "random, points only",
        "random, points only",
        (255, 200, 120),
        feeds_logits=False,
    ),
)


class _User:
    """Someone who has one mask in mind and clicks until the model has it."""

    def __init__(self, target: TargetMask, first: Click):
        self.target = target
        self.clicks = [first]
        self._ious: list[float] = []

    def prompt(self, feeds_logits: bool) -> Prompt:
        """All clicks so far and, after the first, the logits of the last answer if wanted."""
        return Prompt(
            points=[(click.x, click.y) for click in self.clicks],
            labels=[int(click.is_foreground) for click in self.clicks],
            mask=self._logits if feeds_logits and self._ious else None,
        )

    def look(self, answer: Prediction, is_last: bool) -> None:
        """Scores an answer and, unless it is the last, finds where to click next."""
        ground_truth = self.target.ground_truth
        num_candidates = answer.iou_predictions.shape[1]
        predictions = [answer.mask(0, candidate) for candidate in range(num_candidates)]
        ious = [mask_iou(prediction, ground_truth) for prediction in predictions]
        choice = int(answer.iou_predictions[0].argmax())
        if not self._ious:
            self._oracle = max(ious)
        self._ious.append(ious[choice])
        self._prediction = predictions[choice]
        self._logits = answer.low_res_logits[0, choice]
        if not is_last:
            click = correction_click(ground_truth, self._prediction, self.clicks)
            if click is not None:
                self.clicks.append(click)

    def outcome(self, name: str, num_clicks: Sequence[int]) -> Outcome:
        ious = {f"{name}_1_{ORACLE}": self._oracle}
        for number in num_clicks:
            ious[f"{name}_{number}"] = self._ious[min(number, len(self._ious)) - 1]
        return Outcome(self.target, ious, self._prediction, tuple(self.clicks))
