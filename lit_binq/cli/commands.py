"""Commands that are functions: an option is a parameter, its help the docstring. They import late.

`litbinq bench ...` and `litbinq demo ...` are functions of lit_binq_onnx.bench.main and lit_binq.demo; the table of all
commands is in lit_binq.cli.main.
"""

import logging
from pathlib import Path
from typing import Literal

from lit_binq.errors import LitBinqError

log = logging.getLogger("lit_binq")


def compare(config: str, only: list[str] | str | None = None) -> None:
    """A table of methods, each row a fit: true bits, perplexities and their ratio to full precision, seconds, memory.

    Rows that are done are not run again.

    Args:
        config: YAML file that says what to compare, see below.
        only: the row to run, or several as [one, two]; the table shows all there are.
    """
    from lit_binq.compare.runner import compare as run

    table, failed = run(config, [only] if isinstance(only, str) else only)
    print(table, end="")
    if failed:
        raise LitBinqError(
            f"no result for {', '.join(map(repr, failed))}: the reasons stand under the table; the same command tries "
            "again what is not done"
        )


def report(run: str, out: str | None = None, baselines: list[str] | str | None = None) -> None:
    """Draw the diagnostics of a run: PNG pictures and one page that needs nothing else.

    The fit must have measured something: option `model.diagnostics.windows`.

    Args:
        run: folder of a run, or its packed folder.
        out: folder to write; RUN/report if not given.
        baselines: other runs to draw on the same axes: FOLDER, or several with commas between.
    """
    from lit_binq.report.page import report as draw

    draw(run, out, baselines)


def export(
    packed: str,
    out: str,
    check: bool = True,
    head_bits: Literal[0, 4, 8] = 0,
    head_block: Literal[16, 32, 64, 128] | None = None,
    head_text: str | None = None,
    fused: Literal["auto", "off"] = "auto",
    target: Literal["ort", "genai"] = "ort",
) -> None:
    """Export a packed folder to ONNX with packed-bit operators.

    The folder OUT gets model.onnx with its data file, the tokenizer, and a record of what was exported. It runs on
    ONNX Runtime with our operator library, and without it on the function bodies inside the file.

    Args:
        packed: folder written by `litbinq fit`.
        out: folder to write.
        check: compare prefill, decode and left-padded batches with torch; a failed check leaves nothing behind.
        head_bits: round the head, which much of a small model's time goes into, to 4 or 8 bits, and the embedding to 8;
            0 leaves both.
        head_block: how many weights of the head share a scale: 32 if not given, or 16 where the width demands it.
        head_text: a text file; a head of 4 bits errs less on texts like it. Random tokens if not given.
        fused: `auto` adds model_fused.onnx, faster, for LLaMA-like models (LLaMA, Mistral, Qwen 2 and 3) once its
            logits equal torch's; `off` writes the traced graph only.
        target: `genai` also writes what onnxruntime-genai needs to run the folder: genai_config.json and our library.
    """
    from lit_binq.hub.save_load import load_packed
    from lit_binq.utils.places import require_folder
    from lit_binq_onnx.build import export as onnx_export

    require_folder(Path(out), "out", onnx_export.FACTS)  # before a large model is loaded
    model, tokenizer = load_packed(packed)
    onnx_export.export_onnx(
        model,
        tokenizer,
        out,
        packed=packed,
        check=check,
        head_bits=head_bits,
        head_block=head_block,
        head_text=head_text,
        fused=fused,
        target=target,
    )


def check(out: str, packed: str | None = None) -> None:
    """Compare an exported model with the packed torch model it was made from.

    Args:
        out: folder written by `litbinq export`.
        packed: the packed folder, if it is no longer where it was at export.
    """
    from lit_binq_onnx.build.check import check_onnx

    print(check_onnx(out, packed=packed))
