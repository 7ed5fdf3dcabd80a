"""The balanced 2-bit set by brute force in float64: every split of the sorted magnitudes tried."""

from __future__ import annotations

import numpy as np


def best_scale(row, counts=None):
    """Scale of least (weighted) squared error of one row, and that error."""
    magnitudes = np.abs(np.asarray(row, np.float64))
    counts = np.ones(len(magnitudes)) if counts is None else np.asarray(counts, np.float64)
    best = (0.0, float(np.sum(counts * magnitudes**2)))
    for cut in [-1.0, *sorted(magnitudes)]:
        levels = np.where(magnitudes <= cut, 0.5, 1.5)
        scale = np.sum(counts * levels * magnitudes) / np.sum(counts * levels**2)
        error = float(np.sum(counts * (magnitudes - scale * levels) ** 2))
        if error < best[1]:
            best = (scale, error)
    return best


def error_of(row, scale, counts=None):
    """Squared error of a row with each value at its nearest level."""
    levels = np.array([-1.5, -0.5, 0.5, 1.5]) * float(scale)
    distances = np.abs(np.asarray(row, np.float64)[:, None] - levels).min(axis=1)
    return float(np.sum((1.0 if counts is None else counts) * distances**2))
