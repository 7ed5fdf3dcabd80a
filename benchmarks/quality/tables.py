"""What one seed contributes to the two tables: how well a task is learnt, and how much of a lost loss comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tiny_afm import READING, exact_match, loss_of

import mlx_afm
from mlx_afm import LoRAConfig, LoRAJob, TrainConfig
from mlx_afm.quant import QuantConfig
from mlx_afm.quant.residual import InitConfig
from mlx_afm.training.distill import distillation_from
from mlx_afm.workflows.calibrate import Calibration
from mlx_afm.workflows.lora import NEXT_TOKEN, Objective
from mlx_afm.workflows.recover import RecoverJob, recover

Say = Callable[[str], None]
APPLE = QuantConfig(recipe="apple")
FORMS = {"8-bit": QuantConfig(bits=8), "4-bit": QuantConfig(bits=4), "2-bit": APPLE}
RANKS = (8, 16, 32)
ROUNDS = 5  # of rounding and adapter in turn
TASK_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps and rates; the same for all that are compared."""

    seed: int
    task_steps: int
    recovery_steps: int
    task_rate: float = 1e-2
    adapter_rate: float = 4e-3
    started_rate: float = 5e-4  # of an adapter that has something to lose
    qat_rate: float = 1e-3

    def task(self) -> TrainConfig:
        return self._config(self.task_steps, self.task_rate)

    def recovery(self, rate: float) -> TrainConfig:
        return self._config(self.recovery_steps, rate)

    def _config(self, steps: int, rate: float) -> TrainConfig:
        ends = steps + 1  # validation at both ends of the run alone
        return TrainConfig(
            iters=steps,
            batch_size=16,
            learning_rate=rate,
            seed=self.seed,
            steps_per_eval=ends,
            save_every=ends,
            val_batches=1,
        )


def job(model: Path, data: Path, out: Path, config: TrainConfig, lora: LoRAConfig) -> LoRAJob:
    return LoRAJob(model=model, data=data, adapter_path=out, train=config, lora=lora, data_config=READING, cache=None)


def task_table(dense: Path, data: Path, work: Path, plan: Plan, say: Say) -> dict[str, float]:
    """Exact match in percent, of the base and of adapters of one form trained on it dense and in codes."""
    test, found = data / "test.jsonl", {"base": exact_match(dense, None, data / "test.jsonl")}
    for name, form in {"LoRA": None, **{f"QLoRA {form}": config for form, config in FORMS.items()}}.items():
        folder = dense
        if form is not None:
            folder = mlx_afm.convert(dense, work / name, quantization=form).folder
        adapter = work / f"{name} adapter"
        mlx_afm.train(job(folder, data, adapter, plan.task(), LoRAConfig(rank=TASK_RANK)))
        found[name] = exact_match(folder, adapter, test)
        say(f"{name}: exact match {found[name]:.1f} %")
    return found


def loss_table(dense: Path, data: Path, work: Path, plan: Plan, say: Say) -> dict[str, float]:
    """Loss on held-out pages, in nats a token, of everything that starts from or leads to the 2-bit model."""
    found: dict[str, float] = {}
    for name, score in _losses(dense, data, work, plan):
        found[name] = score()
        say(f"{name}: loss {found[name]:.4f}")
    return found


def _losses(dense: Path, data: Path, work: Path, plan: Plan) -> Iterator[tuple[str, Callable[[], float]]]:
    """Name of a case, and what gives its loss; each is made just before it is scored."""
    valid = data / "valid.jsonl"
    calibration = Calibration(data=data / "train.jsonl", data_config=READING)
    plain = mlx_afm.convert(dense, work / "plain", quantization=APPLE).folder
    yield "dense", partial(loss_of, dense, None, valid)
    yield "2-bit", partial(loss_of, plain, None, valid)
    fitted = mlx_afm.convert(dense, work / "fitted", quantization=APPLE, calibration=calibration).folder
    yield "2-bit, calibrated", partial(loss_of, fitted, None, valid)
    started = {}
    for kind in ("residual-svd", "weight-svd"):
        for rank, rounds in ((16, 1), (32, 1), (32, ROUNDS)):
            name = _named(kind, rank, rounds)
            started[name] = _started(dense, work / name, InitConfig(init=kind, rank=rank, rounds=rounds))
            yield f"start {name}", partial(loss_of, started[name], None, valid)
    init = InitConfig(init="residual-svd", rank=32, rounds=ROUNDS)
    seen = _started(dense, work / "seen", init, calibration)
    yield f"start residual-svd rank 32, {ROUNDS} rounds, calibrated", partial(loss_of, seen, None, valid)
    yield "QAT, next token", partial(_qat, dense, data, work / "qat", plan, NEXT_TOKEN)
    distilled = Objective(load=lambda: distillation_from(mlx_afm.load(dense)[0]))
    yield "QAT, distilled", partial(_qat, dense, data, work / "qat distilled", plan, distilled)
    config = plan.recovery(plan.adapter_rate)
    for rank in RANKS:
        yield f"adapter rank {rank}", partial(_recovered, plain, data, work / f"r{rank}", config, dense, rank)
    yield "adapter rank 16, next token", partial(_recovered, plain, data, work / "n16", config, None, 16)
    config = plan.recovery(plan.started_rate)
    for kind, rounds in (("residual-svd", 1), ("residual-svd", ROUNDS), ("weight-svd", ROUNDS)):
        name = _named(kind, 32, rounds)
        yield f"adapter from {name}", partial(_recovered, started[name], data, work / f"a {name}", config, dense, 32)
    yield "control: dense, adapter rank 32, next token", partial(_control, dense, data, work / "control", plan)


def _named(kind: str, rank: int, rounds: int) -> str:
    return f"{kind} rank {rank}, {rounds} round{'s' * (rounds > 1)}"


def _started(dense: Path, folder: Path, init: InitConfig, calibration: Calibration | None = None) -> Path:
    return mlx_afm.convert(dense, folder, quantization=APPLE, init_adapter=init, calibration=calibration).folder


def _qat(dense: Path, data: Path, out: Path, plan: Plan, objective: Objective) -> float:
    form = LoRAConfig(fine_tune_type="qat")
    mlx_afm.train(job(dense, data, out, plan.recovery(plan.qat_rate), form), objective=objective)
    folder = mlx_afm.fuse(dense, out, out.parent / f"{out.name} codes").folder
    return loss_of(folder, None, data / "valid.jsonl")


def _recovered(model: Path, data: Path, out: Path, config: TrainConfig, teacher: Path | None, rank: int) -> float:
    run = job(model, data, out, config, LoRAConfig(rank=rank))
    recover(RecoverJob(run=run, loss="next-token" if teacher is None else "distill", teacher=teacher))
    return loss_of(model, out, data / "valid.jsonl")


def _control(dense: Path, data: Path, out: Path, plan: Plan) -> float:
    mlx_afm.train(job(dense, data, out, plan.recovery(plan.adapter_rate), LoRAConfig(rank=32)))
    return loss_of(dense, out, data / "valid.jsonl")
