"""What a record of training says of where a student came from."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from .arguments import DistillationArguments


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
