"""Learning rates over a stage's steps: a cosine for all, and a span outside of which codes stand still.

Legend: s share of the stage's steps that are done, from 0 to 1.

    scales, norms, embeddings   f(s) = final_lr + (1 - final_lr) (1 + cos(pi s)) / 2
    codes                       f(s) where codes_after <= s < codes_until, else 0

A rate of 0 freezes codes exactly: AdamW then adds nothing, and without weight decay nothing else moves them. Gradients
go on being computed and Adam's moments go on averaging, so codes start with a settled direction rather than with the
first batch's; the graphs and the set of trained parameters stay the same throughout. Ours: scales first settle around
the closed form's codes, and in the end settle around the last ones, whose flips they would otherwise still follow.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lit_binq.calibration.stages import CODES, Tuning


def rate_factors(tuning: Tuning, steps: int, groups: Sequence[dict[str, Any]]) -> list[Callable[[int], float]]:
    """Factors of the learning rate by step, one function for each parameter group, as LambdaLR takes them.

    Args:
        tuning: `final_lr`, `codes_after` and `codes_until`.
        steps: optimizer steps of the whole stage; beyond them the last factor stays.
        groups: parameter groups; those marked `kind: codes` (Stage.parameter_groups) hold codes.
    """

    def cosine(step: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        return tuning.final_lr + (1 - tuning.final_lr) * (1 + math.cos(math.pi * done)) / 2

    # Whole steps, so that rounding cannot move a boundary; with codes_until 1 there is none.
    first = math.ceil(tuning.codes_after * steps - 1e-9)
    last = math.ceil(tuning.codes_until * steps - 1e-9) if tuning.codes_until < 1 else math.inf

    def codes(step: int) -> float:
        return cosine(step) if first <= step < last else 0.0

    return [codes if group.get("kind") == CODES else cosine for group in groups]
