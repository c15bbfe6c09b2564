"""What a saved folder needs to load without this package: the code, and where Auto classes find it.

transformers calls it remote code. Whatever is saved, a folder gets every file that loads any class
of the family, and names one of them, `remote_code.py`, for each Auto class. One for all, because
transformers copies each file that is named, with all it imports, to a place of its own if the
folder is a local one: a model from one place does not know the configuration from another.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .pushing import replace_form

ENTRY = "remote_code"

# What is saved -> Auto class -> what it loads from the folder.
AUTO_CLASSES = {
    "EfficientSam3Config": {
        "AutoConfig": "EfficientSam3Config",
        "AutoModel": "EfficientSam3Model",
        "AutoModelForMaskGeneration": "EfficientSam3TrackerModel",
        "AutoModelForZeroShotObjectDetection": "EfficientSam3Model",
    },
    "EfficientSam3TrackerConfig": {
        "AutoConfig": "EfficientSam3TrackerConfig",
        "AutoModel": "EfficientSam3TrackerModel",
        "AutoModelForMaskGeneration": "EfficientSam3TrackerModel",
    },
    "EfficientSam3TrackerVideoConfig": {
        "AutoConfig": "EfficientSam3TrackerVideoConfig",
        "AutoModel": "EfficientSam3TrackerVideoModel",
    },
    "EfficientSam3VideoConfig": {
        "AutoConfig": "EfficientSam3VideoConfig",
        "AutoModel": "EfficientSam3VideoModel",
    },
    "EfficientSam3VisionConfig": {
        "AutoConfig": "EfficientSam3VisionConfig",
        "AutoModel": "EfficientSam3VisionModel",
    },
    "EfficientSam3BackboneConfig": {
        "AutoConfig": "EfficientSam3BackboneConfig",
        "AutoModel": "EfficientSam3Backbone",
    },
    "EfficientSam3TextConfig": {
        "AutoConfig": "EfficientSam3TextConfig",
        "AutoModel": "EfficientSam3TextModel",
    },
    "EfficientSam3Processor": {"AutoProcessor": "EfficientSam3Processor"},
    "EfficientSam3TrackerProcessor": {"AutoProcessor": "EfficientSam3TrackerProcessor"},
    "EfficientSam3TrackerVideoProcessor": {"AutoProcessor": "EfficientSam3TrackerVideoProcessor"},
    "EfficientSam3VideoProcessor": {"AutoProcessor": "EfficientSam3VideoProcessor"},
    "EfficientSam3ImageProcessor": {"AutoImageProcessor": "EfficientSam3ImageProcessor"},
}


class SelfContainedMixin:
    """Makes `save_pretrained` write the code along."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to do: what is saved always names its Auto classes."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs
    ) -> Any:
        """As in transformers; the folder also gets the code that loads it without the package."""
        copy_code(save_directory)
        return super().save_pretrained(  # pyright: ignore  of the class that this is mixed into
            os.fspath(save_directory),  # a processor that is also pushed takes no other
            push_to_hub=push_to_hub,
            **kwargs,
        )

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict, **kwargs
    ) -> Any:
        """As in transformers, which would leave out the code, since it is there before the rest."""
        replace_form(Path(working_dir), repo_id, type(self).__name__)
        code = code_files()
        timestamps = {file: time for file, time in files_timestamps.items() if file not in code}
        return super()._upload_modified_files(  # pyright: ignore  of the class this is mixed into
            working_dir, repo_id, timestamps, **kwargs
        )


class SelfContainedConfigMixin(SelfContainedMixin):
    """For configurations. Models save theirs, and so the code, too."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> Any:
        """As in transformers; the folder also gets the code that loads it without the package."""
        self.auto_map = auto_map(self)
        return super().save_pretrained(save_directory, *args, **kwargs)


class SelfContainedProcessorMixin(SelfContainedMixin):
    """For processors, alone or as part of another."""

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; also tells Auto classes what to load."""
        return {**super().to_dict(), "auto_map": auto_map(self)}  # pyright: ignore  as above


def auto_map(saved: SelfContainedMixin) -> dict[str, str]:
    """What `auto_map` says in the folder of a configuration or processor, or of a subclass."""
    name = next(base.__name__ for base in type(saved).__mro__ if base.__name__ in AUTO_CLASSES)
    result = {auto: f"{ENTRY}.{loaded}" for auto, loaded in AUTO_CLASSES[name].items()}
    if getattr(saved, "tracker_config", saved) is None:
        del result["AutoModelForMaskGeneration"]
    return result


def code_files() -> dict[str, Path]:
    """The files of the family by their names."""
    entry = Path(__file__).with_name(f"{ENTRY}.py")
    files = {entry.name: entry}
    return files | {Path(file).name: Path(file) for file in get_relative_import_files(entry)}


def copy_code(folder: str | os.PathLike) -> list[Path]:
    """Write the files of the family into a folder, and return where they are."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(file, Path(folder) / name)) for name, file in code_files().items()]
