"""The whole miniature: data, teacher, students through all stages, numbers. What is done is kept.

python -m examples.miniature --folder outputs/miniature --minutes 240
python -m examples.miniature --only student   # without other seeds and ablations
python -m examples.miniature --teacher examples/miniature/weights/teacher   # one that is trained
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from efficientsam3_hf.distillation.cache_command import CacheArguments, run
from efficientsam3_hf.distillation.checkpoints import last_checkpoint
from efficientsam3_hf.distillation.ema import EMA_FILE
from efficientsam3_hf.distillation.family import Family

from . import report, train_teacher, train_tracker
from .datasets import write_world
from .results import write_results
from .state import export_state, minutes_of
from .students import ABLATIONS, MAIN, SEEDS, train
from .timekeeper import add_common_options

# Of the time there is. Memory goes on from prompts, and long from memory, with longer pieces of
# clips; each counts in the minutes of those before it.
SHARES = {"concepts": 0.55, "prompts": 0.2, "memory": 0.3, "long": 0.45}
LAST = "long"

CODECS = ("fp16", "int8")

WHAT = ("teacher", "student", "seeds", "all")


def make_teacher(folder: Path, minutes: float, more: list[str]) -> None:
    """Train concept model and tracker, and write the folder of both.

    Args:
        folder: Where all goes.
        minutes: To train in all.
        more: Options of every run.
    """
    states = {name: folder / f"{name}.safetensors" for name in SHARES}
    runs = {
        "concepts": (
            train_teacher.main,
            [
                *("--batch", "16", "--warm-up", "12000", "--enough", "0.6"),
                *("--naming", "1500"),
            ],
        ),
        "prompts": (
            train_tracker.main,
            ["--teacher", os.fspath(states["concepts"]), "--last", "0.4"],
        ),
        "memory": (
            train_tracker.main,
            [
                *("--start", os.fspath(states["prompts"]), "--new-memory"),
                *("--frames", "4", "--batch", "4", "--learning-rate", "5e-4"),
            ],
        ),
        "long": (
            train_tracker.main,
            [
                *("--start", os.fspath(states["memory"]), "--frames", "8", "--batch", "2"),
                *("--learning-rate", "3e-4", "--last", "0.13"),
            ],
        ),
    }
    for name, (train_part, options) in runs.items():
        budget = SHARES[name] * minutes
        if minutes_of(folder / name) < budget:
            print(f"{name}: {minutes_of(folder / name):.0f} of {budget:.0f} minutes so far.")
            given = ["--folder", os.fspath(folder / name), "--minutes", str(budget)]
            train_part([*given, *options, *more])
            states[name].unlink(missing_ok=True)
        if not states[name].exists():
            export_state(folder / name, states[name])
    checkpoint = last_checkpoint(folder / LAST)
    assert checkpoint is not None  # it was written just now
    family = Family.load(checkpoint)
    family.load_state_dict(load_file(Path(checkpoint) / EMA_FILE), strict=False)
    with whole(folder / "teacher") as unfinished:
        family.save(unfinished)


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is there."""
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    unfinished.rename(folder)


def write_caches(folder: Path) -> None:
    """The teacher's features of all pictures of training, as they are and flipped."""
    images = folder / "data" / "train" / "images"
    annotations = images / "gold_synthetic_merged_a_release_train.json"
    for codec in CODECS:
        run(
            CacheArguments(
                images=os.fspath(images / "images"),
                output=os.fspath(folder / "caches" / codec),
                teacher=os.fspath(folder / "teacher"),
                format="saco",
                annotations=os.fspath(annotations),
                codec=codec,
                flips=True,
                dtype="float32",
                num_workers=1,
            )
        )


def read_options(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of the whole, and those for the runs that train the teacher."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Other options are those that train_teacher.py and train_tracker.py have both.",
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs/miniature"))
    parser.add_argument(
        "--minutes", type=float, default=240.0, help="to train the teacher, in all (%(default)s)"
    )
    parser.add_argument(
        "--teacher", type=Path, help="folder of a trained teacher, in place of training one"
    )
    parser.add_argument("--only", choices=WHAT, default="all", help="how far to go (%(default)s)")
    options, more = parser.parse_known_args(arguments)
    common = argparse.ArgumentParser(prog=parser.prog, usage=parser.format_usage())
    add_common_options(common)
    options.cpu = common.parse_args(["--folder", "", *more]).cpu
    return options, more


def main(arguments: list[str] | None = None) -> None:
    options, more = read_options(arguments)
    folder: Path = options.folder
    teacher = folder / "teacher"
    if teacher.is_dir():
        print("There is a teacher, which is taken as it is. Another one goes into another folder.")
    elif options.teacher is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(teacher) as unfinished:
            shutil.copytree(options.teacher, unfinished)
    else:
        threads = torch.get_num_threads()
        make_teacher(folder, options.minutes, more)
        torch.set_num_threads(threads)  # of which its training takes one
    print(f"The teacher is in {teacher}.")
    if options.only == "teacher":
        return
    write_world(folder / "data")
    with_seeds, with_ablations = options.only in ("seeds", "all"), options.only == "all"
    if with_ablations:
        write_caches(folder)
    for student in (
        *(SEEDS if with_seeds else [MAIN]),
        *(ABLATIONS if with_ablations else []),
    ):
        train(student, folder, {"training.use_cpu": "true"} if options.cpu else {})
    results = write_results(folder, with_seeds, with_ablations, options.cpu)
    print(f"Numbers are in {results}.")
    if with_ablations:
        report.main([str(folder)])
    else:
        print(f"Texts with them are written by `python -m examples.miniature.report {folder}`.")


if __name__ == "__main__":
    main()
