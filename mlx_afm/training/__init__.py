"""Training: loss, step, loop, events. It trains what is trainable and knows nothing of LoRA or files."""

from mlx_afm.training.config import TrainConfig
from mlx_afm.training.events import (
    Evaluated,
    Event,
    EventHandler,
    StepsReported,
    TrainingFinished,
    TrainingStarted,
    to_record,
)
from mlx_afm.training.loss import chunked_cross_entropy, cross_entropy
from mlx_afm.training.trainer import TrainState, evaluate_data, train

__all__ = [
    "Evaluated",
    "Event",
    "EventHandler",
    "StepsReported",
    "TrainConfig",
    "TrainState",
    "TrainingFinished",
    "TrainingStarted",
    "chunked_cross_entropy",
    "cross_entropy",
    "evaluate_data",
    "to_record",
    "train",
]
