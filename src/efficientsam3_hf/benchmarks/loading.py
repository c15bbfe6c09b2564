"""Any model of the family, SAM 3 itself or EdgeTAM, loaded for a job by what its folder says.

load("facebook/sam3", "objects")                     transformers' Sam3TrackerModel
load("folder/of/efficientsam3", "concepts")          EfficientSam3Model
"""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from .. import auto

# Job -> type of the configuration in the folder -> model and processor.
OURS_CONCEPTS = ("EfficientSam3Model", "EfficientSam3Processor")
OURS_OBJECTS = ("EfficientSam3TrackerModel", "EfficientSam3TrackerProcessor")
OURS_TRACKS = ("EfficientSam3TrackerVideoModel", "EfficientSam3TrackerVideoProcessor")
OURS_CONCEPT_TRACKS = ("EfficientSam3VideoModel", "EfficientSam3VideoProcessor")
CONCEPTS = {
    "efficientsam3": OURS_CONCEPTS,
    "efficientsam3_video": OURS_CONCEPTS,
    "sam3": ("Sam3Model", "Sam3Processor"),
    "sam3_video": ("Sam3Model", "Sam3Processor"),
    "sam3_lite_text": ("Sam3LiteTextModel", "Sam3Processor"),
}
JOBS: dict[str, dict[str, tuple[str, str]]] = {
    "concepts": CONCEPTS,
    "objects": {
        "efficientsam3": OURS_OBJECTS,
        "efficientsam3_tracker": OURS_OBJECTS,
        "efficientsam3_tracker_video": OURS_OBJECTS,
        "sam3_video": ("Sam3TrackerModel", "Sam3TrackerProcessor"),
        "sam3_tracker": ("Sam3TrackerModel", "Sam3TrackerProcessor"),
        "edgetam": ("EdgeTamModel", "Sam2Processor"),
        "edgetam_video": ("EdgeTamModel", "Sam2Processor"),
        "sam2": ("Sam2Model", "Sam2Processor"),
        "sam2_video": ("Sam2Model", "Sam2Processor"),
    },
    "tracks": {
        "efficientsam3": OURS_TRACKS,
        "efficientsam3_tracker_video": OURS_TRACKS,
        "sam3_video": ("Sam3TrackerVideoModel", "Sam3TrackerVideoProcessor"),
        "sam3_tracker_video": ("Sam3TrackerVideoModel", "Sam3TrackerVideoProcessor"),
        "edgetam_video": ("EdgeTamVideoModel", "Sam2VideoProcessor"),
        "sam2_video": ("Sam2VideoModel", "Sam2VideoProcessor"),
    },
    "concept tracks": {
        "efficientsam3": OURS_CONCEPT_TRACKS,
        "efficientsam3_video": OURS_CONCEPT_TRACKS,
        "sam3_video": ("Sam3VideoModel", "Sam3VideoProcessor"),
    },
}


# Files beside the weights that change what a model says.
SETTINGS = (
    "config.json",
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)


@dataclass
class Loaded:
    """A model that is ready to run.

    Args:
        name: Folder or Hub name.
        model: In evaluation mode, on its device.
        processor: Beside it.
        device: Where the model runs.
        dtype: Of its weights and inputs.
    """

    name: str
    model: Any
    processor: Any
    device: torch.device
    dtype: torch.dtype

    def to_device(self, inputs: Any) -> dict[str, Any]:
        """Inputs where the model takes them."""
        return {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in dict(inputs).items()
        }


def load(
    name: str,
    job: str,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
) -> Loaded:
    """Load a model and its processor for one job.

    Args:
        name: Folder that `from_pretrained` reads, or name on the Hub.
        job: One of `JOBS`.
        device: Where it runs.
        dtype: Of its weights.
    """
    precision = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return load_once(name, fingerprint(name), job, torch.device(device), precision)


@lru_cache(maxsize=2)  # a student and its teacher, or what the next task takes as well
def load_once(
    name: str, weights: str, job: str, device: torch.device, dtype: torch.dtype
) -> Loaded:
    """As `load`; what was loaded last is at hand. `weights` tells other files from the same."""
    model_class, processor_class = (class_of(each) for each in names_of(name, job))
    model, info = model_class.from_pretrained(name, dtype=dtype, output_loading_info=True)
    # transformers fills what it does not find with random numbers, and only warns.
    if missing := sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])]):
        raise ValueError(
            f"{name} lacks {len(missing)} weights of {model_class.__name__}, for example "
            f"{missing[0]}: it cannot do {job!r}. Was it saved with all of its parts?"
        )
    model = model.eval().requires_grad_(False).to(device)
    return Loaded(name, model, processor_class.from_pretrained(name), device, dtype)


def names_of(name: str, job: str) -> tuple[str, str]:
    """Names of the model and processor class that do a job with what is in a folder."""
    model_type = model_type_of(name)
    if model_type not in JOBS[job]:
        jobs = [each for each, types in JOBS.items() if model_type in types]
        can = f"it can do {', '.join(jobs)}" if jobs else "nothing here can be done with it"
        raise ValueError(f"{name} is a {model_type!r} and cannot do {job!r}; {can}.")
    return JOBS[job][model_type]


def can_do(name: str, job: str) -> bool:
    """Whether what is in a folder can do a job, as far as its configuration says."""
    config = config_of(name)
    if config["model_type"] not in JOBS[job]:
        return False
    if config["model_type"] != "efficientsam3" or job == "concepts":
        return True
    parts = ["tracker_config"] if job == "objects" else ["tracker_config", "tracker_video_config"]
    return any(config.get(part) is not None for part in parts)


def model_type_of(name: str) -> str:
    """The `model_type` of a folder's configuration."""
    return config_of(name)["model_type"]


def config_of(name: str) -> dict[str, Any]:
    """What the configuration says, as it is written."""
    if os.path.exists(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"{name} holds no model: it has no config.json.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except OSError as error:
        raise OSError(f"{name} is no folder, and not to be had from the Hub: {error}") from error
    if "model_type" not in config:
        raise ValueError(f"{name} has a config.json without model_type: it is no model.")
    return config


def class_of(name: str) -> Any:
    """A public class of ours or of transformers."""
    return auto.load_class(name) if name in auto.CLASSES else getattr(transformers, name)


def fingerprint(name: str) -> str:
    """What changes when the weights do: the commit on the Hub, or the files of a folder."""
    config, folder = config_of(name), Path(name)
    if not folder.is_dir():
        return str(config.get("_commit_hash"))
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for path in (folder / name for name in SETTINGS if (folder / name).is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()
