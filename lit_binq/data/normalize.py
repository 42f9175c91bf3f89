"""Other styles of the same text: what a calibration on clean prose alone never sees.

A model quantized on capitalised, punctuated text can be far worse on text without capitals or punctuation than its
full-precision source is: a small model at one bit has little left of the skill to adapt to a style in context. A share
of calibration text in another style keeps it.
"""

import re
from collections import Counter
from typing import Literal

Normalization = Literal["verbatim", "lower", "treebank"]

VOCABULARY = 10_000
"""Words that keep their spelling in the style `treebank`; the usual language-modelling version has as many."""

# Not behind Mr. or an initial.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<![A-Z][a-z]\.)(?<!Mrs\.)(?<!\b[A-Z]\.)[\"')]*\s+(?=[A-Z\"'(])")
_WORD = re.compile(
    r"\d[\d,./-]*"  # numbers
    r"|(?:[a-z]\.){2,}"  # u.s.
    r"|(?:mr|mrs|ms|dr|st|co|corp|inc|jr|no|vs)\."
    r"|n't\b|'(?:s|re|ve|ll|d|m)\b"
    r"|[^\W\d_]+?(?=n't\b)|[^\W\d_]+(?:-[^\W\d_]+)*"
    r"|[$%&]"
)


def normalize(text: str, normalization: Normalization) -> str:
    """The text in another style.

    Args:
        text: any text.
        normalization: `verbatim` changes nothing; `lower` takes lower case; `treebank` imitates how the Penn Treebank
            comes as a language-modelling corpus: one sentence a line with a space at both ends, lower case, no
            punctuation, contractions split (`does n't`), numbers as `N`, all but the most frequent words as `<unk>`.
    """
    if normalization == "lower":
        return text.lower()
    if normalization == "verbatim":
        return text
    lines = [line for paragraph in text.splitlines() for line in _SENTENCE_END.split(paragraph)]
    sentences = [words for line in lines if (words := _WORD.findall(line.lower().replace("’", "'")))]
    counts = Counter(word for words in sentences for word in words)
    known = {word for word, _ in counts.most_common(VOCABULARY)}
    return "".join(f" {' '.join(_token(word, known) for word in words)} \n" for words in sentences)


def _token(word: str, known: set[str]) -> str:
    if word[0].isdigit():
        return "N"
    return word if word in known else "<unk>"
