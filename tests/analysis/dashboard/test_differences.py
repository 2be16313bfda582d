"""Word differences: nothing is lost, and what is marked is what changed."""

from hypothesis import given
from hypothesis import strategies as st

from spd_lens.analysis.common.word_diff import MAX_WORDS, word_diff

TEXT = st.lists(st.sampled_from(["a", "b", "42", " ", "\n", "  c", "\t"]), max_size=40).map("".join)


def changed(before, after):
    return [(piece.before.strip(), piece.after.strip()) for piece in word_diff(before, after) if not piece.same]


@given(TEXT, TEXT)
def test_both_texts_come_back_character_by_character(before, after):
    pieces = word_diff(before, after)
    assert "".join(piece.before for piece in pieces) == before
    assert "".join(piece.after for piece in pieces) == after
    for piece in pieces:
        if piece.same:
            assert piece.before.split() == piece.after.split()


def test_what_changed_is_marked():
    assert changed("He has 42 apples now.", "He has 43 apples now.") == [("42", "43")]
    assert changed("one two", "one two three") == [("", "three")]
    assert changed("one two three", "one three") == [("two", "")]
    assert changed("same words\nhere", "same  words here") == []


def test_a_word_that_happens_to_be_in_both_does_not_cut_a_rewritten_text():
    before, after = "We know that he sold the last of it yesterday", "Let x be how many the baker made all week"
    assert changed(before, after) == [(before, after)]


def test_long_texts_are_compared_up_to_a_limit_and_kept_whole():
    before = "#### 15\n" * MAX_WORDS
    pieces = word_diff(before, before + "end")
    assert "".join(piece.after for piece in pieces) == before + "end"
    assert not pieces[-1].same
    assert all(piece.same for piece in word_diff(before, before))
