"""Low-rank start values for what quantization loses: W = Q + (A B)^T with Q quantized, A (N, R), B (R, O).

residual   Q = Q(W), and A B from the first R singular directions of W - Q
weight     A B from the first R directions of W itself, Q = Q(W - (A B)^T), then A B again from W - Q

Each further round quantizes W less the last A B and takes A B anew from what is then left; the round with the
least error is kept. With column weights the error is that of the outputs: columns are multiplied by the
root of the mean square of their inputs before directions are taken, and A is divided by it.

Source: LoftQ, arXiv 2310.08659, algorithm 1; column weights as in LQER, arXiv 2402.02446. The directions are
checked against `numpy.linalg.svd` in tests. Shape suffixes: O rows (outputs), N columns (inputs), R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_afm.errors import ConfigError, SettingError

Floats = npt.NDArray[np.float32]
Rounding = Callable[[Floats], Floats]  # a matrix (O, N) to its nearest on a grid
INITS = ("residual-svd", "weight-svd")
EXACT_SIDE = 384  # of the smaller side, up to which all singular values are computed
EXTRA_DIRECTIONS, POWER_ROUNDS = 16, 3  # of the random projection beyond that
SMALLEST = 1e-30  # singular value
LEAST_WEIGHT = 1e-6  # of a column, as a share of the mean: an input that is always zero must not divide by zero


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """How an adapter's start value is made when a model is quantized.

    Attributes:
        init: residual-svd (directions of the rounding error) or weight-svd (of the weight, before it is rounded).
        rank: how many directions; by default the rank that `lora` trains, which goes on from this adapter.
        scale: of the adapter; devices apply 0.5.
        rounds: how often directions are taken from the error; more than one alternates with rounding.

    Raises:
        SettingError: settings out of range.
    """

    init: str = INITS[0]
    rank: int = 32
    scale: float = 0.5
    rounds: int = 1

    def __post_init__(self) -> None:
        faults = [
            f"{name}: expected a whole number from 1 on, found {value!r}"
            for name, value in (("rank", self.rank), ("rounds", self.rounds))
            if isinstance(value, bool) or not isinstance(value, int) or value < 1
        ]
        if self.init not in INITS:
            faults.append(f"init: expected {' or '.join(INITS)}, found {self.init}")
        if not 0 < self.scale < np.inf:
            faults.append(f"scale: expected more than 0, found {self.scale!r}")
        if faults:
            raise SettingError("the start value's settings are out of range", details=faults)


@dataclass(frozen=True)
class ResidualSplit:
    """A matrix as codes and low-rank part.

    Attributes:
        a_NR, b_RO: the low-rank part, without the adapter's scale.
        taken_a_NR, taken_b_RO: what was taken out before rounding; None if nothing was.
        error_before, error_after: squared error of the codes of W alone, and of codes and low-rank part, as a share of
            the squared weights; by columns as weighted.
    """

    a_NR: Floats
    b_RO: Floats
    taken_a_NR: Floats | None
    taken_b_RO: Floats | None
    error_before: float
    error_after: float

    def rounded_from(self, weight_ON: Floats) -> Floats:
        """What is to be quantized."""
        return less(weight_ON, self.taken_a_NR, self.taken_b_RO)


def less(weight_ON: Floats, a_NR: Floats | None, b_RO: Floats | None) -> Floats:
    """The matrix without a low-rank part."""
    if a_NR is None or b_RO is None:
        return weight_ON
    rest: Floats = weight_ON - (a_NR @ b_RO).T
    return rest


def split(
    weight_ON: Floats, rounding: Rounding, config: InitConfig, column_weights_N: npt.NDArray[Any] | None = None
) -> ResidualSplit:
    """Codes and low-rank part of a matrix; deterministic.

    Args:
        weight_ON: the matrix.
        rounding: what quantizing makes of a matrix.
        config: rank and rounds; its scale is not used here.
        column_weights_N: how much an error in each column counts.

    Cost: per round one rounding and one set of directions; five float32 copies of the matrix.
    """
    columns_N = _columns(weight_ON, column_weights_N)
    plain = rounding(weight_ON)
    total = _squared(weight_ON, columns_N)
    before = _squared(weight_ON - plain, columns_N)
    taken: tuple[Floats, Floats] | None = None
    best: tuple[float, Any, Any] | None = None
    if config.init == "weight-svd":
        taken = directions(weight_ON, config.rank, columns_N)
    for _ in range(config.rounds):
        codes = plain if taken is None else rounding(less(weight_ON, *taken))
        found = directions(weight_ON - codes, config.rank, columns_N)
        error = _squared(less(weight_ON - codes, *found), columns_N)
        if best is None or error < best[0]:
            best = (error, found, taken)
        taken = found
    assert best is not None, "there is at least one round"
    error, (a_NR, b_RO), kept = best
    taken_a_NR, taken_b_RO = kept or (None, None)
    scale = total or 1.0
    return ResidualSplit(a_NR, b_RO, taken_a_NR, taken_b_RO, before / scale, error / scale)


def directions(matrix_ON: Floats, rank: int, columns_N: Floats | None = None) -> tuple[Floats, Floats]:
    """A (N, R) and B (R, O) of the first singular directions: (A B)^T is the nearest matrix of that rank.

    Each side gets the root of the singular value. A rank above the smaller side leaves zeros. Above
    `EXACT_SIDE` the directions come from a random projection with power rounds (fixed seed), so that a matrix
    of the real model takes seconds and not minutes; the last few of them are then approximate.
    """
    scaled_ON = matrix_ON if columns_N is None else matrix_ON * columns_N
    left_OR, values_R, right_RN = _leading(scaled_ON, rank)
    if columns_N is not None:
        right_RN = right_RN / columns_N
    roots_R = np.sqrt(values_R)
    a_NR = np.zeros((matrix_ON.shape[1], rank), np.float32)
    b_RO = np.zeros((rank, matrix_ON.shape[0]), np.float32)
    a_NR[:, : len(values_R)] = (roots_R[:, None] * right_RN).T
    b_RO[: len(values_R)] = (left_OR * roots_R).T
    return a_NR, b_RO


def _leading(matrix_ON: Floats, rank: int) -> tuple[Floats, Floats, Floats]:
    """The first singular vectors and values: left (O, R), values (R,), right (R, N).

    From the eigenvectors of the smaller side's Gram matrix in float64: quicker than a singular value
    decomposition, and what their sizes lose of the last values does not matter, since the other side is projected.
    """
    wide = rank + EXTRA_DIRECTIONS
    if matrix_ON.shape[0] > matrix_ON.shape[1]:
        right_NR, values, left_RO = _leading(matrix_ON.T, rank)
        return left_RO.T, values, right_NR.T
    if len(matrix_ON) <= max(EXACT_SIDE, wide):
        return _projected(matrix_ON, _eigenvectors(matrix_ON, rank))
    generator = np.random.default_rng(0)
    basis = matrix_ON @ generator.standard_normal((matrix_ON.shape[1], wide), np.float32)
    for _ in range(POWER_ROUNDS):
        basis = matrix_ON @ (matrix_ON.T @ np.linalg.qr(basis)[0])
    orthogonal: Floats = np.linalg.qr(basis)[0].astype(np.float32, copy=False)
    return _projected(matrix_ON, orthogonal @ _eigenvectors(orthogonal.T @ matrix_ON, rank))


def _eigenvectors(matrix_ON: Floats, rank: int) -> Floats:
    """The eigenvectors of M M^T of largest value, largest first: (O, R)."""
    wide = matrix_ON.astype(np.float64)
    vectors: Floats = np.linalg.eigh(wide @ wide.T)[1][:, ::-1][:, :rank].astype(np.float32)
    return vectors


def _projected(matrix_ON: Floats, left_OR: Floats) -> tuple[Floats, Floats, Floats]:
    rows_RN = left_OR.T @ matrix_ON
    values_R = np.linalg.norm(rows_RN, axis=1)
    return left_OR, values_R, rows_RN / np.maximum(values_R, SMALLEST)[:, None]


def _columns(weight_ON: Floats, column_weights_N: npt.NDArray[Any] | None) -> Floats | None:
    if column_weights_N is None:
        return None
    weights_N = np.asarray(column_weights_N, np.float64)
    usable = weights_N.shape == weight_ON.shape[1:] and np.isfinite(weights_N).all() and (weights_N >= 0).all()
    if not usable or not weights_N.any():
        expected = f"{weight_ON.shape[1]} finite numbers from 0 on, not all of them 0"
        raise ConfigError("column weights that cannot be used", expected=expected, found=weights_N.shape)
    weights_N = np.maximum(weights_N / weights_N.mean(), LEAST_WEIGHT)
    roots_N: Floats = np.sqrt(weights_N).astype(np.float32)
    return roots_N


def _squared(matrix_ON: Floats, columns_N: Floats | None) -> float:
    weighted = matrix_ON if columns_N is None else matrix_ON * columns_N
    return float(np.sum(np.square(weighted), dtype=np.float64))
