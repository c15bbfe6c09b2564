"""Students, the stages that each of them goes through, and what is left out to see what it is for.

The stages are those of `examples/train_distill.py`, with the files of `configs/`.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from conversion.folder import atomic_folder
from efficientsam3_hf.distillation.cache_files import checksum, write_json
from efficientsam3_hf.distillation.family import Family, new_student
from efficientsam3_hf.distillation.launch import prepare
from efficientsam3_hf.distillation.memory_terms import TERMS as MEMORY_TERMS
from efficientsam3_hf.distillation.prompt_losses import CONCEPT_TERMS
from efficientsam3_hf.distillation.stage3_concepts import MAP_TERMS, ConceptTrainer
from efficientsam3_hf.hub.model_card import write_model_card

from .student import student_config, write_student

CONFIGS = Path(__file__).parent / "configs"
ROUTE = {
    "image": "stage1_image",
    "text": "stage1_text",
    "prompts": "stage1_prompts",
    "memory": "stage2_memory",
    "joint": "stage3_joint",
}
DONE = "done.json"
WEIGHTS_FILE = "model.safetensors"
FOLDER = "{folder}"

Flags = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Change:
    """Settings of a stage that are not those of its file.

    Args:
        name: For the folder.
        flags: As `train_distill.py` takes them; `FOLDER` in them is that of the whole miniature.
    """

    name: str
    flags: Flags


@dataclass(frozen=True)
class Student:
    """What one row of a table is about.

    Args:
        title: Of the row.
        neck, memory: As in `student_config`; of memory there is none before its stage.
        seed: Of weights and data.
        share: Of the steps that the files of its stages say.
        route: Its stages, keys of `ROUTE`, in their order.
        changes: Stage -> what is otherwise.
    """

    title: str
    neck: str = "lateral"
    memory: str = "perceiver"
    seed: int = 0
    share: float = 1.0
    route: tuple[str, ...] = tuple(ROUTE)
    changes: Mapping[str, Change] = field(default_factory=dict)

    def new(self, root: Path) -> Path:
        """Folder of its configuration."""
        length = "" if self.share == 1 else f"-{self.share:g}"
        return root / "students" / f"{self.neck}-{self.seed}{length}"

    def steps(self, stage: str) -> str:
        """Of a stage, as `train_distill.py` takes them."""
        return str(round(self.share * STEPS[stage]))

    def folders(self, root: Path) -> dict[str, Path]:
        """Stage -> its folder. What students have in common up to a stage is made once.

        >>> Student("a", route=("image", "joint")).folders(Path("m"))["joint"].as_posix()
        'm/students/lateral-0/image.joint'
        """
        names: list[str] = []
        folders = {}
        for stage in self.route:
            other = self.changes[stage].name if stage in self.changes else ""
            if stage == "memory" and self.memory != "perceiver":
                other = self.memory
            names.append(f"{stage}-{other}" if other else stage)
            folders[stage] = self.new(root) / ".".join(names)
        return folders

    def last(self, root: Path) -> Path:
        """The folder it is in when all is done."""
        return list(self.folders(root).values())[-1]


def settings_of(stage: str) -> dict:
    """What the file of a stage says."""
    return yaml.safe_load((CONFIGS / f"{ROUTE[stage]}.yaml").read_text(encoding="utf-8"))


def zero(terms: Iterable[str]) -> dict[str, str]:
    """Leave terms of a loss out."""
    return {"training.loss_weights": json.dumps(dict.fromkeys(terms, 0.0))}


def from_cache(codec: str) -> dict[str, Change]:
    """Stage 1 from the teacher's features on disk."""
    flags = {"teacher.cache": f"{FOLDER}/caches/{codec}", "data.augment": "flip"}
    return {"image": Change(codec, flags)}


# The student that is shipped, and what it looks like with other random numbers.
MAIN = Student("student")
SEEDS = tuple(replace(MAIN, seed=seed) for seed in range(3))

# What ablations are compared with: all in their table have as short a training.
BASE = Student("nothing left out", share=0.25)
BASES = tuple(replace(BASE, seed=seed) for seed in range(3))

# What stage 3 has of the teacher.
OF_ANSWERS = (
    *CONCEPT_TERMS,
    *(f"clip_{name}" for name in MEMORY_TERMS if name.startswith("teacher_")),
)
OF_TEACHER = (*OF_ANSWERS, *MAP_TERMS, "clip_features", "clip_pointers")

STEPS: dict[str, int] = {stage: settings_of(stage)["training"]["max_steps"] for stage in ROUTE}


def short(*stages: str) -> str:
    """Steps of some stages together in a training as short as those of ablations."""
    return str(sum(int(BASE.steps(stage)) for stage in stages))


# Stage 3 for a student that has learned nothing before: batch norms measure, and the text tower
# learns, too.
FROM_NOTHING: dict[str, str | Sequence[str]] = {
    "training.freeze_norms": "false",
    "training.trained_parts": (
        *ConceptTrainer.trained_parts,
        *("text", "tracker"),
    ),
    "training.learning_rate": "1e-3",
}
POSITIVES = {"data.negatives": "0"}

NO_DISTILLATION = "no distillation: the truth alone, as many steps as all stages"
ABLATIONS = (
    BASE,
    replace(
        BASE,
        title=NO_DISTILLATION,
        route=("joint",),
        changes={
            "joint": Change(
                "truth-alone",
                {
                    **FROM_NOTHING,
                    **zero(OF_TEACHER),
                    "training.max_steps": short(*ROUTE),
                },
            )
        },
    ),
    replace(
        BASE,
        title="stage 3 alone, as many steps as stages 2 and 3",
        route=("joint",),
        changes={
            "joint": Change(
                "alone",
                {**FROM_NOTHING, "training.max_steps": short("memory", "joint")},
            )
        },
    ),
    replace(BASE, title="without prompts in the loop", route=("image", "text", "memory", "joint")),
    replace(
        BASE,
        title="without negatives",
        changes={
            "prompts": Change("positives", POSITIVES),
            # Nothing to calibrate with.
            "joint": Change("positives", {**POSITIVES, "calibration.share": "0"}),
        },
    ),
    replace(
        BASE,
        title="stage 3 without the teacher's answers",
        changes={"joint": Change("no-answers", zero(OF_ANSWERS))},
    ),
    replace(BASE, title="dense memory", memory="dense"),
    replace(BASE, title="neck of SAM 3", neck="sam3"),
    replace(
        BASE,
        title="neck of SAM 3, from a cache of 16 bits",
        neck="sam3",
        changes=from_cache("fp16"),
    ),
    replace(
        BASE, title="neck of SAM 3, from a cache of 8 bits", neck="sam3", changes=from_cache("int8")
    ),
)


def train(student: Student, root: Path, more: Flags) -> None:
    """Lead a student through its stages; those that are done are kept.

    Args:
        student: Which.
        root: Folder of the whole miniature, with `teacher` and `data`.
        more: Flags for every stage.
    """
    teacher = root / "teacher"
    weights = digest(teacher)
    parent = student.new(root)
    if not (parent / "config.json").is_file():
        write_student(parent, student.neck)
    for stage, folder in student.folders(root).items():
        if stage == "memory" and student.memory != "perceiver":
            parent = with_memory(student, parent, teacher, root)
        if is_done(folder):
            check_teacher(folder, weights)
        else:
            print(f"{student.title}, {stage}: {folder}", flush=True)
            change = student.changes.get(stage, Change("", {}))
            flags: dict[str, str | Sequence[str]] = {
                **paths(stage, root / "data"),
                "student.name": str(parent),
                "student.pretrained_trunk": "false",  # nothing is downloaded
                "teacher.name": str(teacher),
                "training.output_dir": str(folder),
                "training.resume_from_checkpoint": "true",  # if it was stopped
                "training.seed": str(student.seed),
                "training.max_steps": student.steps(stage),
                **change.flags,
                **more,
            }
            began = time.monotonic()
            prepare(CONFIGS / f"{ROUTE[stage]}.yaml", words_of(flags, root)).train()
            minutes = (time.monotonic() - began) / 60
            write_json(folder / DONE, {"minutes": minutes, "teacher": weights})
        parent = folder


def words_of(flags: Flags, root: Path) -> list[str]:
    """Flags as words of a command line."""
    words = []
    for name, value in flags.items():
        values = [value] if isinstance(value, str) else value
        words += [f"--{name}", *(each.replace(FOLDER, str(root)) for each in values)]
    return words


def with_memory(student: Student, parent: Path, teacher: Path, root: Path) -> Path:
    """The folder of a student as it is before its memory, with another kind of memory."""
    folder = student.new(root) / f"{parent.name}-{student.memory}"
    if not folder.is_dir():
        family = new_student(Family.load(teacher), student_config(student.neck, student.memory))
        family.take(Family.load(parent).state_dict(), strict=False)
        with atomic_folder(folder) as unfinished:
            family.save(unfinished)
            write_model_card(unfinished, folder.name)
    return folder


def digest(folder: Path) -> str:
    """What tells the weights in a folder from others."""
    return checksum(folder / WEIGHTS_FILE)


def is_done(folder: Path) -> bool:
    """Whether a stage was trained to its end."""
    return (folder / DONE).is_file()


def check_teacher(folder: Path, weights: str) -> None:
    """Raise if a stage was distilled from another teacher."""
    if json.loads((folder / DONE).read_text(encoding="utf-8"))["teacher"] != weights:
        raise ValueError(
            f"{folder} was distilled from another teacher than the one that is there now. Remove "
            "it, or take another folder for the whole."
        )


def stage_minutes(folder: Path) -> float:
    """How long a stage took, since it was last started."""
    return json.loads((folder / DONE).read_text(encoding="utf-8"))["minutes"]


def paths(stage: str, data: Path) -> dict[str, str]:
    """Where a stage finds its data."""
    if stage == "text":
        return {"data.root": str(data / "phrases.txt")}
    if stage == "memory":
        return {"data.root": str(data / "train/clips"), "data.eval_root": str(data / "val/clips")}
    flags = {}
    for split, prefix in (("train", ""), ("val", "eval_")):
        folder = data / split / "images"
        annotations = folder / f"gold_synthetic_merged_a_release_{split}.json"
        flags[f"data.{prefix}root"] = str(folder / "images")
        flags[f"data.{prefix}annotations"] = str(annotations)
    if stage == "joint":
        flags["clips.root"] = str(data / "train/clips")
    return flags
