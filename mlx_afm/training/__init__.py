"""Training: loss, step, loop, state, events. It trains what is trainable and knows nothing of LoRA or files."""

from mlx_afm.training.config import TrainConfig
from mlx_afm.training.distributed import Ranks, join_ranks
from mlx_afm.training.events import (
    Callback,
    DataRead,
    Evaluated,
    Event,
    EventHandler,
    LossSpiked,
    MemoryEstimated,
    Notice,
    Sampled,
    StageProgress,
    StepsReported,
    TrainingFinished,
    TrainingInterrupted,
    TrainingResumed,
    TrainingStarted,
    ZeroGradientsFound,
    is_recorded,
    to_record,
)
from mlx_afm.training.hooks import Hooks
from mlx_afm.training.loss import chunked_cross_entropy, cross_entropy
from mlx_afm.training.order import DataOrder
from mlx_afm.training.state import Snapshot, TrainState, snapshot_from
from mlx_afm.training.step import evaluate_data
from mlx_afm.training.trainer import train

__all__ = [
    "Callback",
    "DataOrder",
    "DataRead",
    "Evaluated",
    "Event",
    "EventHandler",
    "Hooks",
    "LossSpiked",
    "MemoryEstimated",
    "Notice",
    "Ranks",
    "Sampled",
    "Snapshot",
    "StageProgress",
    "StepsReported",
    "TrainConfig",
    "TrainState",
    "TrainingFinished",
    "TrainingInterrupted",
    "TrainingResumed",
    "TrainingStarted",
    "ZeroGradientsFound",
    "chunked_cross_entropy",
    "cross_entropy",
    "evaluate_data",
    "is_recorded",
    "join_ranks",
    "snapshot_from",
    "to_record",
    "train",
]
