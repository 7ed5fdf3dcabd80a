"""The best 16 values for a group of weights: k-means on a line, solved exactly and not by iteration.

In one dimension clusters are intervals of the sorted values, so the best partition is a shortest path: the
cost of the first i values in k clusters is the least, over j < i, of the cost of the first j in k - 1 plus the
spread of values j to i. Written by hand since no library that we depend on has it, and an iterated k-means
finds a local optimum that depends on its start; here the result is a fact about the values.

The spread obeys the quadrangle inequality, so the best j moves one way with i, and with k: divide and conquer,
the middle i first. All the i's of one level, of all groups of a batch, are searched in one ragged array, so
NumPy does the loop. Example, two clusters::

    values 0 1 2 10 11   ->   centroids 1.0 10.5, clusters 0 0 0 1 1

Source: values and centroids compared with coremltools' exact mode, costs with a direct search, in the tests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_BATCH_VALUES = 1 << 14  # values searched together: enough to hide NumPy's overhead, few enough for the cache


def cluster_groups(groups: npt.NDArray[Any], count: int) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """The best `count` centroids of each group, and the nearest centroid of each value.

    Args:
        groups: finite values, one group a row.
        count: centroids per group, at most 256.

    Shapes: groups (G, n) -> centroids (G, count) float64, ascending; clusters (G, n) uint8.

    A group of fewer distinct values has each as a centroid, and zeros after them.

    Cost: about count * n * log2(n) evaluations per group, on all cores; 4,096 values to 16 centroids take some
    15 ms of one.
    """
    step = max(1, _BATCH_VALUES // max(1, groups.shape[1]))
    batches = [groups[start : start + step] for start in range(0, len(groups), step)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda batch: _cluster_batch(batch, count), batches))
    if not parts:
        return np.zeros((0, count)), np.zeros(groups.shape, np.uint8)
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _cluster_batch(groups: npt.NDArray[Any], count: int) -> tuple[Floats, npt.NDArray[np.uint8]]:
    centroids = np.zeros((len(groups), count))
    clusters = np.zeros(groups.shape, np.uint8)
    distinct = [np.unique(group, return_inverse=True, return_counts=True) for group in groups]
    many = [index for index, (values, _, _) in enumerate(distinct) if len(values) > count]
    points = [_Points.of(distinct[index][0], distinct[index][2]) for index in many]
    ends_of = dict(zip(many, _best_ends(points, count) if points else []))
    for index, (values, inverse, counts) in enumerate(distinct):
        ends = ends_of.get(index, np.arange(1, len(values) + 1))
        starts = np.concatenate([[0], ends[:-1]])
        weights = counts.astype(np.float64)
        totals = np.add.reduceat(weights * values, starts)
        centroids[index, : len(ends)] = totals / np.add.reduceat(weights, starts)
        clusters[index] = np.repeat(np.arange(len(ends)), ends - starts)[inverse.reshape(-1)]
    return centroids, clusters


@dataclass(frozen=True)
class _Points:
    """Running sums over the sorted distinct values of a group, from 0 values to all n: weight, sum, sum of squares."""

    weight: Floats
    total: Floats
    squares: Floats

    @classmethod
    def of(cls, values: npt.NDArray[Any], counts: Integers) -> _Points:
        middle = values.astype(np.float64) - float(values.mean(dtype=np.float64))  # keeps differences of sums precise
        weight = counts.astype(np.float64)
        sums = (np.concatenate([[0.0], np.cumsum(terms)]) for terms in (weight, weight * middle, weight * middle**2))
        return cls(*sums)


def _best_ends(points: Sequence[_Points], count: int) -> list[Integers]:
    """For each group, where its `count` clusters end in its sorted distinct values; all have more than `count`."""
    search = _Search(points)
    splits = [search.first()]
    for clusters in range(2, count + 1):
        splits.append(search.next(clusters, last=clusters == count))
    ends = []
    for base, size in zip(search.bases, search.sizes):
        end, path = base + size, []
        for split in reversed(splits):
            path.append(end - base)
            end = split[end]
        ends.append(np.array(path[::-1]))
    return ends


class _Search:
    """Costs of the first i values of each group in k clusters, for k = 1, 2, ...

    Group g has n + 1 places in every array, from `bases[g]` on: place i stands for its first i values. A split
    is the place where the last cluster starts.
    """

    def __init__(self, points: Sequence[_Points]) -> None:
        self.weight = np.concatenate([item.weight for item in points])
        self.total = np.concatenate([item.total for item in points])
        self.squares = np.concatenate([item.squares for item in points])
        self.sizes = [len(item.weight) - 1 for item in points]
        lengths = np.array(self.sizes) + 1
        self.bases = [int(base) for base in np.cumsum(lengths) - lengths]
        self.first_place = np.repeat(self.bases, lengths)
        self.levels = self._levels(np.arange(len(self.weight)) - self.first_place, np.repeat(self.sizes, lengths))

        first: Integers = np.array(self.bases)
        ends: Integers = first + np.array(self.sizes)
        self.whole = (ends, first, np.full_like(ends, -1))

    def _levels(self, number: Integers, size: Integers) -> list[tuple[Integers, Integers, Integers]]:
        """Places to search level by level, and for each the places whose splits bound its own (-1: no bound)."""
        levels, places = [], np.arange(len(number))
        stride = 1 << (max(self.sizes).bit_length() - 1)
        while stride:
            chosen = places[number % (2 * stride) == stride]
            above = np.where(number[chosen] + stride <= size[chosen], chosen + stride, -1)
            levels.append((chosen, chosen - stride, above))
            stride >>= 1
        return levels

    def first(self) -> Integers:
        """One cluster: everything from the group's first place."""
        weight = np.maximum(self.weight, 1.0)  # the empty prefix has no weight, and no cost
        self.cost = self.squares - self.total**2 / weight
        self.cost[self.bases] = 0.0
        self.split = self.first_place
        return self.split

    def next(self, clusters: int, *, last: bool) -> Integers:
        """One cluster more; gives the splits, of the last round only those of all values."""
        before, cost, split = self.split, np.zeros_like(self.cost), self.first_place.copy()
        part = self.cost - self.squares
        for places, below, above in [self.whole] if last else self.levels:
            # No cluster is empty, whatever rounding makes of costs near zero.
            fewest: Integers = np.minimum(self.first_place[places] + clusters, places) - 1
            lowest: Integers = np.maximum(np.maximum(split[below], before[places]), fewest)
            highest: Integers = np.where(above < 0, places - 1, np.minimum(split[above], places - 1))
            split[places], cost[places] = self._search(places, lowest, highest, part)
        self.split, self.cost = split, cost
        return split

    def _search(self, places: Integers, lowest: Integers, highest: Integers, part: Floats) -> tuple[Integers, Floats]:
        """The best split of each place from `lowest` to `highest`, and its cost."""
        widths = np.maximum(highest - lowest, 0) + 1
        starts = np.cumsum(widths) - widths
        candidates = np.arange(starts[-1] + widths[-1])
        candidates += np.repeat(lowest - starts, widths)
        weight = np.repeat(self.weight[places], widths)
        weight -= self.weight[candidates]
        gain = np.repeat(self.total[places], widths)
        gain -= self.total[candidates]
        gain *= gain
        gain /= weight
        value = part[candidates]
        value -= gain
        least = np.minimum.reduceat(value, starts)
        hits = np.flatnonzero(value == np.repeat(least, widths))
        best = candidates[hits[np.searchsorted(hits, starts)]]
        return best, least + self.squares[places]
