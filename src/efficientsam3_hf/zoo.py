"""The model zoo: names, their configurations and processors, and the Hub folders they stand for."""

import copy
import os
from pathlib import Path

from .embedded import embedded
from .hub.model_card import write_model_card
from .models.checkpoint_layout import join_weights
from .models.configuration_efficientsam3 import EfficientSam3Config
from .models.image_processing_efficientsam3 import EfficientSam3ImageProcessor
from .models.modeling_efficientsam3 import EfficientSam3Model
from .models.modeling_efficientsam3_tracker import EfficientSam3TrackerModel
from .models.modeling_efficientsam3_tracker_video import (
    EfficientSam3TrackerVideoModel,
    image_tracker_config,
)
from .models.processing_efficientsam3 import EfficientSam3Processor
from .models.variants import config, names
from .tokenizer import build_tokenizer

__all__ = ["config", "embedded", "names", "processor", "save"]


def processor(variant: str | EfficientSam3Config) -> EfficientSam3Processor:
    """The processor of a variant: its image size and its context length.

    Args:
        variant: Name in the zoo, or a configuration made from one.
    """
    configuration = config(variant) if isinstance(variant, str) else variant
    size = configuration.image_size
    mask_size = 4 * (size // configuration.vision_config.backbone_config.patch_size)
    image_processor = EfficientSam3ImageProcessor(
        size={"height": size, "width": size},
        mask_size={"height": mask_size, "width": mask_size},
        score_temperature=configuration.score_temperature,
        score_bias=configuration.score_bias,
    )
    tokenizer = build_tokenizer(configuration.context_length, configuration.words)
    return EfficientSam3Processor(image_processor, tokenizer)


def save(
    variant: str | EfficientSam3Config,
    folder: str | os.PathLike,
    model: EfficientSam3Model | None = None,
    tracker: EfficientSam3TrackerModel | EfficientSam3TrackerVideoModel | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write the Hub folder of a variant: configuration, processor, tokenizer, card, any weights.

    Args:
        variant: Name in the zoo, or a configuration made from one. Beside a model, whose own
            configuration counts, it is not looked at.
        folder: Where to write. Without a model, one that holds weights already is refused.
        model: Concept model whose weights to store. Without a tracker beside it, the folder serves
            the concept model only.
        tracker: Tracker whose weights to store beside them; its trunk must be the model's, and is
            stored once. One in video has all weights of one on images, and serves both.
        repo_id: Where the folder goes on the Hub, for the card.
    """
    if model is None:
        if tracker is not None:
            raise ValueError("A tracker shares its trunk with the concept model: give that too.")
        refuse_weights_in(folder)
        configuration = config(variant) if isinstance(variant, str) else copy.deepcopy(variant)
        configuration.save_pretrained(folder)
    else:
        check_models(model, tracker)
        configuration = copy.deepcopy(model.config)
        configuration.tracker_config = configuration.tracker_video_config = None
        if tracker is not None:
            configuration.tracker_config = copy.deepcopy(image_tracker_config(tracker.config))
        if isinstance(tracker, EfficientSam3TrackerVideoModel):
            configuration.tracker_video_config = copy.deepcopy(tracker.config)
        save_weights(model, configuration, folder, tracker)
    processor(configuration).save_pretrained(folder)
    write_model_card(folder, repo_id and repo_id.split("/")[-1], repo_id)
    return Path(folder)


def refuse_weights_in(folder: str | os.PathLike) -> None:
    """Raise if a folder holds weights, which would be read under another configuration."""
    patterns = ("*.safetensors", "pytorch_model*.bin")
    weights = [file.name for pattern in patterns for file in sorted(Path(folder).glob(pattern))]
    if weights:
        raise ValueError(
            f"{os.fspath(folder)} holds weights ({weights[0]}), which a new configuration would "
            "not fit. Give the model they belong to, delete them, or choose another folder."
        )


def check_models(model: object, tracker: object) -> None:
    """Raise if these are not a concept model and a tracker of one size."""
    trackers = (EfficientSam3TrackerModel, EfficientSam3TrackerVideoModel, type(None))
    if not isinstance(model, EfficientSam3Model) or not isinstance(tracker, trackers):
        raise TypeError(
            "save takes an EfficientSam3Model and a tracker beside it, in this order, not a "
            f"{type(model).__name__} and a {type(tracker).__name__}."
        )
    if tracker is not None and tracker.config.image_size != model.config.image_size:
        raise ValueError(
            f"The tracker is for images of {tracker.config.image_size} pixels, the concept model "
            f"for {model.config.image_size}: one folder has one size. Load one with the other's "
            "image_size."
        )


def save_weights(
    model: EfficientSam3Model,
    configuration: EfficientSam3Config,
    folder: str | os.PathLike,
    tracker: EfficientSam3TrackerModel | EfficientSam3TrackerVideoModel | None,
) -> None:
    """Write weights under a configuration that is not the model's own, which stays as it is."""
    weights = None
    if tracker is not None:
        weights = join_weights(model.state_dict(), tracker.state_dict())
    own = model.config
    model.config = configuration
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.config = own
