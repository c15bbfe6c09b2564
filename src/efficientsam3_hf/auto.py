"""Makes the family known to transformers' Auto classes, without importing it before it is used.

Importing the package must not cost an import of torch and of every model. So registration waits
until transformers loads its Auto classes, and then registers stand-ins: classes that carry the name
of the real one and become it on first use.
"""

import importlib
import importlib.abc
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from .embedded import NOTE, embedded

logger = logging.getLogger(__name__)

MODELS = f"{__package__}.models"

# Public class -> module of `models/` that defines it.
CLASSES = {
    "EfficientSam3Backbone": "modeling_efficientsam3_vision",
    "EfficientSam3VisionModel": "modeling_efficientsam3_vision",
    "EfficientSam3TextModel": "modeling_efficientsam3_text",
    "EfficientSam3Model": "modeling_efficientsam3",
    "EfficientSam3TrackerModel": "modeling_efficientsam3_tracker",
    "EfficientSam3TrackerVideoModel": "modeling_efficientsam3_tracker_video",
    "EfficientSam3VideoModel": "modeling_efficientsam3_video",
    "EfficientSam3VideoSession": "video_session",
    "EfficientSam3ConceptSession": "concept_session",
    "EfficientSam3ImageProcessor": "image_processing_efficientsam3",
    "EfficientSam3Processor": "processing_efficientsam3",
    "EfficientSam3TrackerProcessor": "processing_efficientsam3_tracker",
    "EfficientSam3TrackerVideoProcessor": "processing_efficientsam3_tracker_video",
    "EfficientSam3VideoProcessor": "processing_efficientsam3_video",
}

# Auto class -> (configuration, class) rows.
MODEL_ROWS = {
    "AutoModel": [
        ("EfficientSam3BackboneConfig", "EfficientSam3Backbone"),
        ("EfficientSam3VisionConfig", "EfficientSam3VisionModel"),
        ("EfficientSam3TextConfig", "EfficientSam3TextModel"),
        ("EfficientSam3TrackerConfig", "EfficientSam3TrackerModel"),
        ("EfficientSam3TrackerVideoConfig", "EfficientSam3TrackerVideoModel"),
        ("EfficientSam3VideoConfig", "EfficientSam3VideoModel"),
        ("EfficientSam3Config", "EfficientSam3Model"),
    ],
    "AutoModelForMaskGeneration": [
        ("EfficientSam3TrackerConfig", "EfficientSam3TrackerModel"),
        ("EfficientSam3Config", "EfficientSam3TrackerModel"),
    ],
    "AutoModelForZeroShotObjectDetection": [("EfficientSam3Config", "EfficientSam3Model")],
}
PROCESSOR_ROWS = [
    ("EfficientSam3Config", "EfficientSam3Processor"),
    ("EfficientSam3TrackerConfig", "EfficientSam3TrackerProcessor"),
    ("EfficientSam3TrackerVideoConfig", "EfficientSam3TrackerVideoProcessor"),
    ("EfficientSam3VideoConfig", "EfficientSam3VideoProcessor"),
]


def load_class(name: str) -> type:
    """A public class of `models/`, imported now."""
    return getattr(importlib.import_module(f"{MODELS}.{CLASSES[name]}"), name)


class StandIn(type):
    """Metaclass of classes that defer to the class of the same name."""

    def __getattr__(cls, attribute: str) -> Any:
        return getattr(load_class(cls.__name__), attribute)

    def __call__(cls, *args, **kwargs) -> Any:
        return load_class(cls.__name__)(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, load_class(cls.__name__))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, load_class(cls.__name__))


def stand_in(name: str, config_class: type | None = None) -> type:
    """A class that becomes the public class `name` on first use."""
    members = {} if config_class is None else {"config_class": config_class}
    return StandIn(name, (), {"__module__": f"{MODELS}.{CLASSES[name]}", **members})


def configurations() -> ModuleType:
    """The module of configurations, which registers them with `AutoConfig` itself."""
    return importlib.import_module(f"{MODELS}.configuration_efficientsam3")


def register_models(modeling_auto: ModuleType) -> None:
    """Tell the model Auto classes which class goes with which configuration."""
    for auto_class, rows in MODEL_ROWS.items():
        for config_name, class_name in rows:
            config_class = getattr(configurations(), config_name)
            getattr(modeling_auto, auto_class).register(
                config_class, stand_in(class_name, config_class), exist_ok=True
            )


def register_processors(processing_auto: ModuleType) -> None:
    """Tell `AutoProcessor` which processor goes with which configuration."""
    for config_name, class_name in PROCESSOR_ROWS:
        processing_auto.AutoProcessor.register(
            getattr(configurations(), config_name), stand_in(class_name), exist_ok=True
        )


def register_image_processor(module: ModuleType) -> None:
    """Load the image processor, which tells `AutoImageProcessor` of itself.

    A stand-in will not do, since `AutoImageProcessor` looks at the bases of what it is given. While
    the base is still being imported, nothing is done: the same callback comes when it is complete.
    """
    base = sys.modules.get(SAM3_IMAGE_PROCESSING)
    if base is None or hasattr(base, "Sam3ImageProcessor"):
        importlib.import_module(f"{MODELS}.{CLASSES['EfficientSam3ImageProcessor']}")


def register_pipelines(module: ModuleType) -> None:
    """Load the pipeline of concepts, which tells `pipeline` of itself."""
    importlib.import_module(f"{__package__}.pipelines")


class SpokenDefault(dict[str, Any]):
    """The model that `pipeline` takes if none is named. It says what it is when it is taken."""

    def __getitem__(self, key: str) -> Any:
        logger.warning(NOTE.format(how="pipeline(task, model=...), a folder or name on the Hub"))
        return super().__getitem__(key)


def register_embedded(pipelines: ModuleType) -> None:
    """Let the pipeline of concepts run without a model being named.

    Not in `pipelines.py`, which writes what it registers into the folders that it saves.
    """
    tasks = pipelines.PIPELINE_REGISTRY.supported_tasks
    default = SpokenDefault(model=(os.fspath(embedded()), None))  # at no revision
    tasks[pipelines.TASK] = {**tasks[pipelines.TASK], "default": default}


def register_cards(pushing: ModuleType) -> None:
    """Let models that are pushed take along the card that this package writes."""

    def write(folder: Path, repo_id: str) -> bool:
        model_card = importlib.import_module(f"{__package__}.hub.model_card")
        return model_card.write_pushed_card(folder, repo_id)

    pushing.CARD_WRITERS.append(write)


AUTO = "transformers.models.auto"
SAM3_IMAGE_PROCESSING = "transformers.models.sam3.image_processing_sam3"
CALLBACKS: dict[str, Callable[[ModuleType], Any]] = {
    f"{MODELS}.pushing": register_cards,
    f"{AUTO}.configuration_auto": lambda module: configurations(),
    f"{AUTO}.modeling_auto": register_models,
    f"{AUTO}.processing_auto": register_processors,
    f"{AUTO}.image_processing_auto": register_image_processor,
    SAM3_IMAGE_PROCESSING: register_image_processor,
    "transformers.pipelines": register_pipelines,
    f"{__package__}.pipelines": register_embedded,
}


class AfterImport(importlib.abc.MetaPathFinder):
    """Import hook that calls back when certain modules have been loaded."""

    def __init__(self, callbacks: dict[str, Callable[[ModuleType], Any]]):
        self.waiting = dict(callbacks)

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        callback = self.waiting.pop(fullname, None)
        if callback is None:
            return None
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)  # this finder now leaves the module to the others
        if spec is not None and spec.loader is not None:
            spec.loader = LoaderWithCallback(spec.loader, callback)
        return spec


class LoaderWithCallback(importlib.abc.Loader):
    """A loader that runs a callback when the module is complete."""

    def __init__(self, loader: importlib.abc.Loader, callback: Callable[[ModuleType], Any]):
        self.loader = loader
        self.callback = callback

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.callback(module)


def register() -> None:
    """Register the family now with the Auto classes that are loaded, and later with the others."""
    later = {}
    for name, callback in CALLBACKS.items():
        if name in sys.modules:
            callback(sys.modules[name])
        else:
            later[name] = callback
    if later:
        sys.meta_path.insert(0, AfterImport(later))
