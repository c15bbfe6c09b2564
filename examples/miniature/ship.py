"""Put a trained student into the package, as the model that runs when none is named.

    python -m examples.miniature.ship outputs/miniature/student
    python -m examples.miniature.ship outputs/miniature/student --half
    python -m examples.miniature.ship outputs/miniature/teacher --teacher

Writes weights, configuration, processor, tokenizer and card, and into `results.json`, as `shipped`,
what the student scores on the first scenes of the test split. A test measures that again. The
teacher goes beside this file, for those who want to distil and not to train it.
"""

import argparse
import json
import shutil
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from efficientsam3_hf import EfficientSam3Model, EfficientSam3Processor, zoo
from efficientsam3_hf.benchmarks.images import PointedImages, pixels_of
from efficientsam3_hf.benchmarks.loading import load
from efficientsam3_hf.data.collators import ImageCollator
from efficientsam3_hf.data.synthetic import Scenes
from efficientsam3_hf.distillation.checkpoints import last_checkpoint
from efficientsam3_hf.distillation.ema import EMA_FILE
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.evaluation.mask_iou import mask_iou

from .report import RESULTS, read_results, table
from .scores import score_concepts
from .world import MOST_THINGS, SIDE, WORLD, scenes

TEACHER = Path(__file__).parent / "weights" / "teacher"
MOST_BYTES = 8_000_000
WEIGHTS_FILE = "model.safetensors"
KEPT = (
    *(WEIGHTS_FILE, "config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)
TEST_SCENES = 200
# Points. The same weights on the same scenes give the same on one machine; on others, and with
# other versions of torch, roundings tip a score over the threshold now and then. Of the 200 scenes,
# one is half a point.
NOISE = 1.0


def ship(source: Path, target: Path, results: Path = RESULTS, is_half: bool = False) -> Path:
    """Write the folder of the package, and record what it scores.

    Args:
        source: Folder of a model, or of a run, whose last checkpoint is taken.
        target: Folder to write; what is there goes.
        results: File of the record.
        is_half: Whether to store weights in half precision. They are loaded in single precision.
    """
    student = load_student(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".shipping") as place:
        folder = Path(place) / target.name
        write_model(student, folder)
        whole = score(folder) if is_half else None
        if is_half:
            halve(folder)
        record = read_results(results)
        write_card(student, folder, record)
        check_size(folder)
        scores = score(folder)
        if whole is not None and any(scores[name] < whole[name] - NOISE for name in whole):
            raise ValueError(f"Half precision costs too much: {scores} in place of {whole}.")
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(folder, target)
    record["shipped"] = {"sha256": digest(target), "scenes": TEST_SCENES, **scores}
    results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return target


def ship_teacher(source: Path, target: Path = TEACHER) -> Path:
    """Write a teacher in half precision.

    Args:
        source: Its folder.
        target: Folder to write; what is there goes.
    """
    shutil.rmtree(target, ignore_errors=True)
    write_model(load_student(source), target)
    halve(target)
    return target


def load_student(folder: Path) -> Family:
    """Concept model and tracker, of averaged weights where there are some."""
    source = folder if (folder / "config.json").is_file() else last_checkpoint(folder)
    if source is None:
        raise FileNotFoundError(f"{folder} holds neither a model nor a checkpoint of a run.")
    student = Family.load(source)
    if not student.has_video:
        raise ValueError(f"{source} has no tracker for video, and what is shipped must have one.")
    if (average := Path(source) / EMA_FILE).is_file():
        student.load_state_dict(load_file(average), strict=False)
    return student.eval()


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
            f"may come with the package, {sizes[WEIGHTS_FILE] / 1e6:.2f} of them weights. Store "
            "these in half precision (--half), or train a smaller student."
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


@torch.no_grad()
def score(folder: Path, count: int = TEST_SCENES) -> dict[str, float]:
    """cgF1, and mean IoU of things under their boxes, in percent, in scenes of the test split."""
    model = EfficientSam3Model.from_pretrained(folder)
    collate = ImageCollator(EfficientSam3Processor.from_pretrained(folder), mask_size=(SIDE, SIDE))
    asked = scenes(count, "test")
    batches = (
        collate([asked[index] for index in range(first, min(first + 20, count))])
        for first in range(0, count, 20)
    )
    concepts = score_concepts(model, batches)

    loaded = load(str(folder), "objects")
    things = Scenes(count, "test", side=SIDE, most=MOST_THINGS, world=WORLD, ask="anything")
    overlaps = []
    for index in range(count):
        sample = things[index]
        instances = sample.queries[0].instances or []
        boxes = [instance.box_xyxy for instance in instances]
        masks = PointedImages.of(loaded, pixels_of([sample])).by_boxes(0, boxes)
        pairs = zip(masks, instances, strict=True)
        overlaps += [mask_iou(mask, instance.mask) for mask, instance in pairs]
    scores = {"cgF1": concepts["cgF1"], "box mIoU": float(np.mean(overlaps))}
    return {name: round(100 * value, 2) for name, value in scores.items()}


def digest(folder: Path) -> str:
    """What tells these weights from others."""
    return sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the student, or of its run")
    parser.add_argument("--half", action="store_true", help="store in half precision")
    parser.add_argument("--teacher", action="store_true", help="it is the teacher")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    if options.teacher:
        print(ship_teacher(options.folder))
        return
    folder = ship(options.folder, zoo.embedded(), is_half=options.half)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{folder}: {size:.2f} MB, {read_results()['shipped']}")


if __name__ == "__main__":
    main()
