"""Prompts that say nearly the same, found without comparing each with each.

Words alone count, in lower case: `Compress a.txt, level 9` and `compress "b.txt" level 1` differ in one
letter of five words. A prompt's shingles are its pairs of neighbouring words (the first has a start in
front). Two prompts are near when they share at least `THRESHOLD` of their shingles, |A & B| / |A | B|.
That share is estimated from 128 hashes (MinHash; standard deviation 0.04 at the threshold), so pairs
close to it may fall on either side; a pair that shares nothing but a rearrangement of its words, or a
synonym in every third place, is not found. Nearness is passed on: a and c are in one group if both are
near b.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

THRESHOLD = 0.6
BANDS, ROWS = 32, 4  # a pair at the threshold meets in one of the bands with probability 0.988, at 0.7 with 0.9998
NEIGHBOURS = 8  # prompts that meet in a band are compared with so many before them, and with the first
CHUNK = 1 << 15  # pairs compared at a time
START = 0x9E3779B97F4A7C15

UInts = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

# Scripts written without spaces: each character is a word. Digits and punctuation are none.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W\\d_{_UNSPACED}]+")


def normalise(prompt: str) -> str:
    """A prompt's words; the prompt itself where it has none.

    Example: `  Sort  file_2.txt (in REVERSE)!` becomes `sort file txt in reverse`.
    """
    return " ".join(_WORD.findall(prompt.casefold())) or " ".join(prompt.split())


def group_near(prompts: Sequence[str], threshold: float = THRESHOLD) -> Ints:
    """The group of each prompt: the index of the first prompt in it.

    Args:
        prompts: all different, from `normalise`.
        threshold: share of the shingles; 1 or more groups nothing.

    Cost: two seconds for 30,000 prompts of a dozen words; about 1 kB a prompt.
    """
    groups = _Groups(len(prompts))
    if threshold < 1 and len(prompts) > 1:
        signatures = _signatures(prompts)
        for first, second in _candidates(signatures):
            for start in range(0, len(first), CHUNK):
                pairs = first[start : start + CHUNK], second[start : start + CHUNK]
                near = np.mean(signatures[pairs[0]] == signatures[pairs[1]], axis=1) >= threshold
                for one, other in zip(pairs[0][near].tolist(), pairs[1][near].tolist()):
                    groups.join(one, other)
    return np.array([groups.find(index) for index in range(len(prompts))], np.int64)


class _Groups:
    """Union and find; the smallest index stands for its group."""

    def __init__(self, count: int) -> None:
        self.parents = list(range(count))

    def find(self, index: int) -> int:
        while self.parents[index] != index:
            self.parents[index] = self.parents[self.parents[index]]
            index = self.parents[index]
        return index

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        self.parents[high] = low


def _signatures(prompts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """For each prompt the least of each of 128 hashes over its shingles, uint32 (prompts, 128)."""
    hashes: dict[str, int] = {}
    words: list[int] = []
    starts = np.zeros(len(prompts), np.int64)
    for index, prompt in enumerate(prompts):
        starts[index] = len(words)
        for word in prompt.split(" "):
            if word not in hashes:
                hashes[word] = int.from_bytes(blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "big")
            words.append(hashes[word])
    after = np.array(words, np.uint64)
    before = np.roll(after, 1)
    before[starts] = START
    shingles = _mix(after + np.uint64(3) * _mix(before))
    signatures = np.empty((len(prompts), BANDS * ROWS), np.uint32)
    for column in range(BANDS * ROWS):
        hashed = _mix(shingles + np.uint64((column + 1) * START % 2**64)) >> np.uint64(32)
        signatures[:, column] = np.minimum.reduceat(hashed, starts)
    return signatures


def _mix(values: UInts) -> UInts:
    """A permutation of 64 bits that leaves no pattern (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _candidates(signatures: npt.NDArray[np.uint32]) -> Iterator[tuple[Ints, Ints]]:
    """Pairs that agree in all hashes of a band: neighbours there, and each with the first."""
    for band in range(BANDS):
        rows = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
        keys = rows.view(f"V{rows.itemsize * ROWS}").reshape(-1)
        _, keys = np.unique(keys, return_inverse=True)
        order = np.argsort(keys, kind="stable").astype(np.int64)
        keys = keys[order]
        firsts = np.maximum.accumulate(np.where(np.r_[True, keys[1:] != keys[:-1]], np.arange(len(keys)), 0))
        yield order[firsts], order
        for distance in range(1, min(NEIGHBOURS, len(keys) - 1) + 1):
            same = keys[distance:] == keys[:-distance]
            if not same.any():
                break
            yield order[:-distance][same], order[distance:][same]
