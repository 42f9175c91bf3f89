"""Shared passages, counted."""

from hypothesis import given
from hypothesis import strategies as st

from lit_binq.data.overlap import shared_sequences

TEXTS = st.lists(st.lists(st.sampled_from("ab"), max_size=12).map(" ".join), max_size=4)


def runs(texts: list[str], words: int) -> set[str]:
    """By definition: every slice of every text."""
    split = [text.split() for text in texts]
    return {" ".join(t[i : i + words]) for t in split for i in range(len(t) - words + 1)}


@given(evaluation=TEXTS, calibration=TEXTS, words=st.integers(1, 4))
def test_by_definition(evaluation, calibration, words):
    wanted = runs(evaluation, words)
    assert shared_sequences(evaluation, calibration, words) == (len(wanted & runs(calibration, words)), len(wanted))


def test_case_does_not_hide_a_passage_and_twelve_words_are_none():
    text = "One two three four five six seven eight nine ten eleven twelve thirteen"
    assert shared_sequences([text], ["say: " + text.lower()]) == (1, 1)
    assert shared_sequences([text.rpartition(" ")[0]], [text]) == (0, 0)
