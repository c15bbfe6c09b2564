"""Students, the stages that each of them goes through, and what is left out to see what it is for.

The stages are those of `examples/train_distill.py`, with the files of `configs/`.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from efficientsam3_hf.distillation.cache_files import write_json
from efficientsam3_hf.distillation.launch import prepare
from efficientsam3_hf.distillation.memory_terms import TERMS as MEMORY_TERMS
from efficientsam3_hf.distillation.prompt_losses import CONCEPT_TERMS
from efficientsam3_hf.distillation.stage3_concepts import MAP_TERMS

from .student import write_student

CONFIGS = Path(__file__).parent / "configs"
ROUTE = {
    "image": "stage1_image",
    "text": "stage1_text",
    "prompts": "stage1_prompts",
    "memory": "stage2_memory",
    "joint": "stage3_joint",
}
DONE = "done.json"
FOLDER = "{folder}"

Flags = Mapping[str, str]


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
        neck, memory: As in `student_config`.
        seed: Of weights and data.
        route: Its stages, keys of `ROUTE`, in their order.
        changes: Stage -> what is otherwise.
    """

    title: str
    neck: str = "lateral"
    memory: str = "perceiver"
    seed: int = 0
    route: tuple[str, ...] = tuple(ROUTE)
    changes: Mapping[str, Change] = field(default_factory=dict)

    def new(self, root: Path) -> Path:
        """Folder of its configuration."""
        return root / "students" / f"{self.neck}-{self.memory}-{self.seed}"

    def folders(self, root: Path) -> dict[str, Path]:
        """Stage -> its folder. What students have in common up to a stage is made once.

        >>> Student("a", route=("image", "joint")).folders(Path("m"))["joint"].as_posix()
        'm/students/lateral-perceiver-0/image.joint'
        """
        names: list[str] = []
        folders = {}
        for stage in self.route:
            names.append(f"{stage}-{self.changes[stage].name}" if stage in self.changes else stage)
            folders[stage] = self.new(root) / ".".join(names)
        return folders

    def last(self, root: Path) -> Path:
        """The folder it is in when all is done."""
        return list(self.folders(root).values())[-1]


def settings_of(stage: str) -> dict:
    """What the file of a stage says."""
    return yaml.safe_load((CONFIGS / f"{ROUTE[stage]}.yaml").read_text(encoding="utf-8"))


def without(name: str, terms: Iterable[str], **flags: str) -> dict[str, Change]:
    """Stage 3 without some terms of its loss."""
    weights = {"training.loss_weights": json.dumps(dict.fromkeys(terms, 0.0))}
    return {"joint": Change(name, {**weights, **flags})}


def from_cache(codec: str) -> dict[str, Change]:
    """Stage 1 from the teacher's features on disk."""
    flags = {"teacher.cache": f"{FOLDER}/caches/{codec}", "data.augment": "flip"}
    return {"image": Change(codec, flags)}


# The student that is shipped, and what it looks like with other random numbers.
MAIN = Student("student")
SEEDS = (MAIN, Student("student, seed 1", seed=1), Student("student, seed 2", seed=2))

# What stage 3 has of the teacher.
OF_CLIPS = tuple(
    f"clip_{name}"
    for name in MEMORY_TERMS
    if name in ("features", "pointers") or name.startswith("teacher_")
)
ALL_STEPS = sum(settings_of(stage)["training"]["max_steps"] for stage in ROUTE)

ABLATIONS = (
    Student(
        # It begins with the teacher's heads all the same, and its steps are all of the dear kind.
        "no distillation: ground truth alone, as many steps",
        route=("joint",),
        changes=without(
            "truth-alone",
            (*CONCEPT_TERMS, *MAP_TERMS, *OF_CLIPS),
            **{"training.max_steps": str(ALL_STEPS)},
        ),
    ),
    Student("without stage 1", route=("memory", "joint")),
    Student("without prompts in the loop", route=("image", "text", "memory", "joint")),
    Student("without negatives", changes={"joint": Change("positives", {"data.negatives": "0"})}),
    Student("without distillation of heads", changes=without("no-heads", CONCEPT_TERMS)),
    Student("dense memory", memory="dense"),
    Student("neck of SAM 3", neck="sam3"),
    Student("neck of SAM 3, from a cache of 16 bits", neck="sam3", changes=from_cache("fp16")),
    Student("neck of SAM 3, from a cache of 8 bits", neck="sam3", changes=from_cache("int8")),
)


def train(student: Student, root: Path, more: Flags) -> None:
    """Lead a student through its stages; those that are done are kept.

    Args:
        student: Which.
        root: Folder of the whole miniature, with `teacher` and `data`.
        more: Flags for every stage.
    """
    parent = student.new(root)
    if not parent.is_dir():
        write_student(parent, student.neck, student.memory)
    for stage, folder in student.folders(root).items():
        if not (folder / DONE).is_file():
            print(f"{student.title}, {stage}: {folder}", flush=True)
            change = student.changes.get(stage, Change("", {}))
            flags = {
                **paths(stage, root / "data"),
                "student.name": str(parent),
                "student.pretrained_trunk": "false",  # nothing is downloaded
                "teacher.name": str(root / "teacher"),
                "training.output_dir": str(folder),
                "training.resume_from_checkpoint": "true",  # if it was stopped
                "training.seed": str(student.seed),
                **{name: value.replace(FOLDER, str(root)) for name, value in change.flags.items()},
                **more,
            }
            words = [word for name, value in flags.items() for word in (f"--{name}", value)]
            began = time.monotonic()
            prepare(CONFIGS / f"{ROUTE[stage]}.yaml", words).train()
            write_json(folder / DONE, {"minutes": (time.monotonic() - began) / 60})
        parent = folder


def minutes_of(folder: Path) -> float:
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
