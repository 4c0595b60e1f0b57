"""Chooses at random, but the same on every machine and in every order: by hashes of the values."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")


def rank(seed: int, *parts: str) -> int:
    """A number that depends on the seed and the parts alone, evenly from 0 to 2**64 − 1."""
    text = "\x1f".join([str(seed), *parts])
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def deal(
    weights: Mapping[str, int],
    shares: Mapping[str, float],
    seed: int,
    stratum_of: Callable[[str], Hashable] = lambda _: None,
) -> dict[str, str]:
    """Deal values to splits, so that each split gets about its share of the weight.

    The heaviest value goes first, each to the split that is furthest below its share of the group
    and of all. A group that has as many values as there are splits gives each at least one.

    Args:
        weights: Number of texts of each value.
        shares: Share of each split.
        seed: Seed of the order of equally heavy values.
        stratum_of: Group of a value; each group is dealt by the shares.

    Returns:
        The split of each value.
    """
    # Of weight 0 is a word that no text has; it is dealt all the same.
    heavy = {value: max(1, weight) for value, weight in weights.items()}
    left = Counter(stratum_of(value) for value in heavy)
    in_stratum: Counter[tuple[str, Hashable]] = Counter()
    in_all: Counter[str] = Counter()
    split_of: dict[str, str] = {}
    for value in sorted(heavy, key=lambda value: (-heavy[value], rank(seed, value), value)):
        stratum, weight = stratum_of(value), heavy[value]
        empty = [split for split in shares if not in_stratum[split, stratum]]
        own = sum(in_stratum[split, stratum] for split in shares) + weight
        total = in_all.total() + weight
        missing = {
            split: share * (own + total) - in_stratum[split, stratum] - in_all[split]
            for split, share in shares.items()
        }
        split = max(empty if left[stratum] <= len(empty) else shares, key=missing.__getitem__)
        split_of[value] = split
        left[stratum] -= 1
        in_stratum[split, stratum] += weight
        in_all[split] += weight
    return split_of


def root_shares(shares: Mapping[str, float], n_kinds: int) -> dict[str, float]:
    """Shares for dealing each of several kinds of values, so that the texts have the shares.

    A text stays where all its values were dealt to the same split. With n kinds that are dealt
    independently, its share there is the n-th power of the kinds' share.

    Args:
        shares: Share of each split of the texts.
        n_kinds: Number of kinds of values.
    """
    roots = {split: share ** (1 / n_kinds) for split, share in shares.items()}
    return {split: root / sum(roots.values()) for split, root in roots.items()}


def drawn(
    items: Iterable[T],
    number: int,
    stratum_of: Callable[[T], Hashable],
    rank_of: Callable[[T], int],
) -> list[T]:
    """Some items, of each stratum equally many, give or take one, as far as it has them.

    Args:
        items: What to draw from.
        number: How many to draw at most.
        stratum_of: Group of an item.
        rank_of: Its place in the draw; no two items have the same.

    Returns:
        The items drawn, by their rank.
    """
    strata: dict[Hashable, list[T]] = defaultdict(list)
    for item in sorted(items, key=rank_of):
        strata[stratum_of(item)].append(item)
    turns = [(turn, rank_of(i), i) for own in strata.values() for turn, i in enumerate(own)]
    chosen = sorted(turns, key=lambda each: each[:2])[:number]
    return [item for _, _, item in sorted(chosen, key=lambda each: each[1])]


def chosen(options: Sequence[T], seed: int, *parts: str) -> T:
    """One of some options, by the hash of the parts."""
    return options[rank(seed, *parts) % len(options)]
