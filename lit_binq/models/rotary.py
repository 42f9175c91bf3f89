"""What configurations and modules say of rotary embeddings: which angles depend on how long the text is.

    longrope   one set of frequencies up to `original_max_position_embeddings`, another beyond it
    dynamic    beyond `max_position_embeddings` frequencies that change with every token (NTK)

Legend: n the largest position of a pass and one: the length of its longest text so far.
"""

from typing import Any

from torch import nn

DEPENDENT = ("longrope", "dynamic")
"""Kinds whose angles depend on n. All others give a position the same angles in every text."""


def rope_parameters(config: Any) -> list[tuple[str | None, dict[str, Any]]]:
    """What a configuration says of its rotary embeddings: (kind of block or None, parameters)."""
    config = config.get_text_config(decoder=True)
    found = getattr(config, "rope_parameters", None) or {}
    if found and all(isinstance(value, dict) for value in found.values()):
        return list(found.items())
    return [(None, found)] if found else []


def length_dependent(config: Any) -> tuple[str, int] | None:
    """(kind, longest text that has the first angles) of a model whose angles depend on n, else None."""
    text = config.get_text_config(decoder=True)
    for _, parameters in rope_parameters(config):
        kind = str(parameters.get("rope_type", "default"))
        if kind in DEPENDENT:
            original = parameters.get("original_max_position_embeddings") if kind == "longrope" else None
            return kind, int(original or text.max_position_embeddings)
    return None


def longest_text(config: Any) -> int | None:
    """Most tokens a model has positions for; None: no limit is known. NTK stretches what the configuration names."""
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    factors = [float(p["factor"]) for _, p in rope_parameters(text) if p.get("rope_type") == "dynamic"]
    return None if limit is None else int(limit * max([1.0, *factors]))


def angle_kinds(module: nn.Module) -> dict[str | None, str]:
    """Kind of the angles that a rotary module makes, by kind of block; None where all blocks have the same."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return dict(kinds)
    return {None: kinds} if isinstance(kinds, str) else {}


def dependent_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Rotary modules by name whose angles depend on n."""
    found = {}
    for name, module in model.named_modules():
        if any(kind in DEPENDENT for kind in angle_kinds(module).values()):
            found[name] = module
    return found
