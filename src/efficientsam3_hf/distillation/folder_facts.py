"""Distilling on a folder: what there is, and what follows from it for each stage."""

import hashlib
import json
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig

from ..benchmarks.running import processes
from ..data.broken import DAMAGE
from ..data.own_folder import OwnImages, phrases_for
from .arguments import build
from .cache_files import MANIFEST, DiskFullError
from .data_settings import DataSettings, load_samples
from .folder_plan import LOOKS_THAT_PAY, MOST_OF_DISK, Speeds, measure_teacher, size
from .folder_settings import FolderSettings, read_phrases, split_names
from .folder_stages import (
    RECIPES,
    TEXT_BATCH,
    Show,
    StageFolder,
    can_be_cached,
    choose_stages,
    show_nothing,
    steps_of,
)
from .launch import Run, StudentSettings, detector_config, make_run, student_config
from .teacher import Teacher, load_teacher, own_settings
from .teacher_labels import LabelFolder, Labeller

DECISIONS = "settings.json"
# Settings that change how a stage runs, and nothing of what comes of it.
HARMLESS = (
    "output_dir",
    "dataloader_num_workers",
    "use_cpu",
    "ddp_backend",
    "disable_tqdm",
    "resume_from_checkpoint",
    "save_strategy",
    "save_steps",
    "logging_steps",
)
SAVE_STEPS = 500


class FolderFacts:
    """What there is in a folder and on disk, and what follows from it for each stage.

    Args:
        settings: What to do.
        show: Gives what counts a number of things under a title; None shows nothing.
    """

    def __init__(self, settings: FolderSettings, show: Show | None = None):
        check_devices(settings)
        self.settings = settings
        self.show: Show = show or show_nothing
        self.output, self.work = Path(settings.output), Path(settings.output, "work")
        self.check_output()
        self.phrases = read_phrases(Path(settings.phrases))
        self.pictures = OwnImages(settings.images, self.phrases)
        self.names = [name for name, _ in self.pictures.records()]
        self.parts = split_names(self.names, settings.held_out, settings.images)
        self.student_config = student_config(StudentSettings(settings.student))
        self.labels = LabelFolder(self.work / "labels" / "pictures", self.pictures)
        self.next_run: tuple[str, Run] | None = None  # whose student the plan has built

    def check_output(self) -> None:
        """Raise if the output is the folder of something else."""
        if not self.output.exists():
            return
        if not self.output.is_dir():
            raise ValueError(f"--output {self.output} is a file.")
        strange = [each.name for each in self.output.iterdir() if each.name != "work"]
        if strange and not (self.work / DECISIONS).is_file():
            raise ValueError(
                f"--output {self.output} holds something else ({sorted(strange)[0]}): choose a "
                "folder that is new or empty, or that an earlier run of this command began."
            )

    # What there is.

    @property
    def state(self) -> PartialState:
        """The processes of this run; anew each time, as a trainer sets them up for itself."""
        return processes(self.settings.device)

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.state.device or torch.device("cpu")

    @property
    def is_on_cuda(self) -> bool:
        """Whether half precision is known to work."""
        return self.settings.device.startswith("cuda")

    @property
    def workers(self) -> int:
        """Processes that read and decode."""
        if self.settings.workers is None:
            return 0 if self.settings.is_on_cpu else 4
        return self.settings.workers

    @cached_property
    def all_phrases(self) -> list[str]:
        """Every phrase, once."""
        asked = [phrase for name in self.names for phrase in phrases_for(self.phrases, name)]
        if not asked:
            raise ValueError(
                f"{self.settings.phrases} has no phrase for any picture of {self.settings.images}: "
                "pictures are named by their path in the folder."
            )
        return list(dict.fromkeys(asked))

    @cached_property
    def has_tracker(self) -> bool:
        """Whether the teacher's folder has a tracker in video."""
        config: Any = AutoConfig.from_pretrained(self.settings.teacher)
        if config.model_type == "efficientsam3":
            return config.tracker_video_config is not None
        return config.model_type == "sam3_video"

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, on its device."""
        dtype = "bfloat16" if self.is_on_cuda else "float32"
        return load_teacher(self.settings.teacher, dtype, self.has_tracker).to(self.device)

    @cached_property
    def labeller(self) -> Labeller:
        """Asks the teacher."""
        settings = self.settings
        return Labeller(self.teacher, self.all_phrases, settings.confidence, settings.absent)

    @cached_property
    def stages(self) -> list[str]:
        """The stages that the student needs."""
        teacher = detector_config(self.teacher)
        return choose_stages(self.student_config, teacher, self.settings.prompts)

    @cached_property
    def cacheable(self) -> list[str]:
        """Those that can take the teacher's features from disk."""
        teacher = detector_config(self.teacher)
        return [each for each in self.stages if can_be_cached(each, self.student_config, teacher)]

    @cached_property
    def caches(self) -> bool:
        """Whether the teacher's features are cached; decided once for all runs of a folder."""
        if self.settings.cache == "no" or not self.cacheable:
            return False
        decisions = self.work / DECISIONS
        if self.settings.cache == "auto" and decisions.is_file():
            return json.loads(decisions.read_text(encoding="utf-8"))["caches"]
        needed, free = self.cache_bytes, free_bytes(self.output)
        if self.settings.cache == "auto":
            looks = sum(self.steps_of(each) * self.samples_of_step(each) for each in self.cacheable)
            pays = looks >= LOOKS_THAT_PAY * len(self.parts["train"])
            return pays and needed <= MOST_OF_DISK * free
        if needed > free and not (self.work / "cache" / MANIFEST).is_file():
            raise DiskFullError(
                f"The cache takes {size(needed)}, and {size(free)} are free for {self.output}: "
                "make room, or leave --cache yes out"
            )
        return True

    @property
    def cache_bytes(self) -> int:
        """Of the teacher's features of all pictures to learn from, and of their mirror images."""
        return self.measured[1] * len(self.parts["train"])

    @cached_property
    def measured(self) -> tuple[Speeds, int]:
        """The teacher's speeds on the first picture that can be read, and bytes of its features."""
        for name in self.names:
            try:
                sample = self.pictures.read({"name": name})
            except DAMAGE:
                continue
            phrases = self.labels.phrases_of(name) or self.all_phrases[:1]
            return measure_teacher(self.teacher, self.labeller, sample.image, phrases)
        raise ValueError(f"None of the {len(self.names)} pictures can be read.")

    # Settings of the stages.

    def batch_of(self, stage: str) -> int:
        """Samples of a step of one process."""
        own = self.overrides(stage, "training").get("per_device_train_batch_size")
        if own is not None:
            return int(own)
        is_text = stage == "stage1_text"
        return min(TEXT_BATCH, self.text_count) if is_text else self.settings.batch

    def samples_of_step(self, stage: str) -> int:
        """Samples of a step of all processes."""
        return self.batch_of(stage) * self.state.num_processes

    def steps_of(self, stage: str) -> int:
        """Steps of the optimiser."""
        own = self.overrides(stage, "training").get("max_steps")
        if own is not None:
            return int(own)
        samples = self.text_count if stage == "stage1_text" else len(self.parts["train"])
        settings = self.settings
        per_step = self.samples_of_step(stage)
        return steps_of(stage, samples, per_step, settings.steps, settings.epochs)

    @cached_property
    def text_count(self) -> int:
        """Phrases that a text tower learns: those of the list, unless others are given."""
        own = self.overrides("stage1_text", "data")
        if "root" not in own:
            return len(self.all_phrases)
        return len(load_samples(build("data", {"format": "phrases", **own}, DataSettings), "texts"))

    def overrides(self, stage: str, section: str) -> dict[str, Any]:
        """Settings that were given for a section of a stage."""
        return self.settings.overrides.get(stage, {}).get(section, {})

    def folder_of(self, stage: str) -> StageFolder:
        """Where a stage works."""
        return StageFolder(self.work / stage)

    def part(self, name: str) -> Path:
        """The labels of a part, in SA-Co's form."""
        return self.work / "labels" / f"{name}.json"

    def takes_cache(self, stage: str) -> bool:
        """Whether a stage takes the teacher's features from disk."""
        return self.caches and stage in self.cacheable

    def data_of(self, stage: str) -> dict[str, Any]:
        """Its section `data`."""
        if stage == "stage1_text":
            texts = self.overrides(stage, "data").get("root", self.settings.phrases)
            return {
                "format": "phrases",
                "root": str(self.work / "labels" / "phrases.json"),
                "name": f"phrases of {Path(texts).name}",
            }
        images = Path(self.settings.images)
        values = {
            "format": "saco",
            "root": str(images),
            "annotations": str(self.part("train")),
            "upright": True,
            "name": f"folder {images.resolve().name}, labelled by the teacher",
            "augment": "flip" if self.takes_cache(stage) else "all",
        }
        if self.part("validation").is_file():
            values["eval_annotations"] = str(self.part("validation"))
        return values

    def training_of(self, stage: str) -> dict[str, Any]:
        """Its section `training`."""
        settings, is_on_cpu = self.settings, self.settings.is_on_cpu
        save_steps = int(self.overrides(stage, "training").get("save_steps", SAVE_STEPS))
        values = {
            "output_dir": str(self.folder_of(stage).folder),
            **RECIPES[stage].training,
            "max_steps": self.steps_of(stage),
            "per_device_train_batch_size": self.batch_of(stage),
            "per_device_eval_batch_size": settings.batch,
            "seed": settings.seed,
            "bf16": self.is_on_cuda,
            "use_cpu": is_on_cpu,
            "ddp_backend": "gloo" if is_on_cpu and self.state.num_processes > 1 else None,
            "dataloader_num_workers": self.workers,
            # The end of a stage is saved in any case.
            "save_strategy": "steps" if self.steps_of(stage) > save_steps else "no",
            "save_steps": save_steps,
            "save_total_limit": 1,
            "logging_steps": 50,
            "disable_tqdm": True,
            "resume_from_checkpoint": "true",
        }
        if stage in ("stage1_prompts", "stage3_concepts"):
            values["confidence"] = settings.confidence
        if stage == "stage1_prompts" and not self.has_tracker:
            values["prompts_per_image"] = 0
        return values

    def run_of(self, stage: str) -> Run:
        """A stage, ready to be trained from where the one before ended."""
        if self.next_run is not None and self.next_run[0] == stage:
            run = self.next_run[1]
        else:
            before = self.stages[: self.stages.index(stage)]
            parent = str(self.folder_of(before[-1]).folder) if before else self.settings.student
            sections: dict[str, dict[str, Any]] = {
                "stage": {"name": stage},
                "student": {
                    "name": parent,
                    "pretrained_trunk": self.settings.pretrained_trunk,
                },
                "teacher": {
                    "name": self.settings.teacher,
                    "tracker": self.has_tracker,
                    "cache": str(self.work / "cache") if self.takes_cache(stage) else None,
                },
                "data": self.data_of(stage),
                "training": self.training_of(stage),
            }
            if stage == "stage3_concepts":
                sections["calibration"] = {"share": 0}  # done at the end, on pictures of its own
            for section, own in self.settings.overrides.get(stage, {}).items():
                sections[section] = {**sections.get(section, {}), **own}
            run = make_run(sections)
            run.teacher = self.teacher  # that is loaded already
            self.next_run = (stage, run)
        # What is on disk may have come since the plan was made.
        run.data = build(
            "data", {**self.data_of(stage), **self.overrides(stage, "data")}, DataSettings
        )
        return run

    @cached_property
    def sources(self) -> dict[str, Any]:
        """By what is known of what everything comes from."""
        settings = self.settings
        asked = [self.labels.phrases_of(name) for name in self.names]
        hashes = {n: v for n, v in self.teacher.hashes.items() if n.startswith("detector.")}
        return {
            "teacher": digest([hashes, own_settings(detector_config(self.teacher))]),
            "precision": str(self.teacher.dtype).removeprefix("torch."),
            "phrases": digest(asked),
            "pictures": digest(self.names),
            "held_out": settings.held_out,
            "confidence": settings.confidence,
            "absent": settings.absent,
        }

    def identity(self, stage: str) -> dict[str, Any]:
        """What decides what comes of a stage, but for the one before."""
        training = {**self.training_of(stage), **self.overrides(stage, "training")}
        others = {
            f"{section}.{name}": str(value)
            for section, values in self.settings.overrides.get(stage, {}).items()
            for name, value in values.items()
            if section != "training"
        }
        return {
            **self.sources,
            "student": digest(own_settings(self.student_config)),
            "pretrained_trunk": self.settings.pretrained_trunk,
            "cache": self.takes_cache(stage),
            **{f"training.{n}": str(v) for n, v in training.items() if n not in HARMLESS},
            **others,
        }


def check_devices(settings: FolderSettings) -> None:
    """Raise if one process would have to share itself out among GPUs, which no stage can."""
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if settings.device.startswith("cuda") and is_alone and torch.cuda.device_count() > 1:
        raise ValueError(
            f"This machine has {torch.cuda.device_count()} GPUs. Choose one with "
            "CUDA_VISIBLE_DEVICES=0, or use all: accelerate launch -m efficientsam3_hf.cli "
            "distill ..."
        )


def free_bytes(folder: Path) -> int:
    """Free where a folder is, or will be."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def digest(content: Any) -> str:
    """A short text that changes when content does."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
