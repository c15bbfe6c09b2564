"""Put a trained student into the package, as the model that runs when none is named.

    python -m examples.miniature.ship outputs/miniature
    python -m examples.miniature.ship outputs/miniature/teacher --teacher
    python -m examples.miniature.ship outputs/miniature --stages

Writes weights in half precision, configuration, processor, tokenizer and card, and into
`results.json`, as `shipped`, what the student scores on the first scenes and clips of the test
split. A test measures that again. The teacher, and the student after each stage, go beside this
file, for those who want to go on from there.
"""

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file
from transformers.utils import logging

from conversion.folder import atomic_folder
from efficientsam3_hf import zoo
from efficientsam3_hf.distillation.cache_files import write_json
from efficientsam3_hf.distillation.family import Family

from .datasets import write_world
from .measure import METRICS, measure
from .report import RESULTS, is_whole, read_results, student_of, table
from .state import load_run
from .students import DONE, MAIN, WEIGHTS_FILE, digest, is_done
from .world import MOST_THINGS, SIDE, WORLD

WEIGHTS = Path(__file__).parent / "weights"
MOST_BYTES = 8_000_000
KEPT = (
    *(WEIGHTS_FILE, "config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)
SCENES, CLIPS = 200, 8
# Points. The same weights on the same scenes give the same on one machine; on others, and with
# other versions of torch, roundings tip a score over the threshold now and then. Of the 200 scenes,
# one is half a point.
NOISE = 1.0
GOOD = tuple(name for name in METRICS if name != "false positives")  # the more the better


def ship(source: Path, target: Path, results: Path = RESULTS) -> Path:
    """Write the folder of the package, and record what it scores.

    Args:
        source: Folder of a miniature, whose main student is taken; or of a model, or of a run,
            whose last checkpoint is taken.
        target: Folder to write; what is there goes.
        results: File of the record.
    """
    if (source / "students").is_dir():
        source = MAIN.last(source)
        check_published(source, read_results(results))
    student = load_video(source)
    with atomic_folder(target, overwrite=True) as folder:
        write_model(student, folder)
        whole = score(folder, "val")
        halve(folder)
        check_losses(whole, score(folder, "val"))
        record = read_results(results)
        write_card(student, folder, record)
        check_size(folder)
        record["shipped"] = {"sha256": digest(folder), "scores": score(folder, "test")}
    write_json(results, record)
    return target


def check_published(student: Path, results: dict[str, Any]) -> None:
    """Raise if the results are not those of the student after its last stage."""
    if not is_done(student):
        raise ValueError(
            f"{student} was not trained to its end: run `python -m examples.miniature`."
        )
    if not is_whole(results) or student_of(results)["weights"] != digest(student):
        raise ValueError(
            f"{RESULTS.name} is about another student, and the card shows its numbers: run "
            "`python -m examples.miniature.report FOLDER` first."
        )


def check_losses(before: dict[str, float], after: dict[str, float]) -> None:
    """Raise if half precision costs more than noise."""
    lost = {name: before[name] - after[name] for name in GOOD}
    if max(lost.values()) > NOISE:
        raise ValueError(f"Half precision costs too much: {after} in place of {before}.")


def ship_stages(root: Path, target: Path = WEIGHTS) -> list[Path]:
    """Write the main student as it is after each stage that is done, in half precision.

    Args:
        root: Folder of a miniature.
        target: Folder to write to; students of the same names go.
    """
    written = []
    for folder in filter(is_done, MAIN.folders(root).values()):
        place = write_half(load_video(folder), target / folder.relative_to(root))
        shutil.copy(folder / DONE, place)
        written.append(place)
    return written


def ship_teacher(source: Path, target: Path = WEIGHTS / "teacher") -> Path:
    """Write a teacher in half precision.

    Args:
        source: Its folder.
        target: Folder to write; what is there goes.
    """
    return write_half(load_video(source), target)


def write_half(family: Family, target: Path) -> Path:
    """Write a model in half precision; what is there goes."""
    with atomic_folder(target, overwrite=True) as folder:
        write_model(family, folder)
        halve(folder)
    return target


def load_video(folder: Path) -> Family:
    """A concept model and the tracker that it must have to be shipped."""
    family = load_run(folder)
    if not family.has_video:
        raise ValueError(f"{folder} has no tracker for video, and what is shipped must have one.")
    return family


def write_model(student: Family, folder: Path) -> None:
    """Write what loads with the package: the code for those without it stays out."""
    student.save(folder)
    for path in folder.iterdir():
        if path.name not in KEPT:
            path.unlink()
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            text = json.dumps(without(content, "auto_map"), indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


def without(content: Any, key: str) -> Any:
    """What JSON holds, less a key wherever it stands."""
    if isinstance(content, list):
        return [without(each, key) for each in content]
    if isinstance(content, dict):
        return {name: without(value, key) for name, value in content.items() if name != key}
    return content


def halve(folder: Path) -> None:
    """Store weights in half precision. The configurations say that they are loaded in single."""
    weights = {
        name: weight.half() if weight.is_floating_point() else weight
        for name, weight in load_file(folder / WEIGHTS_FILE).items()
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config["tracker_config"], config["tracker_video_config"]):
        part["dtype"] = "float32"  # in the place of what the weights would say
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_size(folder: Path) -> None:
    """Raise if a folder is too large to come with a package."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    if sum(sizes.values()) > MOST_BYTES:
        raise ValueError(
            f"{sum(sizes.values()) / 1e6:.2f} MB are more than the {MOST_BYTES / 1e6:.0f} MB that "
            f"may come with the package, {sizes[WEIGHTS_FILE] / 1e6:.2f} of them weights. Train a "
            "smaller student."
        )


def write_card(student: Family, folder: Path, results: dict[str, Any]) -> None:
    """Say beside the weights what this is, and what it is not."""
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    card = template.format(
        parameters=f"{sum(weight.numel() for weight in student.parameters()):,}",
        megabytes=(folder / WEIGHTS_FILE).stat().st_size / 1e6,
        side=SIDE,
        most=MOST_THINGS,
        shapes=", ".join(WORLD.shapes),
        colours=", ".join(WORLD.colours),
        table=table(results),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def score(folder: Path, split: str, sizes: tuple[int, int] = (SCENES, CLIPS)) -> dict[str, float]:
    """What a model reaches on the first scenes and clips of a split, in percent."""
    with TemporaryDirectory() as place:
        data = write_world(Path(place) / "data", {split: sizes})
        found = measure(folder, data, split, Path(place) / "scores", draws=1)
    return {name: round(value, 2) for name, (value, _, _) in found.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the miniature, or of one model")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--teacher", action="store_true", help="it is the teacher")
    what.add_argument("--stages", action="store_true", help="its student after each stage")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    if options.teacher:
        print(ship_teacher(options.folder))
        return
    if options.stages:
        print(*ship_stages(options.folder), sep="\n")
        return
    folder = ship(options.folder, zoo.embedded())
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder}: {size:.2f} MB, {read_results()['shipped']}")


if __name__ == "__main__":
    main()
