"""Model cards, written from what a folder holds: nothing in them was not measured or recorded."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..models.pushing import CARD_FILE, LICENCE_FILE, MARKER, is_own_card
from .contents import IMAGE_TRACKER, Folder, has_card, read_folder
from .markdown import block, code, prose
from .results import (
    Result,
    find_private,
    one_line,
    read_results,
    to_model_index,
    write_hub_files,
    write_results,
)

logger = logging.get_logger(__name__)

SAM3 = "facebook/sam3"
TEXT_TOWER = "text tower"

CONCEPT_CLASS = "EfficientSam3Model"
TRACKER_CLASS = "EfficientSam3TrackerModel"
CONCEPT_PROMPTS = [
    ("a phrase", CONCEPT_CLASS, 'images=image, text="a red car"'),
    ("several phrases", CONCEPT_CLASS, 'images=image, text=["a red car", "a traffic light"]'),
    ("exemplar boxes", CONCEPT_CLASS, "images=image, input_boxes=[[[x1, y1, x2, y2]]]"),
    (
        "a phrase, one like this, one unlike this",
        CONCEPT_CLASS,
        'images=image, text="car", input_boxes=[[box, other]], input_boxes_labels=[[1, 0]]',
    ),
]
POINT_PROMPTS = [
    (
        "exemplar points",
        CONCEPT_CLASS,
        'images=image, text="car", input_points=[[[x, y]]], input_points_labels=[[1]]',
    ),
]
TRACKER_PROMPTS = [
    (
        "points on one object, and beside it",
        TRACKER_CLASS,
        "images=image, input_points=[[[[x, y], [x2, y2]]]], input_labels=[[[1, 0]]]",
    ),
    ("a box around one object", TRACKER_CLASS, "images=image, input_boxes=[[[x1, y1, x2, y2]]]"),
    (
        "a mask, and points that mend it",
        TRACKER_CLASS,
        "images=image, input_points=[[[[x, y]]]], input_labels=[[[1]]]",
    ),
]

# Pictures of the Hub's own documentation of widgets.
SAMPLES = "https://huggingface.co/datasets/mishig/sample_images/resolve/main"
WIDGET = [
    {"src": f"{SAMPLES}/tiger.jpg", "text": "a tiger", "example_title": "A tiger"},
    {"src": f"{SAMPLES}/football-match.jpg", "text": "a player", "example_title": "Players"},
]


def write_model_card(
    folder: str | os.PathLike,
    name: str | None = None,
    repo_id: str | None = None,
    results: Sequence[Result] | None = None,
    base_model: str | None = None,
) -> Path:
    """Write card, licence and `.eval_results` of a folder; a card by another hand stays.

    Args:
        folder: Folder of a concept model or a tracker, with weights or without.
        name: Title; None takes the folder's name.
        repo_id: Where the folder goes on the Hub, for the code in the card.
        results: What was measured; saved beside the weights. None takes what is saved there.
        base_model: Id on the Hub of the model that this one derives from; None takes what the
            records of conversion and training say.
    """
    folder = Path(folder)
    if results is not None:
        write_results(results, folder)
    for warning in find_private(folder):
        logger.warning(warning)
    card = model_card(folder, name, repo_id, base_model=base_model)
    write_hub_files(read_results(folder), folder)
    write_licence(folder)
    path = folder / CARD_FILE
    if is_own_card(path):
        logger.warning(f"{path} was not written by this package: it stays as it is.")
    else:
        card.save(path)
    return path


def write_pushed_card(folder: Path, repo_id: str) -> bool:
    """Write card and licence of a folder that is about to be pushed.

    Returns:
        Whether there is a card for what it holds; the licence is written in any case.
    """
    if has_card(folder):
        write_model_card(folder, repo_id.split("/")[-1], repo_id)
        return True
    write_licence(folder)
    return False


def write_licence(folder: Path) -> None:
    """Write the text of the SAM License, unless a `LICENSE` is there."""
    if not (folder / LICENCE_FILE).exists():
        (folder / LICENCE_FILE).write_bytes(_asset("SAM_LICENSE.txt").read_bytes())


def keep_own_card(old: Path, new: Path) -> None:
    """Carry a card by another hand from a folder into the one that takes its place."""
    if is_own_card(old / CARD_FILE):
        shutil.copyfile(old / CARD_FILE, new / CARD_FILE)


def model_card(
    folder: str | os.PathLike,
    name: str | None = None,
    repo_id: str | None = None,
    results: Sequence[Result] | None = None,
    base_model: str | None = None,
) -> ModelCard:
    """The card of a folder, from its configuration, weights and records; nothing is written.

    Args:
        folder: As for `write_model_card`, like all the others.
        name: Title.
        repo_id: Where the folder goes on the Hub.
        results: What was measured; None takes what is saved beside the weights.
        base_model: Id on the Hub of the model that this one derives from.
    """
    folder = Path(os.path.abspath(folder))
    held = read_folder(folder)
    results = read_results(folder) if results is None else list(results)
    name = one_line(name or folder.name)
    base_model = one_line(base_model) if base_model else find_base_model(held)
    card = ModelCard.from_template(
        card_data=card_data(held, name, results, base_model),
        template_str=_asset("model_card_template.md").read_text(encoding="utf-8"),
        **card_text(held, name, one_line(repo_id or f"path/to/{name}"), results),
        has_base_model=base_model is not None,
    )
    card.text = f"\n{card.text.strip()}\n"
    return card


def card_data(
    held: Folder, name: str, results: Sequence[Result], base_model: str | None
) -> ModelCardData:
    """The metadata that the Hub reads."""
    tags = ["efficientsam3", "sam3", "image-segmentation"]
    if held.is_concept:
        tags.append("promptable-concept-segmentation")
    if held.is_student:
        tags.append("knowledge-distillation")
    datasets = [dataset for stage in held.training for dataset in stage.datasets]
    licence: dict[str, Any] = {"license": "unknown" if held.modules else None}
    if base_model:
        licence = {"license": "other", "license_name": "sam-license", "license_link": LICENCE_FILE}
    return ModelCardData(
        language="en" if held.is_concept else None,
        **licence,
        library_name="transformers",
        pipeline_tag="mask-generation" if held.has_tracker else "zero-shot-object-detection",
        base_model=base_model,
        base_model_relation="finetune" if base_model and held.is_student else None,
        datasets=_unique(dataset for dataset in datasets if _is_hub_id(dataset)) or None,
        metrics=_unique(one_line(result.metric) for result in results) or None,
        tags=tags,
        widget=[
            {key: value for key, value in example.items() if held.is_concept or key != "text"}
            for example in WIDGET
        ],
        model_name=name if results else None,
        eval_results=to_model_index(results) or None,
    )


def card_text(held: Folder, name: str, repo: str, results: Sequence[Result]) -> dict[str, Any]:
    """What the template is filled with."""
    config: Any = held.config
    vision = config.vision_config
    has_point_branch = held.is_concept and config.has_point_branch
    prompts = CONCEPT_PROMPTS if held.is_concept else []
    if has_point_branch:
        prompts = prompts + POINT_PROMPTS
    if held.has_tracker:
        prompts = prompts + TRACKER_PROMPTS
    donated = [part["part"] for part in _parts(held.manifest) if part["from"] == "donor"]
    return {
        "marker": MARKER,
        "prose": prose,
        "code": code,
        "block": block,
        "name": name,
        "repo": json.dumps(repo, ensure_ascii=False),
        "is_concept": held.is_concept,
        "is_student": held.is_student,
        "is_lateral": held.has_own_vision and vision.neck == "lateral",
        "has_weights": bool(held.modules),
        "has_tracker": held.has_tracker,
        "has_memory": held.has_memory,
        "has_point_branch": has_point_branch,
        "has_remote_code": held.has_remote_code,
        "students": describe_students(held),
        "prompts": prompts,
        "sizes": describe_sizes(held),
        "modules": list(held.modules.items()),
        "settings": describe_settings(results),
        "small_objects": describe_small_objects(held),
        "image_size": config.image_size,
        "context_length": config.context_length if held.is_concept else None,
        "attends_to_padding": held.has_own_text and config.text_config.attend_to_padding,
        "donated": prose(", ".join(donated)),
        "training": held.training,
        "manifest": held.manifest,
        "is_changed": held.is_changed,
        "origins": describe_origins(held.manifest),
        "text_licence": describe_text_licence(held),
    }


def find_base_model(held: Folder) -> str | None:
    """What the weights derive from, as far as records say: a converted release, or a teacher."""
    if held.manifest is not None:
        return SAM3
    teachers = [one_line(stage.teacher) for stage in held.training]
    return next((teacher for teacher in teachers if "/" in teacher and _is_hub_id(teacher)), None)


def describe_students(held: Folder) -> str:
    """What stands in for which part of SAM 3."""
    students = []
    if held.has_own_vision:
        trunk = held.config.vision_config.backbone_config.trunk
        students.append(f"the trunk `{trunk}` in place of its vision transformer")
    if held.has_own_text:
        text = held.config.text_config
        students.append(
            f"a MobileCLIP text tower of {text.num_hidden_layers} layers and width "
            f"{text.hidden_size} in place of its text encoder"
        )
    return " and ".join(students)


def describe_sizes(held: Folder) -> list[tuple[str, str]]:
    """Rows of the table of sizes."""
    config: Any = held.config
    vision = config.vision_config
    side, patch = config.image_size, vision.backbone_config.patch_size
    grid = side // patch
    rows = [
        ("image", f"{side} × {side} pixels"),
        ("tokens", f"{grid} × {grid}, one for {patch} × {patch} pixels"),
        ("masks", f"{4 * grid} × {4 * grid}, then resized to the image"),
        ("trunk", _name_trunk(held)),
    ]
    if held.is_concept:
        length, text = config.context_length, config.text_config
        rows.append(("text tower", f"{text.num_hidden_layers} layers, width {text.hidden_size}"))
        rows.append(("phrase", f"{length} tokens"))
    if held.modules:
        concept = sum(n for name, n in held.modules.items() if not name.startswith("tracker_"))
        tracker = sum(n for name, n in held.modules.items() if IMAGE_TRACKER.fullmatch(name))
        if held.is_concept:
            rows.append(("parameters of the concept model", f"{concept:,}"))
            if held.has_tracker:
                trunk = held.modules["vision_encoder.backbone"]
                rows.append(
                    ("parameters of the tracker on images", f"{trunk + tracker:,}, trunk shared")
                )
        rows.append(("parameters stored", f"{sum(held.modules.values()):,}"))
        rows.append(("stored as", f"{', '.join(held.dtypes)}; {held.size / 1e6:,.1f} MB"))
    return rows


def describe_small_objects(held: Folder) -> str:
    """How finely the image is seen."""
    vision: Any = held.config.vision_config
    side = held.config.image_size
    if not held.has_own_vision:
        patch = vision.backbone_config.patch_size
        return f"One token of the image encoder covers {patch} × {patch} of {side} × {side} pixels."
    if vision.neck == "lateral":
        return (
            "The detector looks for objects on a grid of 16 × 16 pixels; only the masks see the "
            "finer maps of the trunk."
        )
    return (
        f"Everything is made of the trunk's last map, of which one cell covers 32 × 32 of "
        f"{side} × {side} pixels: what is smaller than a cell shares it with its surroundings."
    )


def describe_settings(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Results by what they have in common: one command on one split, on one machine, on one day."""
    settings: dict[tuple, dict[str, Any]] = {}
    for result in results:
        shared = {
            name: value
            for name, value in asdict(result).items()
            if name not in ("metric", "value", "benchmark_task")
        }
        setting = settings.setdefault(tuple(shared.values()), {**shared, "numbers": []})
        setting["numbers"].append((result.metric, result.value))
    return list(settings.values())


def describe_origins(manifest: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """For each converted part the files it is from, and their digests."""
    rows = []
    for part in _parts(manifest):
        given = (manifest or {})[part["from"]]["files"]
        origin = " (donor)" if part["from"] == "donor" else ""
        rows.append(
            (
                part["part"],
                ", ".join(code(file["file"]) for file in given) + origin,
                ", ".join(code(file["sha256"]) for file in given),
            )
        )
    return rows


def describe_text_licence(held: Folder) -> str | None:
    """What is not known about the licence of the text tower; None where nothing is open."""
    if not held.has_own_text or not held.modules:
        return None
    # What the first stage that names the tower says; later stages go on from there.
    origins = [stage.initial_weights.get(TEXT_TOWER) for stage in held.training]
    origin = next((origin for origin in origins if origin), None)
    if origin == "random":
        return None
    if origin is None:
        start = (
            "It has the architecture of Apple's MobileCLIP, and no record in this folder says "
            "whether its training started from Apple's weights."
        )
    else:
        start = f"Its training started from {prose(origin)}."
    return (
        f"{start} Apple's are licensed for research only, and so is what derives from them "
        "([LICENSE_MODELS](https://github.com/apple/ml-mobileclip/blob/main/LICENSE_MODELS)). "
        "Settle that before any other use."
    )


def _name_trunk(held: Folder) -> str:
    vision: Any = held.config.vision_config
    if not held.has_own_vision:
        return "SAM 3's vision transformer"
    fused = ", fused" if vision.backbone_config.fused else ""
    return f"`{vision.backbone_config.trunk}`{fused}, `{vision.neck}` neck"


def _parts(manifest: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [] if manifest is None else manifest["parts"]


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _asset(name: str) -> Any:
    return files("efficientsam3_hf") / "assets" / name
