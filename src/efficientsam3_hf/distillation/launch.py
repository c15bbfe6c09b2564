"""One command for every stage: a file and flags become student, teacher, data and a trainer.

    run = prepare("examples/configs/stage1_text.yaml", ["--training.num_train_epochs", "3"])
    run.train()

A stage is a row of `STAGES`. The sections of a configuration are those of `SECTIONS`.
"""

import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch.utils.data import Subset
from transformers import AutoConfig, TrainingArguments, set_seed

from .. import zoo
from ..data.augmentations import ChooseInstances, ChooseQueries
from ..data.collators import ClipCollator, ImageCollator, PhraseCollator, PictureCollator
from ..data.images_with_clips import ImagesWithClips, ImagesWithClipsCollator
from ..data.loading import SampleStream, WithoutGaps
from ..models.configuration_efficientsam3 import EfficientSam3Config
from ..models.processing_efficientsam3 import EfficientSam3Processor
from ..tokenizer import build_tokenizer
from .arguments import (
    DistillationArguments,
    build,
    check_known,
    default_of,
    option,
    read_values,
)
from .cached_features import CachedTeacherFeatures
from .data_settings import DataSettings, load_samples
from .family import Family, new_student
from .stage1_image import ImageDistillationArguments, ImageDistillationTrainer
from .stage1_prompts import PromptDistillationArguments, PromptDistillationTrainer
from .stage1_text import TextDistillationArguments, TextDistillationTrainer
from .stage2_memory import MemoryDistillationArguments, MemoryDistillationTrainer
from .stage3_concepts import ConceptTrainer, ConceptTrainingArguments
from .stage3_joint import JointTrainer, JointTrainingArguments
from .teacher import Teacher, load_teacher, loading_whole
from .teacher_cache import TeacherCache
from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass
class StageSettings:
    """Which stage. `stage: NAME` says the same in short."""

    name: str = option("", "Name of the stage.")


@dataclass
class StudentSettings:
    """What is trained. `student: NAME` is enough where the rest stays as it is."""

    name: str = option(
        "",
        "A variant of the zoo, or a folder with a configuration and no weights: a new student made "
        "from the teacher. Or the folder of a student, which goes on from there.",
    )
    pretrained_trunk: bool = option(
        True, "A new student's trunk starts from timm's ImageNet weights, not at random."
    )
    memory: Literal["perceiver", "dense"] | None = option(
        None, "A new student's memory of videos, other than its configuration's."
    )
    image_size: int | None = option(None, "A new student's side of images in pixels.")


@dataclass
class TeacherSettings:
    """What is learned from. `teacher: NAME` is enough where the rest stays as it is."""

    name: str = option("facebook/sam3", "A SAM 3: a folder, or a name on the Hub.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("bfloat16", "Precision it runs in.")
    tracker: bool = option(True, "Load its tracker, too; false for a teacher without one.")
    compile: bool = option(False, "Compile its trunk with torch.compile.")
    cache: str | None = option(
        None, "Folder of its features, as `efficientsam3 cache-teacher` writes them."
    )
    clip_cache: str | None = option(None, "Those of the section clips.")


@dataclass
class CalibrationSettings:
    """What is done at the end of stage 3 to the scores: a temperature and a bias, found by data.

    Where there is nothing to evaluate on, nothing is done.
    """

    share: float = option(
        0.2,
        "Share of the images to evaluate on that is taken for it, and never evaluated on; 0 leaves "
        "scores as they are.",
    )
    most_false_positives: float = option(
        0.02, "Largest share of phrases that name nothing for which something may be found."
    )

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise ValueError(f"share={self.share} must be at least 0 and less than 1.")


@dataclass(frozen=True)
class Stage:
    """What a stage is made of.

    Args:
        arguments: Dataclass of the section `training`.
        trainer: The stage itself.
        samples: What it learns from: a key of `data_settings.FORMATS`.
        collator: Makes the collator, given the run and whether it is for training, when samples
            are augmented, or for evaluation.
        with_clips: Whether it learns from the clips of the section `clips`, too.
        calibrates: Whether the scores of its student are calibrated at the end.
    """

    arguments: type[DistillationArguments]
    trainer: type[DistillationTrainer]
    samples: str
    collator: Callable[["Run", bool], Any]
    with_clips: bool = False
    calibrates: bool = False


def collate_pictures(run: "Run", training: bool) -> Any:
    """Pixels alone, at the student's size and, if it is another, at the teacher's."""
    collate = PictureCollator(
        run.processor.image_processor,
        run.augmentations if training else [],
        teacher_processor=run.teacher_processor.image_processor,
    )
    return CachedTeacherFeatures(run.cache, collate) if training and run.cache else collate


def collate_prompted(run: "Run", training: bool) -> Any:
    """Pictures with some of their phrases, and of these some of the instances."""
    settings: Any = run.training
    most = max(settings.prompts_per_image, settings.concepts_per_image)
    choices = [
        ChooseQueries(run.data.positives, run.data.negatives, settings.seed),
        ChooseInstances(most, settings.seed),
    ]
    collate = ImageCollator(
        run.processor,
        augment=[*choices, *(run.augmentations if training else [])],
        teacher_processor=run.teacher_processor.image_processor,
        gives_valid=training and run.data.augment == "all",
    )
    return CachedTeacherFeatures(run.cache, collate) if training and run.cache else collate


def collate_concepts(run: "Run", training: bool) -> Any:
    """Pictures with some of their phrases, and all instances of these."""
    choice = ChooseQueries(run.data.positives, run.data.negatives, run.training.seed)
    collate = ImageCollator(
        run.processor,
        augment=[choice, *(run.augmentations if training else [])],
        teacher_processor=run.teacher_processor.image_processor,
        gives_valid=training and run.data.augment == "all",
    )
    return CachedTeacherFeatures(run.cache, collate) if training and run.cache else collate


def collate_phrases(run: "Run", training: bool) -> PhraseCollator:
    """Token ids, cut to the shorter context of student and teacher."""
    configs = (run.student.configuration, detector_config(run.teacher))
    tokenizer = build_tokenizer(
        min(config.context_length for config in configs), run.student.configuration.words
    )
    processor = EfficientSam3Processor(run.processor.image_processor, tokenizer)
    return PhraseCollator(processor, seed=run.training.seed)


def collate_clips(run: "Run", training: bool) -> Any:
    """Frames, also at the teacher's size if it is another, and the masks of each object."""
    return clip_collator(run, run.data, run.cache, training)


def clip_collator(
    run: "Run", data: DataSettings, cache: TeacherCache | None, training: bool
) -> Any:
    """The same for any clips and their cache."""
    collate = ClipCollator(
        run.processor.image_processor,
        augment=data.augmentations(run.training.seed) if training else [],
        teacher_processor=run.teacher_processor.image_processor,
    )
    return CachedTeacherFeatures(cache, collate) if training and cache else collate


def collate_images_with_clips(run: "Run", training: bool) -> ImagesWithClipsCollator:
    """Pictures with phrases, and clips."""
    clips = clip_collator(run, run.clips, run.clip_cache, training)
    return ImagesWithClipsCollator(collate_concepts(run, training), clips)


# One row for each stage: its arguments, its trainer, what it reads, and how that becomes batches.
STAGES = {
    "stage1_image": Stage(
        ImageDistillationArguments, ImageDistillationTrainer, "pictures", collate_pictures
    ),
    "stage1_prompts": Stage(
        PromptDistillationArguments, PromptDistillationTrainer, "images", collate_prompted
    ),
    "stage1_text": Stage(
        TextDistillationArguments, TextDistillationTrainer, "texts", collate_phrases
    ),
    "stage2_memory": Stage(
        MemoryDistillationArguments, MemoryDistillationTrainer, "clips", collate_clips
    ),
    "stage3_concepts": Stage(
        ConceptTrainingArguments, ConceptTrainer, "images", collate_concepts, calibrates=True
    ),
    "stage3_joint": Stage(
        JointTrainingArguments,
        JointTrainer,
        "images",
        collate_images_with_clips,
        with_clips=True,
        calibrates=True,
    ),
}

SECTIONS = {
    "stage": StageSettings,
    "student": StudentSettings,
    "teacher": TeacherSettings,
    "data": DataSettings,
    "clips": DataSettings,  # of a stage that has both
    "training": DistillationArguments,  # or the stage's own
    "calibration": CalibrationSettings,  # of a stage that has it
}


@dataclass
class Run:
    """All settings of a run; student, teacher and trainer are made when they are asked for."""

    stage: Stage
    student_settings: StudentSettings
    teacher_settings: TeacherSettings
    data: DataSettings
    clips: DataSettings
    training: DistillationArguments
    calibration: CalibrationSettings

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher."""
        settings = self.teacher_settings
        teacher = load_teacher(settings.name, settings.dtype, with_tracker=settings.tracker)
        return teacher.compile() if settings.compile else teacher

    @cached_property
    def cache(self) -> TeacherCache | None:
        """Features of the teacher on disk, if there is a folder of them."""
        return self.open_cache(self.teacher_settings.cache, self.data)

    @cached_property
    def clip_cache(self) -> TeacherCache | None:
        """Those of the section `clips`."""
        return self.open_cache(self.teacher_settings.clip_cache, self.clips)

    def open_cache(self, folder: str | None, data: DataSettings) -> TeacherCache | None:
        """A cache of what is learned from, if there is one and it can be used."""
        if folder is None:
            return None
        if data.augment == "all":
            raise ValueError(
                "Cached features are of pictures as they are, or flipped: set data.augment to none "
                "or, if the cache was written with flips, to flip."
            )
        transform = self.teacher_processor.image_processor
        cache = TeacherCache.open(folder, self.teacher, transform)
        if cache.manifest.kind == "clip" and data.clip_place != "start":
            raise ValueError(
                "Cached features of clips are of the first cut of each video: set clip_place to "
                "start, and clip_length and clip_step as the cache was written with."
            )
        return cache

    @cached_property
    def student(self) -> Family:
        """A new student, or the one that goes on."""
        settings = self.student_settings
        if self.parent is not None:
            with loading_whole():  # who shards it does so later
                return Family.load(settings.name)
        config = student_config(settings)
        if not self.teacher_settings.tracker:
            config.tracker_config = config.tracker_video_config = None
        has_trunk = config.vision_config.model_type == "efficientsam3_vision"
        set_seed(self.training.seed)  # for what starts at random
        # Out of the files: the weights of `self.teacher` are rounded to its precision.
        with loading_whole():
            return new_student(
                self.teacher_settings.name,
                config,
                has_trunk and settings.pretrained_trunk,
                settings.memory,
            )

    @property
    def parent(self) -> str | None:
        """The folder that the student comes from; None for a new one."""
        name = self.student_settings.name
        return None if is_variant(name) or is_empty(name) else name

    @cached_property
    def processor(self) -> EfficientSam3Processor:
        """The student's."""
        return zoo.processor(self.student.configuration)

    @cached_property
    def teacher_processor(self) -> EfficientSam3Processor:
        """The teacher's."""
        return zoo.processor(detector_config(self.teacher))

    @property
    def augmentations(self) -> list:
        """What is done to samples in training."""
        return self.data.augmentations(self.training.seed)

    @cached_property
    def trainer(self) -> DistillationTrainer:
        """The trainer, ready to start."""
        options = {"clip_cache": self.clip_cache} if self.stage.with_clips else {}
        return self.stage.trainer(
            model=self.student,
            args=self.training,
            teacher=self.teacher,
            parent=self.parent,
            cache=self.cache,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            data_collator=self.stage.collator(self, True),
            eval_collator=self.stage.collator(self, False),
            **options,
        )

    @property
    def train_dataset(self) -> Any:
        """What is learned from."""
        settings: Any = self.training
        samples = load_samples(self.data, self.stage.samples, settings.seed)
        if not self.stage.with_clips:
            return samples if isinstance(samples, SampleStream) else WithoutGaps(samples)
        clips = load_samples(self.clips, "clips", settings.seed)
        return ImagesWithClips(samples, clips, settings.images_per_clip, settings.seed)

    @property
    def eval_dataset(self) -> Any:
        """What the student is evaluated on, images and clips apart; None for nothing."""
        _, samples = self.held_out
        if not self.stage.with_clips:
            return samples
        both = {"images": samples, "clips": load_evaluation(self.clips, "clips")}
        return {name: each for name, each in both.items() if each is not None} or None

    @cached_property
    def held_out(self) -> tuple[Any, Any]:
        """What scores are calibrated on and what is evaluated on, apart; None for nothing."""
        samples = load_evaluation(self.data, self.stage.samples)
        share = self.calibration.share if self.stage.calibrates else 0.0
        if samples is None or not share:
            return None, samples
        # Each so-and-so-many-th, and the rest.
        is_taken = [int((n + 1) * share) > int(n * share) for n in range(len(samples))]
        taken = [number for number, is_one in enumerate(is_taken) if is_one]
        left = [number for number, is_one in enumerate(is_taken) if not is_one]
        return Subset(samples, taken) if taken else None, Subset(samples, left)

    def calibrate(self) -> None:
        """Set the scores of the student right, or say why they are left as they are."""
        samples, _ = self.held_out
        trainer: Any = self.trainer
        if samples is None:
            logger.warning(
                "Scores are not calibrated: calibration.share of the images to evaluate on is none."
            )
            return
        try:
            trainer.calibrate(samples, self.calibration.most_false_positives)
        except ValueError as error:  # a student that is always right, or never
            logger.warning("Scores are not calibrated. %s", error)

    def train(self) -> None:
        """Train, keep the student, evaluate it, and push it if that was asked for."""
        trainer = self.trainer
        trainer.train(resume_from_checkpoint=resume_point(self.training))
        if self.stage.calibrates:
            self.calibrate()
        trainer.save_model(_internal_call=True)  # pushed below, once
        trainer.save_state()
        if trainer.eval_dataset is not None:
            metrics = trainer.evaluate()
            trainer.log_metrics("eval", metrics)
            trainer.save_metrics("eval", metrics)
        if self.training.push_to_hub:
            trainer.push_to_hub()


def prepare(path: str | Path | None, flags: Sequence[str] = ()) -> Run:
    """A run out of a configuration and flags.

    Args:
        path: YAML file with the sections of `SECTIONS`; None for flags alone.
        flags: What is to be otherwise, such as `["--training.learning_rate", "1e-3"]`.
    """
    return make_run(read_values(path, flags, list(SECTIONS)))


def make_run(values: Mapping[str, Mapping[str, Any]]) -> Run:
    """A run out of the settings of each section, as they were written; a section may be missing."""
    values = {**{section: {} for section in SECTIONS}, **values}
    name = build("stage", values["stage"], StageSettings).name
    if not name:
        raise ValueError(f"Say what to do: stage is one of {', '.join(STAGES)}.")
    check_known(name, list(STAGES), "stage")
    stage = STAGES[name]
    if values["clips"] and not stage.with_clips:
        raise ValueError(f"{name} has no section clips: what it learns from is its section data.")
    if values["calibration"] and not stage.calibrates:
        raise ValueError(f"{name} has no section calibration: that is done after stage 3.")
    student = build("student", values["student"], StudentSettings)
    if not student.name:
        raise ValueError("Say what to train: student.name is a variant of the zoo or a folder.")
    run = Run(
        stage,
        student,
        build("teacher", values["teacher"], TeacherSettings),
        build("data", values["data"], DataSettings),
        build("clips", values["clips"], DataSettings),
        build("training", values["training"], stage.arguments),
        build("calibration", values["calibration"], CalibrationSettings),
    )
    run.data.check_format(stage.samples)
    if stage.with_clips:
        run.clips.check_format("clips")
    return run


def load_evaluation(data: DataSettings, kind: str) -> Any:
    """The samples that `eval_` settings name; None if there are none."""
    settings = data.for_evaluation()
    return None if settings is None else load_samples(settings, kind)


def resume_point(training: DistillationArguments) -> str | bool | None:
    """What to resume from: a folder, True for the last checkpoint, or None to begin."""
    given = training.resume_from_checkpoint
    words: dict[Any, bool | None] = {"true": True, "false": None, "none": None}
    return words.get(given.lower(), given) if isinstance(given, str) else given or None


def is_variant(name: str) -> bool:
    """Whether the zoo knows this name. A folder of that name goes first."""
    return not Path(name).exists() and "/" not in name


def is_empty(name: str) -> bool:
    """Whether this is a folder without weights."""
    folder = Path(name)
    return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS)


def detector_config(teacher: Teacher) -> EfficientSam3Config:
    """The configuration of the teacher's concept model."""
    if teacher.detector is None:
        raise ValueError(f"{teacher.name} is a tracker alone: give a SAM 3 with its detector.")
    return teacher.detector.config


def student_config(settings: StudentSettings) -> EfficientSam3Config:
    """The configuration of a new student."""
    sizes = {} if settings.image_size is None else {"image_size": settings.image_size}
    if is_variant(settings.name):
        return zoo.config(settings.name, **sizes)
    config = AutoConfig.from_pretrained(settings.name, **sizes)
    if not isinstance(config, EfficientSam3Config):
        raise ValueError(f"{settings.name} configures a {config.model_type!r}, not a student.")
    return config


def explain(stage: str | None = None) -> str:
    """All settings, each with its default, in words.

    Args:
        stage: Whose `training` section to show; None for what all stages share.
    """
    sections = {**SECTIONS}
    if stage is not None:
        check_known(stage, list(STAGES), "stage")
        sections["training"] = STAGES[stage].arguments
    lines = [f"Stages: {', '.join(STAGES)}."]
    for name, kind in sections.items():
        summary = (kind.__doc__ or "").splitlines()[0]
        if name == "clips":
            lines += ["", "clips: The same settings as data, for clips beside images."]
            continue
        lines += ["", f"{name}: {summary}"]
        inherited = {each.name: default_of(each) for each in fields(TrainingArguments)}
        hints = get_type_hints(kind)
        for entry in fields(kind):
            default = default_of(entry)
            if name == "training" and default == inherited.get(entry.name, MISSING):
                continue
            text = f"--{name}.{entry.name} ({default!r})  {entry.metadata.get('help', '')}"
            if choices := choices_of(hints[entry.name]):
                text += f" One of {', '.join(choices)}."
            lines += textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="      ")
    lines += [
        "",
        "In the section training, too: all other arguments of transformers' TrainingArguments, as",
        "  output_dir, num_train_epochs, max_steps, per_device_train_batch_size,",
        "  gradient_accumulation_steps, bf16, torch_compile, save_steps, eval_strategy, report_to,",
        "  dataloader_num_workers, resume_from_checkpoint (a folder, or true for the last one),",
        "  push_to_hub, hub_model_id.",
    ]
    return "\n".join(lines)


def choices_of(hint: Any) -> list[str]:
    """The values that a type allows, if it names them.

    >>> choices_of(Literal["perceiver", "dense"] | None)
    ['perceiver', 'dense']
    """
    kinds = [hint, *get_args(hint)]
    return [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
