"""Tensors that a model uses in two places, a head tied to the embedding above all: which they are, and the flag for it.

What the model in memory does is the fact. Two files state it: lit_binq.json names each tied tensor, and config.json
has the flag `tie_word_embeddings`, from which transformers ties whenever it builds a model. Here the flag follows the
model.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

FLAG = "tie_word_embeddings"
"""The configuration's flag."""


def distinct_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's state with every shared tensor once, and {other name: name kept} for the shared ones."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in model.state_dict().items():
        first = seen.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name) if tensor.numel() else name
        if first == name:
            kept[name] = tensor
        else:
            tied[name] = first
    return kept, tied


def state_ties(model: PreTrainedModel) -> None:
    """Set the flag of the model's configuration, and of its parts', to what the model does.

    A checkpoint with a head of its own may carry the flag all the same; transformers then loads it untied and leaves
    the flag, so that whoever builds the model from its configuration again would tie it.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._tied_weights_keys and hasattr(part.config, FLAG):
            setattr(part.config, FLAG, True)  # without it transformers names no pairs
            pairs = part.get_expanded_tied_weights_keys(all_submodels=False)
            setattr(part.config, FLAG, bool(pairs) and all(_shared(part, a, b) for a, b in pairs.items()))
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _shared(model: PreTrainedModel, a: str, b: str) -> bool:
    try:
        return model.get_parameter_or_buffer(a) is model.get_parameter_or_buffer(b)
    except AttributeError:
        return False


def tie(model: nn.Module, tied: dict[str, str]) -> None:
    """Make exactly the tensors share memory that `tied` ({name: name kept}) names; a tensor untied is left unset.

    Raises:
        ValueError: a tied name is no parameter of the model, or the two differ in shape.
    """
    _, now = distinct_state(model)
    for name in now.keys() - tied.keys():
        _replace(model, name, nn.Parameter(model.get_parameter(name).new_empty(model.get_parameter(name).shape)))
    for name, kept in tied.items():
        try:
            parameter, other = model.get_parameter(kept), model.get_parameter(name)
        except AttributeError:
            raise ValueError(f"tied tensor {name} or {kept} is not in the model") from None
        if parameter.shape != other.shape or kept in tied:
            raise ValueError(f"tensor {name} cannot be tied to {kept}")
        _replace(model, name, parameter)


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
