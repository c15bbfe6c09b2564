"""Everything that makes the miniature, one stage after another; those that are done are kept.

python -m examples.miniature --folder outputs/miniature --minutes 240
"""

import argparse
import os
from pathlib import Path

from safetensors.torch import load_file

from efficientsam3_hf.distillation.checkpoints import last_checkpoint
from efficientsam3_hf.distillation.ema import EMA_FILE
from efficientsam3_hf.distillation.family import Family

from . import train_teacher, train_tracker
from .state import export_state, minutes_of

# Of the time there is. Memory goes on from prompts, whose minutes it counts in.
SHARES = {"concepts": 0.7, "prompts": 0.1, "memory": 0.3}


def make_teacher(folder: Path, minutes: float, more: list[str]) -> Path:
    """Train concept model and tracker, and write the folder of both.

    Args:
        folder: Where all goes.
        minutes: To train in all.
        more: Options of every run.
    """
    states = {name: folder / f"{name}.safetensors" for name in SHARES}
    runs = {
        "concepts": (train_teacher.main, []),
        "prompts": (train_tracker.main, ["--teacher", os.fspath(states["concepts"])]),
        "memory": (
            train_tracker.main,
            ["--start", os.fspath(states["prompts"]), "--frames", "4", "--batch", "4"],
        ),
    }
    for name, (train, options) in runs.items():
        budget = SHARES[name] * minutes
        if minutes_of(folder / name) < budget:
            print(f"{name}: {minutes_of(folder / name):.0f} of {budget:.0f} minutes so far.")
            train(["--folder", os.fspath(folder / name), "--minutes", str(budget), *options, *more])
            states[name].unlink(missing_ok=True)
        if not states[name].exists():
            export_state(folder / name, states[name])
    checkpoint = last_checkpoint(folder / "memory")
    assert checkpoint is not None  # it was written just now
    family = Family.load(checkpoint)
    family.load_state_dict(load_file(Path(checkpoint) / EMA_FILE), strict=False)
    return family.save(folder / "teacher")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/miniature"))
    parser.add_argument("--minutes", type=float, default=240.0, help="to train in all")
    options, more = parser.parse_known_args(arguments)
    print(f"The teacher is in {make_teacher(options.folder, options.minutes, more)}.")


if __name__ == "__main__":
    main()
