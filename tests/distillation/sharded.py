"""Runs whose weights are shared out among two processes on CPUs: FSDP2 and DeepSpeed."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

from accelerate import PartialState
from accelerate.utils import DistributedType
from distillation.processes import train_by_command
from ranks import Started, free_port, of_several

# What `accelerate launch` makes of the recipes in docs/distillation.md.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    "ACCELERATE_GRADIENT_CLIPPING": "auto",
    "DS_ACCELERATOR": "cpu",
    "LOCAL_SIZE": "2",
}
ZERO_2 = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ZERO_3 = {
    **DEEPSPEED,
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
RECIPES = {"fsdp2": FSDP2, "zero2": ZERO_2, "zero3": ZERO_3}
# The CPU as accelerate sees it where it is not asked to use the CPU.
AS_DEVICE = {
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_CPU": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def train_sharded(recipe: str, config: Path, runs: list[list[str]]) -> None:
    """Runs of a command, one after another, in one of two processes."""
    # accelerate has FSDP2 for GPUs and the like alone: it is told that this is one.
    is_fsdp = recipe == "fsdp2"
    as_gpu = patch.object(
        PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU)
    )
    with as_gpu if is_fsdp else nullcontext():
        for flags in runs:
            train_by_command(config, flags)


def start(recipe: str, config: Path, runs: list[list[str]]) -> list[Started]:
    """Two processes of some runs."""
    port = free_port()
    own = [["--training.use_cpu", "false", "--training.ddp_backend", "gloo"], *runs]
    runs = [[*run, *own[0]] for run in runs]
    return [
        Started(
            train_sharded,
            recipe,
            config,
            runs,
            **{**of_several(rank, 2, port), **AS_DEVICE, **RECIPES[recipe]},
        )
        for rank in range(2)
    ]
