"""What runs leave: the model, and a run in a few megabytes, to go on from elsewhere.

    python -m examples.miniature.state outputs/teacher teacher_state.safetensors
    python -m examples.miniature.train_teacher --folder outputs/next \\
        --start teacher_state.safetensors

Weights and their moving average are kept in half precision, the moments of Adam are left out: they
are back after a hundred steps of a rising learning rate.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from efficientsam3_hf.distillation.checkpoints import EXTRA_FILE, last_checkpoint
from efficientsam3_hf.distillation.ema import EMA_FILE
from efficientsam3_hf.distillation.family import Family

WEIGHTS, AVERAGE = "weights.", "average."


def minutes_of(folder: str | os.PathLike) -> float:
    """How long the run in a folder has trained so far."""
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return 0.0
    past = json.loads((Path(checkpoint) / EXTRA_FILE).read_text(encoding="utf-8"))
    return float(past["minutes"])


def load_run(folder: str | os.PathLike) -> Family:
    """What a run has trained: its last checkpoint, of averaged weights where there are some.

    A folder of a model is taken as it is.
    """
    is_model = (Path(folder) / "config.json").is_file()
    source = folder if is_model else last_checkpoint(folder)
    if source is None:
        raise FileNotFoundError(f"{folder} holds neither a model nor a checkpoint of a run.")
    family = Family.load(source)
    if (average := Path(source) / EMA_FILE).is_file():
        family.load_state_dict(load_file(average), strict=False)
    return family.eval()


def export_state(folder: str | os.PathLike, path: str | os.PathLike) -> None:
    """Write the last checkpoint of a folder into one file."""
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(f"{os.fspath(folder)} has no checkpoint that was written whole.")
    tensors = {
        prefix + name: tensor.half()
        for prefix, held in (
            (WEIGHTS, Family.load(checkpoint).state_dict()),
            (AVERAGE, load_file(Path(checkpoint) / EMA_FILE)),
        )
        for name, tensor in held.items()
        if tensor.is_floating_point()
    }
    past = (Path(checkpoint) / EXTRA_FILE).read_text(encoding="utf-8")
    save_file(tensors, os.fspath(path), metadata={"past": past})


def import_state(trainer: Any, path: str | os.PathLike, is_trunk: bool = False) -> None:
    """Put a trainer where `export_state` left another one.

    Args:
        trainer: With a `PastMixin`.
        path: Of the file.
        is_trunk: Whether the file is a concept model's alone, beside which a tracker begins with
            the neck that is there; its minutes and steps are not the tracker's.
    """
    with safe_open(os.fspath(path), "pt") as file:
        metadata = file.metadata()
    stored = load_file(os.fspath(path))
    parts = [
        {
            name.removeprefix(prefix): tensor.float()
            for name, tensor in stored.items()
            if name.startswith(prefix)
        }
        for prefix in (WEIGHTS, AVERAGE)
    ]
    if is_trunk:  # averaged weights are what a tracker will see
        trainer.family.detector.load_state_dict(
            {
                name.removeprefix("detector."): value
                for name, value in {**parts[0], **parts[1]}.items()
            },
            strict=False,
        )
        neck = trainer.family.detector.vision_encoder.neck.state_dict()
        trainer.family.tracker.vision_encoder.neck.load_state_dict(neck)
        trainer.average.weights = {
            name: tensor.detach().clone() for name, tensor in trainer.average.followed().items()
        }
        return
    followed = {} if trainer.average is None else trainer.average.weights
    # What is not trained any more is what it was on average.
    settled = {name: value for name, value in parts[1].items() if name not in followed}
    trainer.family.load_state_dict({**parts[0], **settled}, strict=False)
    if trainer.average is not None:
        trainer.average.weights = {
            name: parts[1][name].to(tensor) for name, tensor in trainer.average.weights.items()
        }
    past = json.loads(metadata["past"])
    trainer.load_extra_state({**past, "past_steps": past["steps"]})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of a run")
    parser.add_argument("file", help="to write")
    options = parser.parse_args(arguments)
    with torch.no_grad():
        export_state(options.folder, options.file)
    print(f"{options.file}: {os.path.getsize(options.file) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
