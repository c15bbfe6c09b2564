"""Training by the clock: checkpoints and a line of the log every few minutes, and an end."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

LOG_FILE = "log.jsonl"
LEAST_RATE = 0.02  # of the learning rate, at the end


class PastMixin:
    """Gives a trainer of distillation the minutes and steps of the runs that it goes on from."""

    # Of training, those before a stop included, and steps of the run that it was started from.
    minutes: float = 0.0
    past_steps: int = 0
    state: Any

    @property
    def steps(self) -> int:
        """Done in all."""
        return self.past_steps + self.state.global_step

    def extra_state(self) -> dict[str, float]:
        """With the minutes and steps that it took."""
        past = {"minutes": self.minutes, "steps": self.steps, "past_steps": self.past_steps}
        return {**super().extra_state(), **past}  # pyright: ignore  of DistillationTrainer

    def load_extra_state(self, state: dict[str, float]) -> None:
        """Go on counting."""
        super().load_extra_state(state)  # pyright: ignore  of DistillationTrainer
        self.minutes, self.past_steps = state["minutes"], int(state["past_steps"])


class Timekeeper(TrainerCallback):
    """Saves and scores every few minutes, and stops when time is up.

    Args:
        trainer: With a `PastMixin`.
        minutes: To train in all, those before a stop counted in.
        every: Minutes from one checkpoint to the next.
        score: Gives the numbers of a line, of the averaged weights.
        terms: Of the loss, to be in a line.
        last: Share of the minutes, the last ones, in which the learning rate falls to a fiftieth.
    """

    def __init__(
        self,
        trainer: Any,
        minutes: float,
        every: float,
        score: Callable[[], dict[str, float]],
        terms: tuple[str, ...],
        last: float = 0.0,
    ):
        self.trainer, self.score, self.terms = trainer, score, terms
        self.minutes, self.every, self.last = minutes, every, last
        self.saved = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock."""
        self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Look at the clock."""
        passed = (time.monotonic() - self.saved) / 60
        now = self.trainer.minutes + passed
        is_over = now >= self.minutes
        set_rate(kwargs["lr_scheduler"], share_of_rate(now, self.minutes, self.last))
        if is_over or state.global_step >= state.max_steps or passed >= self.every:
            self.trainer.minutes += passed
            control.should_save = True
            control.should_training_stop |= is_over

    def on_save(self, args, state, control, **kwargs) -> None:
        """Add a line to the log. What scoring takes is no training."""
        line: dict[str, Any] = {"step": self.trainer.steps, "minutes": self.trainer.minutes}
        with self.trainer.averaged():
            line |= self.score()
        self.trainer.family.train()
        losses = [entry for entry in state.log_history if "loss" in entry]
        if losses:
            line |= {f"train_{name}": losses[-1].get(name) for name in ("loss", *self.terms)}
            line["images_per_second"] = losses[-1].get("samples_per_second")
        line = {name: rounded(value) for name, value in line.items() if value is not None}
        with (Path(args.output_dir) / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        self.saved = time.monotonic()


def share_of_rate(now: float, minutes: float, last: float) -> float:
    """Of the learning rate, at a time: all of it, and in the last minutes less and less.

    >>> [share_of_rate(now, 100, last=0.4) for now in (0, 60, 80, 100)]
    [1.0, 1.0, 0.5, 0.02]
    """
    left = (minutes - now) / max(last * minutes, 1e-9)
    return max(LEAST_RATE, min(1.0, left))


def set_rate(scheduler: Any, share: float) -> None:
    """Go on at a share of the learning rates, from the step after the next one on."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's holds torch's
    scheduler.base_lrs = [share * each["initial_lr"] for each in scheduler.optimizer.param_groups]


def rounded(value: Any) -> Any:
    """A number with four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options of all runs."""
    parser.add_argument("--folder", required=True, help="where checkpoints and the log go")
    parser.add_argument("--start", help="file of `state.py` to go on from, in a new folder")
    parser.add_argument("--minutes", type=float, default=120.0, help="to train, in all")
    parser.add_argument("--steps", type=int, default=1_000_000, help="to train, in all")
    parser.add_argument("--every", type=float, default=5.0, help="minutes between checkpoints")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--last", type=float, default=0.4, help="share of the minutes in which that rate falls"
    )
    parser.add_argument("--rate-warm-up", type=int, default=100, help="steps")
    parser.add_argument("--clip", type=float, default=1.0, help="greatest norm of gradients")
    parser.add_argument("--ema", type=float, default=0.998, help="of the averaged weights")
    parser.add_argument("--held-out", type=int, default=200, help="samples to score with")
    # An image is many small tensors, which take a worker longer to hand over than to draw.
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")


def common_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What these are to a trainer."""
    return {
        "output_dir": options.folder,
        "seed": options.seed,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": options.rate_warm_up,
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "max_grad_norm": options.clip,
        "ema_decay": options.ema,
        "save_strategy": "no",  # by the clock
        "save_total_limit": 2,
        "logging_steps": 20,
        "dataloader_num_workers": options.workers,
        "dataloader_prefetch_factor": 4 if options.workers else None,
        "use_cpu": options.cpu,
        "disable_tqdm": True,
    }
