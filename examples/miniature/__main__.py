"""The whole miniature: data, teacher, students through all stages, numbers. What is done is kept.

python -m examples.miniature --folder outputs/miniature --minutes 150
python -m examples.miniature --only student   # without other seeds and ablations
python -m examples.miniature --trained examples/miniature/weights   # with what is trained already
"""

import argparse
import os
import shutil
from pathlib import Path

import torch

from conversion.folder import atomic_folder
from efficientsam3_hf.distillation.cache_command import CacheArguments, run

from . import report, train_teacher, train_tracker
from .datasets import write_world
from .results import write_results
from .ship import write_half
from .state import export_state, load_run, minutes_of
from .students import ABLATIONS, BASE, BASES, DONE, MAIN, SEEDS, WEIGHTS_FILE, digest, train
from .timekeeper import add_common_options

# Of the time there is. Each but the first goes on from the one before it, and from the second on
# each counts in the minutes of those before it: boxes and clicks slowly at first, and then fast;
# memory on short pieces of clips, and then on longer ones.
SHARES = {"concepts": 0.32, "slow": 0.14, "prompts": 0.28, "memory": 0.34, "long": 0.68}
LAST = "long"

CODECS = ("fp16", "int8")

WHAT = ("teacher", "student", "seeds", "ablations", "all")


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
                *("--naming", "1500", "--last", "0.45"),
            ],
        ),
        "slow": (
            train_tracker.main,
            [
                *("--teacher", os.fspath(states["concepts"])),
                *("--learning-rate", "3e-4", "--rate-warm-up", "300", "--last", "0.5"),
            ],
        ),
        "prompts": (
            train_tracker.main,
            [
                *("--start", os.fspath(states["slow"]), "--seed", "1"),
                *("--learning-rate", "8e-4", "--rate-warm-up", "200", "--last", "0.45"),
            ],
        ),
        "memory": (
            train_tracker.main,
            [
                *("--start", os.fspath(states["prompts"]), "--new-memory"),
                *("--frames", "4", "--batch", "4", "--learning-rate", "4e-4", "--last", "0"),
            ],
        ),
        "long": (
            train_tracker.main,
            [
                *("--start", os.fspath(states["memory"]), "--frames", "8", "--batch", "2"),
                *("--learning-rate", "3e-4", "--last", "0.4"),
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
    write_half(load_run(folder / LAST), folder / "teacher")


def take(trained: Path, folder: Path) -> None:
    """Copy what is trained already, and is not there yet.

    Args:
        trained: Folder with `teacher`, and perhaps stages of `students`, as in that of the whole.
        folder: Of the whole.
    """
    if not (trained / "teacher" / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{trained} has no folder `teacher` with a model.")
    teacher = folder / "teacher"
    if teacher.is_dir() and digest(teacher) != digest(trained / "teacher"):
        raise ValueError(f"{teacher} is another teacher than that of {trained}.")
    stages = [path.parent for path in trained.glob(f"students/*/*/{DONE}")]
    for source in (trained / "teacher", *sorted(stages)):
        target = folder / source.relative_to(trained)
        if not target.exists():
            with atomic_folder(target) as unfinished:
                for path in source.iterdir():
                    if path.is_file():
                        shutil.copy(path, unfinished)


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
        "--minutes", type=float, default=150.0, help="to train the teacher, in all (%(default)s)"
    )
    parser.add_argument(
        "--trained",
        type=Path,
        help="folder with a trained `teacher`, and stages of `students`",
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
    if options.trained is not None:
        take(options.trained, folder)
    if teacher.is_dir():
        print("There is a teacher, which is taken as it is. Another one goes into another folder.")
    else:
        threads = torch.get_num_threads()
        make_teacher(folder, options.minutes, more)
        torch.set_num_threads(threads)  # of which its training takes one
    print(f"The teacher is in {teacher}.")
    if options.only == "teacher":
        return
    write_world(folder / "data")
    students = {
        "student": [MAIN],
        "seeds": SEEDS,
        "ablations": [*BASES, *ABLATIONS],
        "all": [*SEEDS, *BASES, *ABLATIONS],
    }[options.only]
    if BASE in students:
        write_caches(folder)
    for student in students:
        train(student, folder, {"training.use_cpu": "true"} if options.cpu else {})
    print(f"Numbers are in {write_results(folder, options.cpu)}.")
    if options.only == "all":
        report.main([str(folder)])
    else:
        print(f"Texts with them are written by `python -m examples.miniature.report {folder}`.")


if __name__ == "__main__":
    main()
