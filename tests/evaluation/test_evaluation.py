"""What `litbinq validate` refuses to call a result."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file

from exporting import packed_model
from fitting import make_data, make_trainer
from lit_binq.errors import LitBinqError
from lit_binq.evaluation.module import PackedEvaluation
from lit_binq.hub.save_load import WEIGHTS, save_packed


@pytest.mark.parametrize("value", [float("nan"), 1e4])
def test_a_perplexity_that_is_no_number_is_refused(
    value: float, make_source: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """In the results it would be null, which is read as infinite again; a finite damage gives a figure."""
    source, packed = make_source("llama"), tmp_path / "packed"
    save_packed(packed_model("llama"), byte_tokenizer(), packed, facts={})
    tensors = load_file(packed / WEIGHTS)
    tensors["model.norm.weight"][3] = value
    save_file(tensors, packed / WEIGHTS, metadata={"format": "pt"})
    module = PackedEvaluation(str(source), str(packed))
    if torch.isfinite(torch.tensor(value)):
        make_trainer().validate(module, make_data(source, text_file), verbose=False)
        assert module.results["text"]["packed"] > 1
        return
    with pytest.raises(LitBinqError, match=r"perplexity of .*packed' on text: got NaN, .* option `packed`") as caught:
        make_trainer().validate(module, make_data(source, text_file), verbose=False)
    assert "\n" not in str(caught.value)
