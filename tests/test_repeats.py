"""The first message of a kind is news, whatever numbers and hashes it carries; kinds are bounded."""

from side_tuning.repeats import MAX_KINDS, Repeats


def test_messages_that_differ_in_numbers_and_hashes_are_one_kind():
    repeats = Repeats()
    assert repeats.count("sample 00ff00ff00ff: label 7, tap plan 2 has 3 labels") == 1
    assert repeats.count("sample 00ff00ff00aa: label 8, tap plan 2 has 3 labels") == 2
    assert repeats.count("sample 00ff00ff00aa: 9 tokens, tap plan 2 allows 3") == 1


def test_made_up_kinds_do_not_grow_for_ever():
    repeats = Repeats()
    letters = "abcdefghijklmnopqrstuvwxyz"
    for n in range(2 * MAX_KINDS):
        repeats.count(f"reason {letters[n // 676]}{letters[n // 26 % 26]}{letters[n % 26]}")
    assert len(repeats._counts) == MAX_KINDS + 1
