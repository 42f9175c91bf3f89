"""The learning rate over a stage's steps."""

import math
from collections.abc import Callable


def cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate by step, from 1 down to 0 along half a cosine, as LambdaLR takes it.

    Args:
        steps: optimizer steps of the whole stage; beyond them it stays 0.
    """
    return lambda step: (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0))) / 2
