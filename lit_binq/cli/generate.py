"""`litbinq generate`: text from an exported model, in an installation of numpy, ONNX Runtime and tokenizers alone.

Its options are therefore read by the standard library; jsonargparse, which reads those of other commands, comes with
the extras.
"""

import argparse
import logging

from lit_binq.utils.command_line import OneLine

log = logging.getLogger("lit_binq")

PROGRAM = "litbinq generate"

SAMPLING = {
    "temperature": (float, "0 takes the likeliest token each time; the higher, the more freely it is chosen"),
    "top_k": (int, "sample among the k likeliest tokens; 0 means all"),
    "top_p": (float, "sample among the likeliest tokens that together have this probability"),
    "repetition_penalty": (float, "above 1, such as 1.2, makes tokens that occurred already less likely"),
}
"""Options that replace what the model's own generation_config.json says."""


class _Parser(OneLine, argparse.ArgumentParser):
    pass


def _flag(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {word!r}, expected true or false")
    return word.lower() == "true"


def _parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        description="Write text with an exported model on ONNX Runtime, as it is decoded; tokens/s at the end. What is "
        f"not given of {', '.join(SAMPLING)} is as the model's own generation_config.json has it; a model that says "
        "nothing takes the likeliest token each time, which small ones end in repeating themselves.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("out", help="folder written by `litbinq export`")
    parser.add_argument("--prompt", default="Once upon a time", help="text to go on from")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="most tokens to write")
    for name, (kind, about) in SAMPLING.items():
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=about)
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument(
        "--chat", type=_flag, nargs="?", const=True, default=False, help="put the prompt into the chat template"
    )
    parser.add_argument("--threads", type=int, default=0, help="threads of ONNX Runtime; 0 lets it choose")
    parser.add_argument(
        "--mode", choices=("lut", "exact"), default="lut", help="int8 tables, fast, or float32 activations"
    )
    return parser


def generate(words: list[str]) -> None:
    """Run the command line `litbinq generate ...`.

    Args:
        words: the command line, `generate` first.

    Raises:
        RunError: the folder or an option cannot be used.
    """
    OneLine.program = PROGRAM
    options = _parser().parse_args(words[1:])

    from lit_binq_onnx.runtime.generate import generate as onnx_generate
    from lit_binq_onnx.runtime.session import OnnxModel
    from lit_binq_onnx.runtime.tokens import load_tokenizer

    model = OnnxModel(options.out, mode=options.mode, threads=options.threads)
    sampling = {name: getattr(options, name) for name in SAMPLING if hasattr(options, name)}
    text = onnx_generate(
        model,
        load_tokenizer(options.out),
        options.prompt,
        options.max_new_tokens,
        **sampling,
        seed=options.seed,
        chat=options.chat,
    )
    if not options.chat:
        print(options.prompt, end="", flush=True)
    for piece in text:
        print(piece, end="", flush=True)
    print(flush=True)
    stats = text.stats
    log.info(
        "%d prompt tokens in %.2f s, then %.1f tokens/s (%s)",
        stats.prompt_tokens,
        stats.prefill_seconds,
        stats.tokens_per_second,
        f"native operators, {options.mode}" if model.native else "operators from the file",
    )
