"""Keys, sealed messages, streams, shared secrets and graphs: what the protocol stands on."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.secure import graph
from fed_diffusion.secure.keys import WORDS, KeyPair, SealBroken, Stream, fresh, seal, unseal
from fed_diffusion.secure.masking import chain, next_seed
from fed_diffusion.secure.shamir import PRIME, at, join, split


def chi_squared(data: bytes) -> float:
    """Of the 256 values of bytes, against uniform ones: 255 on average, sigma 22.6."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


UNIFORM = 255 + 6 * math.sqrt(2 * 255)


def test_both_ends_agree_on_a_key_for_one_purpose_that_no_third_one_has():
    one, other, third = KeyPair.new(), KeyPair.new(), KeyPair.new()
    assert one.agree(other.public, b"a") == other.agree(one.public, b"a")
    keys = {one.agree(other.public, b"a"), one.agree(other.public, b"b")}
    assert len(keys | {one.agree(third.public, b"a"), third.agree(other.public, b"a")}) == 4


def test_a_public_key_with_which_nothing_is_shared_is_refused():
    with pytest.raises(ValueError, match="shared key"):
        KeyPair.new().agree(bytes(32), b"a")


def test_what_was_sealed_opens_with_its_key_and_purpose_alone_and_never_looks_the_same():
    key, sealed = fresh(), []
    for _ in range(2):
        sealed.append(seal(key, b"share", b"1 to 2"))
    assert unseal(key, sealed[0], b"1 to 2") == b"share"
    assert sealed[0] != sealed[1]
    broken = bytes([*sealed[0][:-1], sealed[0][-1] ^ 1])
    for wrong in ((fresh(), sealed[0], b"1 to 2"), (key, sealed[0], b"2 to 1"), (key, broken, b"")):
        with pytest.raises(SealBroken):
            unseal(*wrong)
    with pytest.raises(SealBroken):
        unseal(key, b"", b"1 to 2")


def test_a_stream_is_uniform_and_taken_away_as_it_was_added():
    vector = np.arange(3 * WORDS + 5, dtype=np.uint64)
    key, where = fresh(), np.arange(len(vector)) % 3 == 0
    masked = vector.copy()
    Stream(key).add_to(masked, where)
    assert np.array_equal(masked[~where], vector[~where])
    assert chi_squared(masked[where].tobytes()) < UNIFORM
    Stream(key).add_to(masked, where, minus=True)
    assert np.array_equal(masked, vector)


def test_the_seed_of_a_level_gives_those_above_it():
    seeds = list(chain(fresh(), 4))
    assert [next_seed(seed) for seed in seeds[:-1]] == seeds[1:]
    assert len(set(seeds)) == 4


def test_the_field_is_of_a_prime_that_holds_a_whole_key():
    assert PRIME > 2**256
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11))


@settings(max_examples=30)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 8), st.data())
def test_any_shares_that_are_enough_give_the_secret_and_fewer_fit_every_secret(secret, n, data):
    needed = data.draw(st.integers(1, n))
    shares = dict(enumerate(split(secret, n, needed), 1))
    chosen = data.draw(st.permutations(sorted(shares)))[:needed]
    few = {place: shares[place] for place in chosen}
    assert join(few, needed) == secret
    few.popitem()
    if needed < 2:
        return
    # one share less, and any other secret goes through the same shares
    other = {**few, 0: (int.from_bytes(secret) ^ 1).to_bytes(33)}
    assert {p: at(other, p).to_bytes(33) for p in few} == few


def test_shares_of_no_secret_of_this_length_give_none():
    beyond = {1: (PRIME - 1).to_bytes(33), 2: (PRIME - 1).to_bytes(33)}
    assert join(beyond, 2) is None


def test_shares_of_one_secret_are_not_the_same_twice():
    assert split(bytes(32), 3, 2) != split(bytes(32), 3, 2)


@given(st.integers(3, 40), st.integers(1, 20), st.binary(min_size=1, max_size=8))
def test_the_graph_is_regular_symmetric_and_connected(clients, half, seed):
    names = [7 * c for c in range(clients)]
    found = graph.neighbours_of(names, 2 * half, seed)
    assert {len(v) for v in found.values()} == {min(2 * half, clients - 1)}
    assert all(c in found[other] and other != c for c in names for other in found[c])
    reached, rest = {0}, [0]
    while rest:
        fresh_ones = set(found[rest.pop()]) - reached
        reached |= fresh_ones
        rest += fresh_ones
    assert reached == set(names)


def test_the_order_of_the_graph_follows_from_its_seed():
    names = list(range(50))
    assert graph.neighbours_of(names, 4, b"a") == graph.neighbours_of(names, 4, b"a")
    assert graph.neighbours_of(names, 4, b"a") != graph.neighbours_of(names, 4, b"b")


def test_the_bound_on_failure_holds_for_a_small_graph_counted_out():
    """All ways to lose 2 and to corrupt 2 of 10 clients on a circle with 4 neighbours each."""
    n, degree, needed, failures, ways = 10, 4, 3, 0, 0
    for bad in combinations(range(n), 2):
        for lost in combinations(sorted(set(range(n)) - set(bad)), 2):
            ways += 1
            gone = set(bad) | set(lost)
            near = [[(c + d) % n for d in (-2, -1, 1, 2)] for c in range(n)]
            told = any(len(set(near[c]) & set(bad)) >= needed for c in range(n))
            stuck = any(degree + 1 - len(set(near[c]) & set(lost)) < needed for c in range(n))
            left = sorted(set(range(n)) - gone)
            reached, rest = {left[0]}, [left[0]]
            while rest:
                more = set(near[rest.pop()]) - gone - reached
                reached |= more
                rest += more
            failures += told or stuck or reached != set(left)
    assert 0 < failures / ways <= graph.failure(n, degree, 0.5, 0.2, 0.2)


def test_a_degree_is_chosen_that_fails_rarely_and_is_not_all_for_many():
    for clients in (100, 200, 1000):
        degree = graph.degree_for(clients, 0.5)
        assert graph.failure(clients, degree, 0.5, graph.COLLUDING, graph.LOST) <= 2**-40
        assert degree < clients / 2
        assert graph.failure(clients, degree - 2, 0.5, graph.COLLUDING, graph.LOST) > 2**-40
    assert graph.degree_of(None, 0.5, 1000, equal=False) == 999
