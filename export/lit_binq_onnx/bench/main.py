"""`litbinq bench`: how fast, beside what a user would pick instead, and at what perplexity.

    bench ops                    one product by our kernels and by ONNX Runtime's
    bench decode OUT             tokens a second of an exported model, beside other programs
    bench prefill OUT            the same of reading a prompt
    bench shape MODEL            decoding at a model's shapes with random weights, beside ONNX Runtime's 4 bits
    bench perplexity OUT TEXT    how well an exported model predicts a text file

Candidates take turns in one run, so that noise hits all alike; figures are medians with quartiles. A candidate that
is missing is listed with what would bring it.

Each function is a command of lit_binq.cli.main's table. What it measures with is imported by the command that needs it.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from lit_binq.errors import LitBinqError
from lit_binq.utils.files import write_json

SHAPES = "4096x4096,4096x11008,11008x4096,576x1536"


def _names(text: str | None) -> list[str]:
    """Names with commas between."""
    return [name for name in (part.strip() for part in (text or "").split(",")) if name]


def _numbers(option: str, text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise LitBinqError(
            f"{option}: got {text!r}, expected numbers with commas between, like `--{option} 1,2`"
        ) from None


def _write(path: str | None, records: list[Any]) -> None:
    if path is not None:
        write_json(Path(path), [dataclasses.asdict(record) for record in records])


def ops(
    shapes: str = SHAPES,
    M: str = "1,128,512",
    threads: str = "1",
    rounds: int = 15,
    cache_mb: int = 0,
    kernels: str | None = None,
    json: str | None = None,
) -> None:
    """Time one product by our kernels and by ONNX Runtime's: fp32, 8, 4 and 2 bits.

    Weights rotate past the last cache, so that every call reads cold ones, as decoding does. Each candidate's result
    is compared with float64 first. The rate at which this machine reads memory is measured in the same rounds.

    Args:
        shapes: K x N of the weights, with commas between.
        M: rows of activations, with commas between.
        threads: threads inside an operator; several numbers with commas between take turns too.
        rounds: timed runs of each candidate at M = 1; a third of them at other M.
        cache_mb: MiB of last-level cache to rotate past; 0 asks the system.
        kernels: names of the candidates, as the table has them, with commas between; all without it.
        json: file for the figures, a list of records.
    """
    from lit_binq_onnx.bench.memory import cache_bytes
    from lit_binq_onnx.bench.ops import bench_ops, shapes_of
    from lit_binq_onnx.bench.table import ops_tables

    products, counts = shapes_of(shapes, M), _numbers("threads", threads)
    if min(counts) < 1 or cache_mb < 0:
        raise LitBinqError(f"threads and cache_mb: got {threads} and {cache_mb}, expected numbers from 1 and from 0")
    cache = cache_mb << 20 if cache_mb else cache_bytes(max(counts))[0]
    names = kernels.split(",") if kernels is not None else None
    result = bench_ops(products, threads=counts, rounds=rounds, cache=cache, kernels=names)
    _write(json, result.records)
    print(ops_tables(result), end="")


def decode(
    out: str,
    baselines: str | None = None,
    source: str | None = None,
    genai: str | None = None,
    gguf: str | None = None,
    unmodified: bool = True,
    context: int = 128,
    tokens: int = 32,
    rounds: int = 7,
    threads: int = 1,
    json: str | None = None,
) -> None:
    """Tokens a second of an exported model, with its load time, first token and memory, beside other programs.

    Args:
        out: folder written by `litbinq export`.
        baselines: other exported folders, with commas between.
        source: the full-precision model for torch: hub id, folder or .gguf file.
        genai: folder for onnxruntime-genai (`pip install onnxruntime-genai`; its model builder writes one).
        gguf: file for llama.cpp (`pip install llama-cpp-python`).
        unmodified: run the same file without our operator library too.
        context: tokens in the cache when a burst begins.
        tokens: tokens of a burst.
        rounds: timed bursts of each program.
        threads: threads of each program.
        json: file for the figures, a list of records.
    """
    _generation("decode", out, baselines, source, genai, gguf, unmodified, context, tokens, rounds, threads, json)


def prefill(
    out: str,
    baselines: str | None = None,
    source: str | None = None,
    genai: str | None = None,
    gguf: str | None = None,
    unmodified: bool = True,
    tokens: int = 512,
    rounds: int = 5,
    threads: int = 1,
    json: str | None = None,
) -> None:
    """Tokens a second of reading a prompt, beside other programs.

    Args:
        out: folder written by `litbinq export`.
        baselines: other exported folders, with commas between.
        source: the full-precision model for torch: hub id, folder or .gguf file.
        genai: folder for onnxruntime-genai (`pip install onnxruntime-genai`; its model builder writes one).
        gguf: file for llama.cpp (`pip install llama-cpp-python`).
        unmodified: run the same file without our operator library too.
        tokens: tokens of the prompt.
        rounds: timed prompts of each program.
        threads: threads of each program.
        json: file for the figures, a list of records.
    """
    _generation("prefill", out, baselines, source, genai, gguf, unmodified, tokens, tokens, rounds, threads, json)


def _generation(
    job: Any,
    out: str,
    baselines: str | None,
    source: str | None,
    genai: str | None,
    gguf: str | None,
    unmodified: bool,
    context: int,
    tokens: int,
    rounds: int,
    threads: int,
    json: str | None,
) -> None:
    from lit_binq_onnx.bench.generation import Sources, bench_generation
    from lit_binq_onnx.bench.table import generation_table

    sources = Sources(out, _names(baselines), unmodified, source, genai, gguf)
    records = bench_generation(sources, job, context=context, burst=tokens, rounds=rounds, threads=threads)
    _write(json, records)
    print(generation_table(records), end="")


def shape(
    model: str,
    format: Literal["row_column", "grouped"] = "row_column",
    head_bits: Literal[0, 4, 8] = 4,
    block: int = 32,
    layers: int | None = None,
    past: int = 128,
    tokens: int = 16,
    rounds: int = 7,
    threads: int = 1,
    folder: str | None = None,
    keep: bool = False,
    json: str | None = None,
) -> None:
    """Decode at the shapes of a model with random weights, 1-bit beside ONNX Runtime's MatMulNBits of 4 bits.

    Speed depends on shapes and not on values, so no checkpoint is needed. Both models are written first: llama-7b
    takes 5.4 GB of files and, while both are open, about 8 GB of memory.

    Args:
        model: llama-7b, llama-3.2-1b, smollm2-135m, or a folder with the config.json of a LLaMA-like model.
        format: one-bit format of our linears.
        head_bits: bits of both heads, the embedding then has 8; 0 leaves both dense.
        block: weights of the 4-bit model that share a scale: 16, 32, 64, 128 or 256.
        layers: decoder blocks, fewer than the model has for a trial; the table then says so.
        past: tokens in the cache when a burst begins.
        tokens: tokens of a burst.
        rounds: timed bursts of each.
        threads: threads of each.
        folder: where the models are written, and taken away again; the system's temporary folder if not given.
        keep: leave them, in a folder in FOLDER of the shape's name.
        json: file for the figures, a list of records.
    """
    from lit_binq_onnx.bench.shape import Options, bench_shape
    from lit_binq_onnx.bench.shapes import read_shape
    from lit_binq_onnx.bench.table import shape_table

    options = Options(format, head_bits, block, past, tokens, rounds, threads)
    records = bench_shape(read_shape(model, layers), options, folder=folder, keep=keep)
    _write(json, records)
    print(shape_table(records), end="")


def perplexity(
    out: str,
    text: str,
    baselines: str | None = None,
    windows: int = 24,
    length: int = 256,
    mode: Literal["lut", "exact"] = "lut",
    json: str | None = None,
) -> None:
    """Perplexity of exported models on the first windows of a text, and what each is of the first model's.

    Args:
        out: folder written by `litbinq export`.
        text: a text file; tokenized whole, without special tokens.
        baselines: other exported folders of the same tokenizer, with commas between.
        windows: how many windows; fewer where the text is too short.
        length: tokens of a window.
        mode: kernels of our operators, see `litbinq generate`.
        json: file for the figures, a list of records.
    """
    from lit_binq_onnx.bench.table import perplexity_table
    from lit_binq_onnx.bench.texts import text_perplexities

    records = text_perplexities([out, *_names(baselines)], text, windows=windows, length=length, mode=mode)
    _write(json, records)
    print(perplexity_table(records), end="")
