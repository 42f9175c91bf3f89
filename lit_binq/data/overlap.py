"""Do texts share passages? Counted in sequences of words, as is usual for contamination: 13 in a row."""

from collections.abc import Iterable, Iterator

WORDS = 13


def sequences(text: str, words: int = WORDS) -> Iterator[tuple[str, ...]]:
    """Every run of `words` words of a text, lower case, punctuation kept; none of a shorter text."""
    parts = text.lower().split()
    return zip(*(parts[i:] for i in range(words)), strict=False)


def shared_sequences(evaluation: Iterable[str], calibration: Iterable[str], words: int = WORDS) -> tuple[int, int]:
    """How many different sequences of words the evaluation texts have, and how many of them occur in calibration texts.

    Args:
        evaluation: texts, such as decoded windows.
        calibration: texts; only one of them is held at a time.
        words: length of a sequence.

    Returns:
        (shared, all).
    """
    wanted = {s for text in evaluation for s in sequences(text, words)}
    found = {s for text in calibration for s in sequences(text, words) if s in wanted}
    return len(found), len(wanted)
