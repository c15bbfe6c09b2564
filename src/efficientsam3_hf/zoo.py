"""The model zoo: names, their configurations and processors, and the Hub folders they stand for."""

import os
from pathlib import Path

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

__all__ = ["config", "names", "processor", "save"]


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
    )
    return EfficientSam3Processor(image_processor, build_tokenizer(configuration.context_length))


def save(
    variant: str | EfficientSam3Config,
    folder: str | os.PathLike,
    model: EfficientSam3Model | None = None,
    tracker: EfficientSam3TrackerModel | EfficientSam3TrackerVideoModel | None = None,
) -> Path:
    """Write the Hub folder of a variant: configuration, processor, tokenizer, and weights if given.

    Args:
        variant: Name in the zoo, or a configuration made from one.
        folder: Where to write.
        model: Concept model whose weights to store.
        tracker: Tracker whose weights to store beside them; its trunk must be the model's, and is
            stored once. One in video has all weights of one on images, and serves both.
    """
    configuration = config(variant) if isinstance(variant, str) else variant
    if model is None and tracker is not None:
        raise ValueError("A tracker shares its trunk with the concept model: give that too.")
    if model is None:
        configuration.save_pretrained(folder)
    elif tracker is None:
        model.save_pretrained(folder)
    else:
        weights = join_weights(model.state_dict(), tracker.state_dict())
        model.config.tracker_config = image_tracker_config(tracker.config)
        is_video = isinstance(tracker, EfficientSam3TrackerVideoModel)
        model.config.tracker_video_config = tracker.config if is_video else None
        model.save_pretrained(folder, state_dict=weights)
    processor(configuration).save_pretrained(folder)
    return Path(folder)
