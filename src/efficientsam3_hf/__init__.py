"""EfficientSAM3 for Hugging Face transformers: SAM 3 distilled for phones, robots and laptops.

Importing the package makes transformers' Auto classes know the family. Models load when used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import auto

if TYPE_CHECKING:
    from . import zoo
    from .models.configuration_efficientsam3 import (
        EfficientSam3BackboneConfig,
        EfficientSam3Config,
        EfficientSam3TextConfig,
        EfficientSam3TrackerConfig,
        EfficientSam3TrackerVideoConfig,
        EfficientSam3VisionConfig,
    )
    from .models.image_processing_efficientsam3 import EfficientSam3ImageProcessor
    from .models.modeling_efficientsam3 import EfficientSam3Model
    from .models.modeling_efficientsam3_text import EfficientSam3TextModel
    from .models.modeling_efficientsam3_tracker import EfficientSam3TrackerModel
    from .models.modeling_efficientsam3_tracker_video import EfficientSam3TrackerVideoModel
    from .models.modeling_efficientsam3_vision import (
        EfficientSam3Backbone,
        EfficientSam3VisionModel,
    )
    from .models.processing_efficientsam3 import EfficientSam3Processor
    from .models.processing_efficientsam3_tracker import EfficientSam3TrackerProcessor
    from .models.processing_efficientsam3_tracker_video import EfficientSam3TrackerVideoProcessor
    from .models.video_session import EfficientSam3VideoSession
    from .pipelines import PromptableConceptSegmentationPipeline

__version__ = "0.1.0"

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
    "EfficientSam3VideoSession",
    "EfficientSam3VisionConfig",
    "EfficientSam3VisionModel",
    "PromptableConceptSegmentationPipeline",
    "zoo",
]

auto.register()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name == "zoo":
        return importlib.import_module(f"{__name__}.zoo")
    if name == "PromptableConceptSegmentationPipeline":
        return importlib.import_module(
            f"{__name__}.pipelines"
        ).PromptableConceptSegmentationPipeline
    if name in auto.CLASSES:
        return auto.load_class(name)
    if name in __all__:
        return getattr(auto.configurations(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
