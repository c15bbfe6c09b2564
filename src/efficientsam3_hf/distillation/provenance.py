"""What a record of training says of where a student came from."""

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from .arguments import DistillationArguments, default_of


def name_of(teacher: Any) -> str:
    """A teacher's name for the record."""
    name = getattr(teacher, "name_or_path", None) or getattr(teacher, "name", None)
    is_place = name and (os.path.isabs(str(name)) or os.path.isdir(str(name)))
    return Path(str(name)).resolve().name if is_place else str(name or "none")


def names_of(dataset: Any) -> list[str]:
    """Names of datasets for the record."""
    if hasattr(dataset, "datasets"):  # several in one, as in torch's ConcatDataset
        return [name for each in dataset.datasets for name in names_of(each)]
    name = getattr(dataset, "name", None) or getattr(
        getattr(dataset, "reader", None), "source", None
    )
    return [str(name)] if name else [type(dataset).__name__]


def command_line() -> str:
    """How this program was started, without places on this machine."""
    return " ".join(Path(word).name if os.path.isabs(word) else word for word in sys.argv)


def hardware(args: DistillationArguments) -> str:
    """What is trained on."""
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    return f"{args.world_size} x {args.device.type}"


# Of the arguments that all trainings with transformers have, those that make a difference.
TOLD = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm")


def hyper_parameters(args: DistillationArguments) -> dict[str, Any]:
    """What a training is repeated with; of the stage's own settings those that were changed."""
    told = {name: getattr(args, name) for name in TOLD}
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    inherited = {each.name for each in fields(TrainingArguments)}
    changed = {
        each.name: getattr(args, each.name)
        for each in fields(args)
        if each.name not in inherited and getattr(args, each.name) != default_of(each)
    }
    values = {
        **told,
        "optimizer": args.optim,
        "batch size": batch,
        "precision": precision,
        "seed": args.seed,
        **changed,
    }
    return {name: str(value) for name, value in values.items()}
