"""Runs of tiny stages: by two processes, and killed."""

import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranks import Started, free_port, kill_itself, of_several
from safetensors.torch import load_file
from transformers import TrainerCallback

from efficientsam3_hf.distillation.ema import EMA_FILE
from efficientsam3_hf.distillation.launch import prepare
from efficientsam3_hf.distillation.trainer import DistillationTrainer

# A function of a module of helpers: of a folder, and of fields of the stage's arguments.
Make = Callable[..., DistillationTrainer]


class Kill(TrainerCallback):
    """Ends the process as a power cut would, at the beginning of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """So many steps are done."""
        if state.global_step == self.step:
            kill_itself()


def train(make: Make, folder: Path, fields: dict[str, Any], kill: int = -1) -> None:
    """Train, or go on with it, and keep the student; or be killed in a step."""
    trainer = make(folder, **fields)
    if kill >= 0:
        trainer.add_callback(Kill(kill))
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()


def train_on_a_full_disk(make: Make, folder: Path, part: str) -> None:
    """Go on with a run of two steps, and print what is said where a part does not fit the disk."""
    trainer = make(folder, max_steps=4, save_strategy="steps", save_steps=2)
    room = (folder / "checkpoint-2" / part).stat().st_size - 1
    name = {"model.safetensors": "_save", "optimizer.pt": "_save_optimizer_and_scheduler"}[part]
    write = getattr(trainer, name)

    def write_in_room(*args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        write(*args)

    setattr(trainer, name, write_in_room)
    try:
        trainer.train(resume_from_checkpoint=True)
    except OSError as error:
        print(error)


def train_by_command(config: Path, flags: list[str], kill: int = -1) -> None:
    """The same, as the command does it."""
    run = prepare(config, flags)
    if kill >= 0:
        run.trainer.add_callback(Kill(kill))
    run.train()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint."""
    return load_file(folder / "model.safetensors")


def train_by_one_and_by_two(make: Make, folder: Path, **fields: Any) -> tuple[dict, dict]:
    """Weights after two steps on four samples each: by one process, and by two that share them."""
    fields = {"max_steps": 2, "optim": "sgd", "freeze_norms": True, "learning_rate": 0.01, **fields}
    shared = {**fields, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    port = free_port()
    pair = [
        Started(train, make, folder / "two", shared, **of_several(rank, 2, port))
        for rank in range(2)
    ]
    train(make, folder / "one", {**fields, "per_device_train_batch_size": 4})
    for each in pair:
        each.finish()
    return weights_of(folder / "one"), weights_of(folder / "two")


def train_whole_and_killed(make: Make, folder: Path, **fields: Any) -> None:
    """A run of four steps is killed in one of them, goes on, and ends as another."""
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **fields}
    kill = random.randint(1, 3)
    victim = Started(train, make, folder / "killed", fields, kill)
    train(make, folder / "whole", fields)
    victim.finish(code=-9)
    assert (folder / "killed" / f"checkpoint-{kill}").is_dir()
    assert not (folder / "killed" / "model.safetensors").exists()  # it did not come to the end

    train(make, folder / "killed", fields)

    files = ["model.safetensors", "checkpoint-4/model.safetensors"]
    if "ema_decay" in fields:
        files.append(f"checkpoint-4/{EMA_FILE}")
    for file in files:
        whole, killed = load_file(folder / "whole" / file), load_file(folder / "killed" / file)
        for name, tensor in whole.items():
            torch.testing.assert_close(killed[name], tensor, rtol=0, atol=1e-6)


def distance(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Sum of all differences between weights of the same names."""
    common = weights.keys() & others.keys()
    assert common
    return sum((weights[name] - others[name]).abs().sum().item() for name in common)
