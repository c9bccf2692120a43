"""Candidate lists: every id has a code that gives it back, and the best candidates have the smallest codes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.errors import CorruptionError
from logitstore.id_lists import ESCAPE, LIST_LENGTH, CandidateLists, IdLists, PairCounts


def ranked_lists(keys, members, weights, vocab_size: int, chunk_pairs: int = 1 << 22) -> CandidateLists:
    pairs = PairCounts(chunk_pairs)
    for part in np.array_split(np.arange(len(keys)), 5):
        pairs.add(keys[part], members[part], weights[part])
    return pairs.ranked(vocab_size)


def some_lists(rng: np.random.Generator, vocab_size: int, n_seen: int) -> IdLists:
    def lists():
        keys, members = rng.integers(0, vocab_size, (2, n_seen))
        return ranked_lists(keys, members, rng.random(n_seen), vocab_size)

    return IdLists(lists(), lists(), lists(), rng.permutation(vocab_size).astype(np.int32))


def some_rows(rng: np.random.Generator, vocab_size: int, n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [E], unique in a row, offsets [R+1], tokens [R+1]) of rows of 0 to 30 entries, and one of many."""
    counts = np.minimum(rng.integers(0, 31, n_rows), vocab_size)
    counts[-1] = min(vocab_size, 700)
    ids = np.concatenate([rng.permutation(vocab_size)[:count] for count in counts]).astype(np.int32)
    tokens = rng.integers(0, vocab_size, n_rows + 1).astype(np.int32)
    return ids, np.concatenate([[0], np.cumsum(counts)]), tokens


def code_by_hand(lists: IdLists, token: int, first: CandidateLists, key: int, current: int) -> int:
    """The smallest code of a token: its place in both lists, and in the order of frequency."""
    codes = [ESCAPE + lists.by_frequency.tolist().index(token)]
    for side, (candidates, of) in enumerate(((first, key), (lists.after, current))):
        members = candidates.members[candidates.offsets[of] : candidates.offsets[of + 1]].tolist()
        codes += [2 * place + side for place, member in enumerate(members) if member == token]
    return min(codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 17, 300, 5000]), st.sampled_from([0, 1, 50, 3000, 40_000]))
def test_codes_are_the_smallest_and_give_their_ids_back(seed: int, vocab_size: int, n_seen: int) -> None:
    rng = np.random.default_rng(seed)
    lists = some_lists(rng, vocab_size, n_seen)
    ids, offsets, tokens = some_rows(rng, vocab_size, 12)
    codes = lists.codes(ids, offsets, tokens)
    np.testing.assert_array_equal(lists.ids(codes.astype(np.int64), offsets, tokens), ids)
    for row in range(0, 12, 3):
        for entry in range(offsets[row], min(offsets[row + 1], offsets[row] + 40)):
            is_first = entry == offsets[row]
            first, key = (lists.beside, tokens[row + 1]) if is_first else (lists.together, ids[offsets[row]])
            assert codes[entry] == code_by_hand(lists, int(ids[entry]), first, int(key), int(tokens[row]))


def test_codes_are_places_in_the_two_lists_interleaved_and_frequency_ranks_behind_them() -> None:
    together = ranked_lists(np.array([3, 3, 3]), np.array([7, 8, 9]), np.array([1.0, 3.0, 2.0]), 10)
    after = ranked_lists(np.array([5, 5, 5]), np.array([9, 1, 3]), np.array([2.0, 1.0, 0.5]), 10)
    beside = ranked_lists(np.array([6, 6]), np.array([2, 3]), np.array([2.0, 1.0]), 10)
    lists = IdLists(after, beside, together, np.arange(10, dtype=np.int32)[::-1].copy())
    ids = np.array([3, 8, 9, 7, 1, 4], np.int32)
    codes = lists.codes(ids, np.array([0, 6]), np.array([5, 6], np.int32))
    np.testing.assert_array_equal(codes, [2, 0, 1, 4, 3, ESCAPE + 5])


def test_lists_are_ordered_by_weight_and_cut() -> None:
    n = LIST_LENGTH + 40
    lists = ranked_lists(np.ones(n, int), np.arange(n), np.arange(n, dtype=float), n)
    np.testing.assert_array_equal(lists.members, np.arange(n)[::-1][:LIST_LENGTH])
    np.testing.assert_array_equal(np.diff(lists.offsets), [0, LIST_LENGTH] + [0] * (n - 2))


def test_codes_that_no_id_has_are_refused() -> None:
    lists = some_lists(np.random.default_rng(0), 50, 20)
    offsets, tokens = np.array([0, 0, 2]), np.zeros(3, np.int32)
    for code in (ESCAPE + 50, 1 << 40):
        with pytest.raises(CorruptionError, match="outside the vocabulary of 50"):
            lists.ids(np.array([ESCAPE, code]), offsets, tokens)
    for codes in ([ESCAPE - 2, ESCAPE], [ESCAPE - 1, ESCAPE], [ESCAPE, ESCAPE - 2], [ESCAPE, ESCAPE - 1]):
        with pytest.raises(CorruptionError, match="behind the end of its candidate list"):
            lists.ids(np.array(codes), offsets, tokens)


def test_weights_add_up_over_chunks_whatever_their_size() -> None:
    rng = np.random.default_rng(1)
    keys, members = rng.integers(0, 20, (2, 4000))
    weights = rng.integers(0, 5, 4000).astype(float)
    lists = ranked_lists(keys, members, weights, 20)
    small = ranked_lists(keys, members, weights, 20, chunk_pairs=10)
    np.testing.assert_array_equal(lists.members, small.members)
    summed = np.zeros((20, 20))
    np.add.at(summed, (keys, members), weights)
    for key in range(20):
        expected = [m for m in np.argsort(-summed[key], kind="stable") if summed[key, m] > 0]
        np.testing.assert_array_equal(lists.members[lists.offsets[key] : lists.offsets[key + 1]], expected)
