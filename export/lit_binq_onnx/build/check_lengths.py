"""Which lengths of a text matter for a model, and at what cost a check can cross them.

    part      a prompt is read in parts of `rows.PREFILL` tokens
    window    a token sees so many tokens (sliding and chunked attention)
    angles    longest text that the rotary embedding was trained on, where it is scaled

A border that a text of the affordable length reaches is crossed by really reading one, in one pass and in parts, and by
decoding token by token. One beyond it is crossed with a cache of random content: keys and values drawn from real ones.
Angles beyond the memory for that are crossed by their positions alone, with a short cache. A window beyond it is
refused: nothing would have shown that the export respects it.

Knows configurations; nothing of ONNX.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedModel

from lit_binq.errors import LitBinqError
from lit_binq.formats import PackedLinear
from lit_binq.models.rotary import longest_text, rope_parameters
from lit_binq_onnx.runtime.rows import PREFILL

WORK = 10**11
"""Weights times tokens that a text of a check may cost in one run: a few seconds."""

MOST_TOKENS = 4096
"""Of a text that is really read: attention grows with its square."""

LOGITS_BYTES = 600 << 20
"""Most bytes of the logits of one pass."""

CACHE_BYTES = 2 << 30
"""Most bytes of a cache of random content; there are up to four of them at a time."""

BEFORE, AFTER = 3, 5
"""Tokens before a border at which decoding across it begins, and how many come after the border at least."""

SHORT = 48
"""Tokens of a text that need not reach anything."""


@dataclass(frozen=True)
class Border:
    """A length at which something changes. kind: see this file's head; at: the longest text before the change."""

    kind: Literal["part", "window", "angles"]
    at: int

    def __str__(self) -> str:
        return {"part": "parts of a prompt", "window": "window", "angles": "first angles"}[self.kind] + f" ({self.at})"


@dataclass
class Plan:
    """How borders are crossed.

    Attributes:
        tokens: of the text that is read in parts and token by token.
        whole: of the one that is read in one pass beside a short one.
        read: borders crossed by it.
        cached: crossed with a cache of random content.
        by_position: crossed by positions alone.
    """

    tokens: int
    whole: int
    read: list[Border] = field(default_factory=list)
    cached: list[Border] = field(default_factory=list)
    by_position: list[Border] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Lines for the report."""
        ways = (
            (self.read, "crossed by reading a text"),
            (self.cached, "crossed with a cache of random content"),
            (self.by_position, "crossed by positions alone, with a short cache"),
        )
        return [f"lengths: {', '.join(map(str, borders))} {way}" for borders, way in ways if borders]


def borders(config: Any) -> list[Border]:
    """Every length that matters for a model and that it has positions for, the shortest first."""
    text = config.get_text_config(decoder=True)
    found = {Border("part", PREFILL)}
    for name in ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"):
        window = getattr(text, name, None)
        if isinstance(window, int) and not isinstance(window, bool) and window > 0:
            found.add(Border("window", window))
    for _, parameters in rope_parameters(config):
        kind = parameters.get("rope_type", "default")
        original = parameters.get("original_max_position_embeddings")
        if kind == "dynamic":
            original = text.max_position_embeddings
        if kind != "default" and original:
            found.add(Border("angles", int(original)))
    limit = longest_text(text)
    within = [b for b in found if limit is None or b.at + AFTER <= limit]
    return sorted(within, key=lambda b: (b.at, b.kind))


def weights_per_token(model: PreTrainedModel) -> int:
    """Weights that a token is multiplied with: packed linears and the head."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    head = getattr(model.get_output_embeddings(), "weight", None)
    return packed + (0 if head is None else head.numel())


def make_plan(model: PreTrainedModel, shapes: list[tuple[int, int]]) -> Plan:
    """How to cross a model's borders.

    Args:
        model: the packed model.
        shapes: (heads, head_dim) of every cache tensor.

    Raises:
        LitBinqError: a window that no affordable cache can cross.
    """
    config = model.config.get_text_config(decoder=True)
    limit = longest_text(config) or MOST_TOKENS
    affordable = min(WORK // weights_per_token(model), MOST_TOKENS, limit)
    in_one_pass = min(affordable, LOGITS_BYTES // (2 * 4 * config.vocab_size))
    a_token = 4 * sum(heads * size for heads, size in shapes)
    plan = Plan(tokens=0, whole=min(SHORT, limit, max(in_one_pass, 8)))
    for border in borders(config):
        end = border.at + AFTER
        if end <= affordable:
            plan.read.append(border)
            plan.tokens = max(plan.tokens, end)
            plan.whole = max(plan.whole, end) if end <= in_one_pass else plan.whole
        elif end * a_token <= CACHE_BYTES:
            plan.cached.append(border)
        elif border.kind == "angles":
            plan.by_position.append(border)
        else:
            raise LitBinqError(
                f"check: the {border} of {type(model).__name__} cannot be crossed, its cache has "
                f"{end * a_token / 2**30:.1f} GiB, expected at most {CACHE_BYTES / 2**30:.0f}: export with "
                "`--check false`"
            )
    return plan


def parts(tokens: int, crossed: list[Border]) -> list[tuple[int, int]]:
    """How a text is read: in parts as prompts are, token by token around every border.

    Returns:
        (first, end) of every pass; together they are 0 to tokens.
    """
    single: set[int] = set()
    for border in crossed:
        if border.kind != "part":
            single |= set(range(max(border.at - BEFORE, 1), min(border.at + AFTER - 1, tokens)))
        elif tokens > border.at + 1:
            single.add(border.at + 1)
    passes: list[tuple[int, int]] = []
    start = 0
    while start < tokens:
        end = start + 1
        while start not in single and end < tokens and end % PREFILL and end not in single:
            end += 1
        passes.append((start, end))
        start = end
    return passes
