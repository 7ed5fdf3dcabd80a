"""Train a LoRA adapter: data checked, model loaded, adapter trained, best and last written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mlx_afm.adapters import Adapter, LoRAConfig, adapter_weights, add_adapter, is_zero, train_only
from mlx_afm.adapters.config import to_adapter_json
from mlx_afm.adapters.store import CONFIG, WEIGHTS, write_adapter_weights
from mlx_afm.checkpoints.arrays import from_mlx
from mlx_afm.checkpoints.hub import resolve
from mlx_afm.checkpoints.model_folder import load_model, read_config, read_toolkit_config
from mlx_afm.checkpoints.names import DEFAULT_ADAPTER
from mlx_afm.data import Tokens, encode_examples, read_examples
from mlx_afm.data.encode import CONTEXT_TOKENS
from mlx_afm.errors import ConfigError, FormatError
from mlx_afm.files import sha256_of, write_json
from mlx_afm.formats.fmadapter import require_adapter_name
from mlx_afm.model import Model
from mlx_afm.text.tokenizer import AFMTokenizer
from mlx_afm.training import Event, EventHandler, TrainConfig, evaluate_data, to_record
from mlx_afm.training import train as run_training
from mlx_afm.workflows.load import attach, base_adapter, load, load_tokenizer

SPLITS = ("train", "valid", "test")
METRICS = "metrics.jsonl"
BEST = "best"  # the adapter with the lowest validation loss, a folder beside the last


@dataclass(frozen=True, kw_only=True)
class LoRAJob:
    """A training run.

    Attributes:
        model: MLX model folder, or the hub id of one.
        data: a folder with train.jsonl and perhaps valid.jsonl and test.jsonl, or one file to train on.
        adapter_path: folder for the adapter and its records.
        lora: form of the adapter.
        train: how long and how fast.
        max_tokens: longest example allowed.
        name: name of a package to be exported later; checked before training.
        test: the adapter will be scored on the test split afterwards, so that is checked first too.
    """

    model: Path
    data: Path
    adapter_path: Path
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    max_tokens: int = CONTEXT_TOKENS
    name: str | None = None
    test: bool = False


@dataclass(frozen=True)
class Trained:
    """Outcome of a run.

    Attributes:
        adapter_path: the last adapter; the best is in its folder `best` if there was validation data.
        steps: optimizer steps done.
        best_loss: lowest validation loss, nats per token; None without validation data.
    """

    adapter_path: Path
    steps: int
    best_loss: float | None


@dataclass(frozen=True)
class Score:
    """Loss on held-out data: nats per trained token, and e to that."""

    loss: float
    perplexity: float
    tokens: int
    examples: int


def train(job: LoRAJob, on_event: EventHandler = lambda event: None) -> Trained:
    """Trains an adapter and writes it.

    Everything that can be wrong is found before training starts: name, configuration, every line of
    the data. Files, in `job.adapter_path`, each written atomically: `adapters.safetensors` (the last),
    `adapter_config.json`, `best/` (an adapter folder), `metrics.jsonl`.

    Raises:
        ConfigError, FormatError, DataError, TensorsError: see `load` and `read_examples`.
    """
    if job.name is not None:
        require_adapter_name(job.name)
    job = replace(job, model=resolve(job.model))
    _require_folder(job.adapter_path)
    tokenizer = _require_tokenizer(job.model)
    read_config(job.model)
    train_data = read_split(job.data, "train", tokenizer, job.max_tokens)
    if job.test:
        read_split(job.data, "test", tokenizer, job.max_tokens)
    valid_data = read_split(job.data, "valid", tokenizer, job.max_tokens) if has_split(job.data, "valid") else []
    model = load_model(job.model)
    form = start_adapter(model, job.model, job.lora, seed=job.train.seed)
    files = _RunFiles(job, model, form)
    with files.metrics() as record:

        def handle(event: Event) -> None:
            record(event)
            on_event(event)

        state = run_training(model, train_data, valid_data, job.train, on_event=handle, save=files.save)
    return Trained(job.adapter_path, state.step, state.best_loss)


def start_adapter(model: Model, folder: Path, lora: LoRAConfig, *, seed: int) -> LoRAConfig:
    """Puts the adapter to be trained on the model and freezes the rest; returns its full form.

    If the base carries an adapter of the same rank and scale, training starts from its values and
    untrained projections keep theirs. If it does something and has another form, training is refused,
    since it is part of the base model.
    """
    base = base_adapter(folder)
    if base is None or (base.config.rank, base.config.scale) != (lora.rank, lora.scale):
        if base is not None and not is_zero(base):
            advice = (
                "Train with its rank and scale, or fuse it into the base first: mlx-afm fuse --model M --save-path F"
            )
            expected = f"rank {base.config.rank}, scale {base.config.scale}"
            found = f"rank {lora.rank}, scale {lora.scale}"
            raise ConfigError(
                "the base model has an active adapter", where=folder, expected=expected, found=found, advice=advice
            )
        add_adapter(model, lora, seed=seed)
        return lora
    form = LoRAConfig(rank=lora.rank, scale=lora.scale, dropout=lora.dropout)
    attach(model, Adapter(form, base.base, base.weights, base.name), where=folder)
    train_only(model, lora.targets)
    return form


class _RunFiles:
    """What a run writes."""

    def __init__(self, job: LoRAJob, model: Model, form: LoRAConfig) -> None:
        self.folder, self.model = job.adapter_path, model
        adapter = read_toolkit_config(job.model).adapter
        self.settings = {
            **to_adapter_json(form, model.args, adapter.name if adapter else DEFAULT_ADAPTER),
            "model": str(job.model),
            "data": {name: sha256_of(split_file(job.data, name)) for name in SPLITS if has_split(job.data, name)},
            "trained_targets": list(job.lora.targets),
            "train": asdict(job.train),
        }

    def save(self, kind: str) -> None:
        """Writes the adapter as "last" or "best"."""
        folder = self.folder if kind == "last" else self.folder / BEST
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter_weights(
            folder / WEIGHTS, {name: from_mlx(array) for name, array in adapter_weights(self.model).items()}
        )
        write_json(folder / CONFIG, self.settings)

    @contextmanager
    def metrics(self) -> Iterator[EventHandler]:
        """Gives a handler that appends each event to `metrics.jsonl`, flushed at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / METRICS).open("w", encoding="utf-8") as handle:

            def record(event: Event) -> None:
                handle.write(json.dumps(to_record(event)) + "\n")
                handle.flush()

            yield record


def score(
    model_path: Path, adapter_path: Path | None, data: Path, *, batch_size: int = 4, max_tokens: int = CONTEXT_TOKENS
) -> Score:
    """Loss of a model with an adapter on `test.jsonl` (or on `data` itself if it is a file)."""
    model_path = resolve(model_path)
    tokenizer = _require_tokenizer(model_path)
    examples = read_split(data, "test", tokenizer, max_tokens)
    model, _ = load(model_path, adapter_path)
    total, tokens = evaluate_data(model, examples, batch_size)
    loss = total / tokens
    return Score(loss, math.exp(loss), round(tokens), len(examples))


def split_file(data: Path, split: str) -> Path:
    """The file of a split: data itself if it is a file."""
    return data if data.is_file() else data / f"{split}.jsonl"


def has_split(data: Path, split: str) -> bool:
    """Whether there is such a file; one file alone is the one to train on."""
    return split == "train" if data.is_file() else (data / f"{split}.jsonl").is_file()


def read_split(data: Path, split: str, tokenizer: AFMTokenizer, max_tokens: int) -> list[Tokens]:
    """The encoded examples of a split, every line checked."""
    if not data.exists():
        raise FormatError("no such file or folder", where=data, expected="training data")
    return encode_examples(read_examples(split_file(data, split), tokenizer.special_pieces), tokenizer, max_tokens)


def _require_folder(path: Path) -> None:
    if path.suffix in (".pt", ".fmadapter") or (path.exists() and not path.is_dir()):
        advice = "Choose another --adapter-path; .pt and .fmadapter are made from the folder: mlx-afm adapter convert"
        raise ConfigError(
            "cannot train into this", where=path, expected="a folder, new or of an earlier run", advice=advice
        )


def _require_tokenizer(folder: Path) -> AFMTokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        read_config(folder)  # a folder that is no model at all is the better complaint
        advice = "Convert again with tokenizer.model in place."
        raise ConfigError("the model folder has no tokenizer", where=folder, advice=advice)
    return tokenizer
