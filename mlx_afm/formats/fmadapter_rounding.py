"""What is lost when an adapter's values become float16, counted while a package is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PIECE = 1 << 17  # values that stay in the processor's cache


@dataclass
class Rounding:
    """Errors of rounding to float16, in the values' own unit.

    Attributes:
        values: how many values were rounded.
        max_error: largest absolute error.
        worst_tensor: the tensor it was found in; "" while every value is exact.
        error_sum: sum of the absolute errors.
        vanished: values other than zero that became zero.
    """

    values: int = 0
    max_error: float = 0.0
    worst_tensor: str = ""
    error_sum: float = 0.0
    vanished: int = 0

    @property
    def mean_error(self) -> float:
        """Mean absolute error."""
        return self.error_sum / self.values if self.values else 0.0

    def add(self, name: str, values: npt.NDArray[Any], halves: npt.NDArray[np.float16]) -> None:
        """Counts one tensor: its finite values, and the same rounded."""
        flat, rounded = np.ascontiguousarray(values).reshape(-1), np.ascontiguousarray(halves).reshape(-1)
        self.values += flat.size
        if flat.dtype == np.float16:
            return
        for start in range(0, flat.size, PIECE):
            piece, back = flat[start : start + PIECE], rounded[start : start + PIECE].astype(flat.dtype)
            self.vanished += int(np.count_nonzero(piece)) - int(np.count_nonzero(back))
            np.subtract(back, piece, out=back)
            np.abs(back, out=back)
            self.error_sum += float(back.sum(dtype=np.float64))
            if (largest := float(back.max())) > self.max_error:
                self.max_error, self.worst_tensor = largest, name

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {
            "values": self.values,
            "max_error": self.max_error,
            "mean_error": self.mean_error,
            "worst_tensor": self.worst_tensor,
            "vanished": self.vanished,
        }
