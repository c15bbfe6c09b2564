"""Where Auto classes enter the code of a saved folder; the package itself does not use this file.

It imports every public class, and makes known what the files of the models do not.
"""

# Used elsewhere; named here, as transformers says how to install what this file imports.
import ftfy  # noqa: F401
import timm  # noqa: F401
import torchvision  # noqa: F401
from transformers.models.auto import AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING

from .configuration_efficientsam3 import (
    EfficientSam3BackboneConfig,
    EfficientSam3Config,
    EfficientSam3TextConfig,
    EfficientSam3TrackerConfig,
    EfficientSam3TrackerVideoConfig,
    EfficientSam3VideoConfig,
    EfficientSam3VisionConfig,
)
from .image_processing_efficientsam3 import EfficientSam3ImageProcessor
from .modeling_efficientsam3 import EfficientSam3Model
from .modeling_efficientsam3_text import EfficientSam3TextModel
from .modeling_efficientsam3_tracker import EfficientSam3TrackerModel
from .modeling_efficientsam3_tracker_video import EfficientSam3TrackerVideoModel
from .modeling_efficientsam3_video import EfficientSam3VideoModel
from .modeling_efficientsam3_vision import EfficientSam3Backbone, EfficientSam3VisionModel
from .processing_efficientsam3 import EfficientSam3Processor
from .processing_efficientsam3_tracker import EfficientSam3TrackerProcessor
from .processing_efficientsam3_tracker_video import EfficientSam3TrackerVideoProcessor
from .processing_efficientsam3_video import EfficientSam3VideoProcessor

__all__ = [
    "EfficientSam3Backbone",
    "EfficientSam3BackboneConfig",
    "EfficientSam3Config",
    "EfficientSam3ImageProcessor",
    "EfficientSam3Model",
    "EfficientSam3Processor",
    "EfficientSam3TextConfig",
    "EfficientSam3TextModel",
    "EfficientSam3TrackerConfig",
    "EfficientSam3TrackerModel",
    "EfficientSam3TrackerProcessor",
    "EfficientSam3TrackerVideoConfig",
    "EfficientSam3TrackerVideoModel",
    "EfficientSam3TrackerVideoProcessor",
    "EfficientSam3VideoConfig",
    "EfficientSam3VideoModel",
    "EfficientSam3VideoProcessor",
    "EfficientSam3VisionConfig",
    "EfficientSam3VisionModel",
]

# The mapping itself, as `AutoModelForMaskGeneration.register` does not take a model whose own
# configuration is another one: a folder for all tasks has the concept model's.
for _configuration in (EfficientSam3Config, EfficientSam3TrackerConfig):
    MODEL_FOR_MASK_GENERATION_MAPPING.register(
        _configuration, EfficientSam3TrackerModel, exist_ok=True
    )

# So that a second folder finds these classes here, and brings no copies of them.
AutoProcessor.register(EfficientSam3Config, EfficientSam3Processor, exist_ok=True)
AutoProcessor.register(EfficientSam3TrackerConfig, EfficientSam3TrackerProcessor, exist_ok=True)
AutoProcessor.register(
    EfficientSam3TrackerVideoConfig, EfficientSam3TrackerVideoProcessor, exist_ok=True
)
AutoProcessor.register(EfficientSam3VideoConfig, EfficientSam3VideoProcessor, exist_ok=True)
