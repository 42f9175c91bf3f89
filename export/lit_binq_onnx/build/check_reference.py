"""What torch computes in every case of a check, and how sensitive the model is to small errors.

Legend: b rows, n tokens of a text, V vocabulary; l torch's logits.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lit_binq.formats import PackedLinear
from lit_binq.formats.packing import weights_kept
from lit_binq.hub.bits import activation_bits
from lit_binq.models.kv_cache import kv_bits
from lit_binq.models.rotary import dependent_modules
from lit_binq_onnx.build.check_lengths import AFTER, BEFORE, Border, Plan, make_plan, parts
from lit_binq_onnx.build.fused import rotary_table
from lit_binq_onnx.build.trace import flat_cache
from lit_binq_onnx.runtime.session import positions

DECODE_STEPS = 4

LUT_ERROR = 7e-3
"""Relative error of one product with activations in int8 tables, as measured against float64."""

RANDOM_PAST = 16
"""Tokens of a cache where only positions are to lie far out."""

_TEXT = "The export is right when both programs continue this sentence in the same way, token by token."


@dataclass
class Step:
    """One pass of torch.

    Attributes:
        ids, mask, positions: what went in: (b, s), (b, p + s), (b, s) int64.
        compared: (b, s), at which new tokens logits are compared; false at padding.
        logits: (count, V) float32, torch's there.
        cache: keys and values after it, (b, heads, tokens, head_dim) from the token `first` on; empty: not compared.
        first: see `cache`.
    """

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    compared: np.ndarray
    logits: np.ndarray
    cache: list[np.ndarray]
    first: int = 0


@dataclass
class Run:
    """Passes one after the other. past: keys and values before the first, each (b, heads, p, head_dim); None: none."""

    steps: list[Step]
    past: list[np.ndarray] | None = None


@dataclass
class Reference:
    """What torch computes in every case; see `torch_reference`.

    Attributes:
        generic, fused: by case of the two graphs.
        lengths: names of the cases that cross a border of the model's lengths: they are no matter of the LUT mode.
        bound: largest relative RMS error where the model rounds values to a few levels; None where it does not, and
            results must be equal.
        sensitivity: relative RMS change of the logits where every product errs by `LUT_ERROR`.
        notes: what was crossed how.
        angles: cos and sin (positions, d / 2) that the fused graph must hold, where no case of it crosses them.
    """

    generic: dict[str, Run]
    fused: dict[str, Run]
    lengths: set[str] = field(default_factory=set)
    bound: float | None = None
    sensitivity: float = 0.0
    notes: list[str] = field(default_factory=list)
    angles: dict[str, np.ndarray] = field(default_factory=dict)


def relative_rms(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b| of logits (positions, V), each position's mean taken out."""
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


@torch.no_grad()
def torch_run(
    model: PreTrainedModel,
    ids: np.ndarray,
    passes: list[tuple[int, int]],
    *,
    mask: np.ndarray | None = None,
    past: list[np.ndarray] | None = None,
    start: int = 0,
    sparse: bool = False,
) -> Run:
    """A text read pass by pass in torch.

    Args:
        model: the packed model.
        ids: (b, n) int64.
        passes: (first, end) of each; together 0 to n.
        mask: (b, n), 0 at padding on the left; None: no padding.
        past: cache before the text, p tokens.
        start: position of the first token, where it is not p.
        sparse: compare some of a long pass's logits, and of the cache what is new.
    """
    mask = np.ones_like(ids) if mask is None else mask
    before = 0 if past is None else past[0].shape[2]
    where = positions(mask) + (start or before)
    full = np.concatenate([np.ones((len(ids), before), mask.dtype), mask], axis=1)
    if dependent_modules(model):  # NTK embeddings remember the longest text that they have seen, until a short one
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    cache, steps = DynamicCache(), []
    for i in range(0, len(past or ()), 2):
        assert past is not None
        cache.update(torch.from_numpy(past[i]), torch.from_numpy(past[i + 1]), i // 2)
    for first, end in passes:
        now = full[:, : before + end]
        out = model(
            input_ids=torch.from_numpy(ids[:, first:end]),
            attention_mask=torch.from_numpy(now),
            position_ids=torch.from_numpy(where[:, first:end]),
            past_key_values=cache,
            use_cache=True,
        )
        compared = mask[:, first:end].astype(bool)
        if sparse:
            compared = compared & _some(end - first)
        kept_from = before + first if sparse else 0
        kept = [t[:, :, kept_from:].numpy().copy() for t in flat_cache(cache)]
        logits = out.logits[torch.from_numpy(compared)].float().numpy()
        steps.append(Step(ids[:, first:end], now, where[:, first:end], compared, logits, kept, kept_from))
    return Run(steps, past)


def _some(tokens: int) -> np.ndarray:
    """(tokens,) bool: the last few of a pass, and some before."""
    numbers = np.arange(tokens)
    return (numbers >= tokens - 8) | (numbers % 32 == 0)


def ragged_run(model: PreTrainedModel, rows: list[np.ndarray], decode: int) -> Run:
    """Rows of different lengths padded on the right, then one token each: what torch computes for each row alone.

    Args:
        model: the packed model.
        rows: (n_i,) int64 each; the last `decode` tokens of each are decoded.
        decode: steps after the prompts.
    """
    alone = []
    for row in rows:
        n = len(row) - decode
        alone.append(torch_run(model, row[None], [(0, n), *((n + i, n + i + 1) for i in range(decode))], sparse=True))
    prompts = np.array([len(row) - decode for row in rows])
    steps = []
    for j in range(decode + 1):
        lengths = prompts + j
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        if j == 0:
            ids, compared = np.zeros_like(mask), np.zeros(mask.shape, bool)
            for i, row in enumerate(rows):
                ids[i, : prompts[i]] = row[: prompts[i]]
                compared[i, : prompts[i]] = alone[i].steps[0].compared[0]
            where = positions(mask)
        else:
            ids = np.array([[row[n - 1]] for row, n in zip(rows, lengths, strict=True)])
            compared, where = np.ones((len(rows), 1), bool), lengths[:, None] - 1
        logits = np.concatenate([run.steps[j].logits for run in alone])
        steps.append(Step(ids, mask, where, compared, logits, []))
    return Run(steps)


def _prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of token numbers (2, n) int64 and a mask (2, n) that pads the first row on the left."""
    size = model.config.get_text_config(decoder=True).vocab_size
    ids: list[int] = [] if tokenizer is None else list(tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    if len(ids) < 8 or max(ids) >= size:
        ids = np.random.default_rng(0).integers(0, size, 24).tolist()
    ids = ids[:24]
    rows = np.array([ids, ids[::-1]], np.int64)
    mask = np.ones_like(rows)
    mask[0, : len(ids) // 3] = 0
    return rows, mask


def _random_past(kept: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """A cache of `tokens` tokens (1, heads, tokens, head_dim), each drawn from those of a real one."""
    chosen = np.random.default_rng(1).integers(0, kept[0].shape[2], tokens)
    return [np.ascontiguousarray(t[:1, :, chosen]) for t in kept]


def _length_runs(model: PreTrainedModel, plan: Plan, kept: list[np.ndarray], *, fused: bool) -> Reference:
    """The cases that cross borders. kept: a real cache of a short text."""
    generic, both = {}, {}
    size = model.config.get_text_config(decoder=True).vocab_size
    text = np.random.default_rng(2).integers(0, size, (2, max(plan.tokens, plan.whole)))
    n, short = plan.whole, min(12, plan.whole // 2)
    mask = np.ones((2, n), np.int64)
    mask[1, : n - short] = 0
    generic["long beside short"] = torch_run(
        model, text[:, :n], [(0, n - 2), (n - 2, n - 1), (n - 1, n)], mask=mask, sparse=True
    )
    if plan.read:
        both["read in parts"] = torch_run(model, text[:1], parts(plan.tokens, plan.read), sparse=True)

    def across(border: Border, past: list[np.ndarray], start: int = 0) -> Run:
        decoded = [(i, i + 1) for i in range(1, 1 + BEFORE)]
        passes = (
            [(0, 1), *decoded, (1 + BEFORE, BEFORE + AFTER)] if start or border.kind != "part" else [(0, 6), (6, 8)]
        )
        return torch_run(model, text[:1, : BEFORE + AFTER], passes, past=past, start=start, sparse=True)

    for border in plan.cached:
        both[f"beyond {border.at}"] = across(border, _random_past(kept, border.at - BEFORE))
    for border in plan.by_position:
        generic[f"position {border.at}"] = across(border, _random_past(kept, RANDOM_PAST), border.at - BEFORE)
    own: dict[str, Run] = {}
    if fused:
        own = {f"fused {name}": run for name, run in both.items()}
        own["fused long beside short"] = ragged_run(model, [text[0, :n], text[1, :short]], 2)
    angles = rotary_table(model) if fused and plan.by_position else {}
    return Reference(generic | both, own, {*generic, *both, *own}, notes=plan.notes(), angles=angles)


@weights_kept()
def torch_reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, fused: bool) -> Reference:
    """Run every case in torch.

    Args:
        model: the packed model, its tables rounded where the export's are (`head.rounded_tables`).
        tokenizer: to compare on text rather than on random tokens.
        fused: whether there is a fused graph to compare.

    Raises:
        LitBinqError: a border of the model's lengths that cannot be crossed, see `check_lengths.make_plan`.
    """
    ids, mask = _prompts(model, tokenizer)
    n = ids.shape[1]
    one = ids[1:]
    steps = [(0, 5), *((i, i + 1) for i in range(5, 5 + DECODE_STEPS))]
    generic = {
        "prefill": torch_run(model, one, [(0, n)]),
        "decode": torch_run(model, one[:, : 5 + DECODE_STEPS], steps),
        "left-padded": torch_run(model, ids, [(0, n - 2), (n - 2, n - 1), (n - 1, n)], mask=mask),
    }
    kept = generic["prefill"].steps[0].cache
    shapes = [(t.shape[1], t.shape[3]) for t in kept]
    found = _length_runs(model, make_plan(model, shapes), kept, fused=fused)
    own = {}
    if fused:
        batch = torch_run(model, ids[:, :9], [(0, 7), (7, 8), (8, 9)])
        own = {"fused prefill": generic["prefill"], "fused decode": generic["decode"], "fused batch": batch}
    return Reference(
        generic | found.generic,
        own | found.fused,
        found.lengths,
        _rounding_bound(model, one),
        sensitivity(model, one),
        found.notes,
        found.angles,
    )


ROUNDED_TOLERANCE = 0.2
"""Smallest `Reference.bound`."""

ROUNDED_FACTOR = 3.0
"""How many times the relative RMS error of torch against itself a model with rounded inputs may have.

Measured on SmolLM2-135M with inputs of 4 bits: torch against itself 0.21, ONNX Runtime against torch 0.22.
"""


@torch.no_grad()
def _rounding_bound(model: PreTrainedModel, ids: np.ndarray) -> float | None:
    """See `Reference.bound`; ids (1, n)."""
    if activation_bits(model) == 16 and not kv_bits(model):
        return None
    embedded = model.get_input_embeddings()(torch.from_numpy(ids))
    noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0))
    a, b = (model(inputs_embeds=x).logits[0].double().numpy() for x in (embedded, embedded * (1 + 1e-7 * noise)))
    return max(ROUNDED_TOLERANCE, ROUNDED_FACTOR * relative_rms(a, b))


@torch.no_grad()
def sensitivity(model: PreTrainedModel, ids: np.ndarray, error: float = LUT_ERROR) -> float:
    """How far logits move where every packed product and the head err a little; the same number in every call.

    Each output row y of a product is moved by Gaussian noise of `error` times its root mean square, the size of error
    that int8 tables cause. The larger one of two draws.

    Args:
        model: the packed model.
        ids: (1, n) int64.
        error: relative size of the noise.

    Returns:
        Relative RMS change of the logits, each position's mean taken out.
    """
    generator = torch.Generator()

    def move(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> Tensor:
        size = y.float().square().mean(-1, keepdim=True).sqrt()
        return y + (error * size * torch.randn(y.shape, generator=generator)).to(y.dtype)

    tokens = torch.from_numpy(ids)
    plain = model(input_ids=tokens).logits[0].double().numpy()
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, PackedLinear) or m is head]
    handles = [layer.register_forward_hook(move) for layer in layers]
    try:
        moved = []
        for seed in (0, 1):
            generator.manual_seed(seed)
            moved.append(relative_rms(model(input_ids=tokens).logits[0].double().numpy(), plain))
    finally:
        for handle in handles:
            handle.remove()
    return max(moved)
