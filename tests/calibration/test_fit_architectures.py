"""Whole fits of unusual architectures; what was written is read by plain transformers, dequantized by the test."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import architectures
from dequantized import dense_model
from fitting import Remember, T, fit
from lit_binq.calibration.preflight.checks import PreflightOptions
from lit_binq.hub.save_load import load_packed


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", [k for k in architectures.CONFIGS if k != "rwkv"])
def test_the_fit_is_what_transformers_computes_with_its_weights(
    kind: str, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    source, packed = tmp_path / "model", tmp_path / "packed"
    architectures.make(kind).save_pretrained(source)
    tokenizer.save_pretrained(source)
    remember = Remember()
    fit(source, text_file, packed, callbacks=[remember], preflight=PreflightOptions(torch_only=True))
    reloaded, dense = load_packed(packed)[0], dense_model(packed)
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=torch.arange(24).reshape(1, -1)).logits, remember.logits)
        windows = torch.randint(256, (3, T), generator=torch.Generator().manual_seed(0))
        mine, expected = (m(input_ids=windows, use_cache=False).logits for m in (reloaded, dense))
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
