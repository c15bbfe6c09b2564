"""Runs of `train_tiny.py`: alone, in pairs, and killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from efficientsam3_hf.distillation.ema import EMA_FILE
from efficientsam3_hf.distillation.trainer import last_checkpoint

SCRIPT = Path(__file__).with_name("train_tiny.py")


def start(stage: str, folder: Path, *flags: str, **environment: str) -> subprocess.Popen:
    """Begin a run."""
    root = Path(__file__).parents[2]
    places = [str(root / "src"), str(root / "tests")]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), stage, str(folder), *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> None:
    """Wait for runs, which must end well."""
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint."""
    return load_file(folder / "model.safetensors")


def train_by_one_and_by_two(stage: str, folder: Path, *flags: str) -> tuple[dict, dict]:
    """Weights after two steps on four samples each: by one process, and by two that share them."""
    flags = (*flags, "--max_steps", "2", "--optim", "sgd", "--freeze_norms", "true")
    flags = (*flags, "--learning_rate", "0.01", "--save_strategy", "no", "--logging_steps", "1")
    alone = start(stage, folder / "one", *flags, "--per_device_train_batch_size", "4")
    network = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared = (*flags, "--per_device_train_batch_size", "2", "--ddp_backend", "gloo")
    pair = [
        start(stage, folder / "two", *shared, **network, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    finish(alone, *pair)
    return weights_of(folder / "one"), weights_of(folder / "two")


def train_whole_and_killed(stage: str, folder: Path, *flags: str) -> None:
    """A run of eight steps is killed after its first checkpoint, goes on, and ends as another."""
    flags = (*flags, "--max_steps", "8", "--save_steps", "2", "--ema_decay", "0.9")
    flags = (*flags, "--per_device_train_batch_size", "4", "--learning_rate", "1e-3")
    unharmed = start(stage, folder / "whole", *flags)
    victim = start(stage, folder / "killed", *flags)
    deadline = time.monotonic() + 250
    while last_checkpoint(folder / "killed") is None and victim.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    finish(unharmed)
    assert not (folder / "killed" / "model.safetensors").exists()  # it did not come to the end

    finish(start(stage, folder / "killed", *flags))

    for file in ("model.safetensors", "checkpoint-8/model.safetensors", f"checkpoint-8/{EMA_FILE}"):
        whole, killed = load_file(folder / "whole" / file), load_file(folder / "killed" / file)
        for name, tensor in whole.items():
            torch.testing.assert_close(killed[name], tensor, rtol=0, atol=1e-6)


def distance(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Sum of all differences between weights of the same names."""
    common = weights.keys() & others.keys()
    assert common
    return sum((weights[name] - others[name]).abs().sum().item() for name in common)


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
