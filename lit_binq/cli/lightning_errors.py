"""Errors of Lightning's parts that a user chose: a callback, a logger, a profiler, a plugin that cannot work here.

They come as whatever the part raises, from a missing package to an attribute that is not there, often wrapped several
times. One line is made of what began it.
"""

import re
import traceback
from collections.abc import Iterator

from lit_binq.errors import LitBinqError

_PARTS = re.compile(
    r"/(?:lightning|pytorch_lightning)/(?:pytorch/|fabric/)?(callbacks|loggers|profilers|plugins|accelerators)/"
)
_OPTIONS = {
    "callbacks": "trainer.callbacks",
    "loggers": "trainer.logger",
    "profilers": "trainer.profiler",
    "plugins": "trainer.precision or trainer.plugins",
    "accelerators": "trainer.accelerator",
}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__  # type: ignore[assignment]


def one_line(option: str, error: Exception) -> LitBinqError:
    """What began an error, as an error of an option. An error that is ours already stays as it is."""
    chain = list(_chain(error))
    ours = [e for e in chain if isinstance(e, LitBinqError)]
    text = " ".join(str(chain[-1]).split()) or type(chain[-1]).__name__
    return ours[0] if ours else LitBinqError(f"{option}: {text}")


def of_chosen_part(error: Exception) -> LitBinqError | None:
    """The line about an error that a callback, logger, profiler or plugin raised by itself; None for other errors."""
    for cause in list(_chain(error))[::-1]:
        files = [frame.filename.replace("\\", "/") for frame in traceback.extract_tb(cause.__traceback__)]
        ours = [i for i, name in enumerate(files) if "/lit_binq/" in name or "/lit_binq_onnx/" in name]
        parts = [found[1] for name in files[ours[-1] + 1 if ours else 0 :] if (found := _PARTS.search(name))]
        if parts:
            return one_line(_OPTIONS[parts[-1]], error)
    return None
