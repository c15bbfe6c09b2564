"""What a folder of weights holds: configuration, parameters, records. No weight is loaded."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import sha_fileobj
from safetensors import safe_open

from ..models.configuration_efficientsam3 import EfficientSam3Config, EfficientSam3TrackerConfig
from .results import MANIFEST_FILE, TrainingRecord, read_training

# What a file holds beside parameters: statistics of batch norms, and the tracker's fixed table.
BUFFERS = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked"
    r"|shared_(image_)?embedding\.positional_embedding)$"
)
IMAGE_TRACKER = re.compile(
    r"tracker_neck|tracker_model\.(vision_encoder|prompt_encoder|mask_decoder"
    r"|shared_image_embedding|no_memory_embedding)"
)

KINDS = {kind.model_type: kind for kind in (EfficientSam3Config, EfficientSam3TrackerConfig)}


@dataclass(frozen=True)
class Folder:
    """What a folder holds.

    Args:
        config: Of the concept model, or of a tracker alone.
        modules: Modules to their parameters, under the names of a folder for all tasks; empty where
            there are no weights.
        dtypes: How the parameters are stored.
        size: Bytes of the weights.
        manifest: The record of a conversion.
        is_changed: Whether the weights are others than that conversion wrote.
        training: Stages of training, in their order.
        has_remote_code: Whether the code lies beside the weights.
    """

    config: EfficientSam3Config | EfficientSam3TrackerConfig
    modules: dict[str, int]
    dtypes: tuple[str, ...]
    size: int
    manifest: dict[str, Any] | None
    is_changed: bool
    training: list[TrainingRecord]
    has_remote_code: bool

    @property
    def is_concept(self) -> bool:
        """Whether there is a concept model, and not a tracker alone."""
        return isinstance(self.config, EfficientSam3Config)

    @property
    def has_tracker(self) -> bool:
        """Whether the weights, or else the configuration, have a tracker."""
        if not self.is_concept:
            return True
        if self.modules:
            return any(name.startswith("tracker_model.") for name in self.modules)
        return self.config.tracker_config is not None

    @property
    def has_memory(self) -> bool:
        """Whether a tracker has what it takes to follow objects through video."""
        return any(
            name.startswith("tracker_model.") and not IMAGE_TRACKER.fullmatch(name)
            for name in self.modules
        )

    @property
    def has_own_text(self) -> bool:
        """Whether the text tower is a small one, and not SAM 3's."""
        return self.is_concept and self.config.text_config.model_type == "efficientsam3_text"

    @property
    def is_student(self) -> bool:
        """Whether any part of it is not SAM 3's."""
        return self.has_own_vision or self.has_own_text

    @property
    def has_own_vision(self) -> bool:
        """Whether the vision encoder is a student, and not SAM 3's."""
        return self.config.vision_config.model_type == "efficientsam3_vision"


def has_card(folder: Path) -> bool:
    """Whether a folder holds what a card is about, and not a part of it."""
    return (_read_json(folder / "config.json") or {}).get("model_type") in KINDS


def read_folder(folder: Path) -> Folder:
    """Look into a folder: configuration, headers of the weights, records."""
    fields = _read_json(folder / "config.json")
    if fields is None or fields.get("model_type") not in KINDS:
        found = "there is none" if fields is None else f"it says {fields.get('model_type')!r}"
        raise ValueError(
            f"A card needs a config.json whose model_type is {' or '.join(KINDS)}; in {folder} "
            f"{found}. Save the model there first."
        )
    weights = find_weights(folder)
    is_concept = fields["model_type"] == EfficientSam3Config.model_type
    modules, dtypes = count_parameters(weights, is_concept)
    manifest = _read_json(folder / MANIFEST_FILE)
    return Folder(
        config=KINDS[fields["model_type"]].from_pretrained(folder),
        modules=modules,
        dtypes=dtypes,
        size=sum(path.stat().st_size for path in weights),
        manifest=manifest,
        is_changed=manifest is not None and _is_changed(weights, manifest),
        training=read_training(folder),
        has_remote_code="auto_map" in fields,
    )


def find_weights(folder: Path) -> list[Path]:
    """The files that `from_pretrained` would read."""
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    index = _read_json(folder / "model.safetensors.index.json") or {"weight_map": {}}
    return sorted({folder / name for name in index["weight_map"].values()})


def count_parameters(
    weights: Sequence[Path], is_concept: bool
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Parameters by module, and how they are stored, from the headers of safetensors files.

    Args:
        weights: The files.
        is_concept: What names without a prefix belong to: the concept model, or a tracker alone.
    """
    modules: dict[str, int] = {}
    dtypes = set()
    for path in weights:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                if BUFFERS.search(name):
                    continue
                part = file.get_slice(name)
                module = _module_of(name, is_concept)
                modules[module] = modules.get(module, 0) + math.prod(part.get_shape())
                dtypes.add(part.get_dtype())
    return modules, tuple(sorted(dtypes))


def _module_of(name: str, is_concept: bool) -> str:
    """The row of the table that a stored name belongs to."""
    name = name.removeprefix("detector_model.")
    if not is_concept and not name.startswith(("tracker_", "vision_encoder.")):
        name = f"tracker_model.{name}"
    depth = 2 if name.startswith(("vision_encoder.", "tracker_model.")) else 1
    return ".".join(name.split(".")[:depth])


def _is_changed(weights: Sequence[Path], manifest: dict[str, Any]) -> bool:
    written = {file["file"]: file["sha256"] for file in manifest["target"]}
    for path in weights:
        with path.open("rb") as file:
            if sha_fileobj(file).hex() != written.get(path.name):
                return True
    return False


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
