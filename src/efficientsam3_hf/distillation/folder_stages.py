"""The stages of distilling on a folder: which, with which settings, and which of them are done."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from ..models.configuration_efficientsam3 import EfficientSam3Config
from .cache_files import checksum, write_json
from .checkpoints import last_checkpoint
from .launch import Run
from .teacher import own_settings

# Takes a title and a number of things, and gives what is told how many more of them are done.
Show = Callable[[str, int], Callable[[int], None]]

STAGE_FILE = "stage.json"
VIT = "sam3_vision_model"


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained where nothing else is said.

    Args:
        epochs: Times that each picture, or phrase, is looked at,
        least_steps: but no fewer steps of the optimiser than these,
        most_steps: and no more than these.
        training: Settings of its section `training`, beside the stage's own defaults.
    """

    epochs: float
    least_steps: int
    most_steps: int
    training: dict[str, Any] = field(default_factory=dict)


AVERAGED = {"ema_decay": 0.999, "warmup_steps": 0.05}
RECIPES = {
    "stage1_image": Recipe(30, 500, 30_000, {**AVERAGED, "trunk_learning_rate": 0.5}),
    "stage1_text": Recipe(100, 500, 20_000, {**AVERAGED, "warmup_steps": 0.1}),
    "stage1_prompts": Recipe(10, 200, 10_000, AVERAGED),
    "stage3_concepts": Recipe(20, 500, 30_000, {**AVERAGED, "trunk_learning_rate": 0.5}),
}
TEXT_BATCH = 256


def choose_stages(
    student: EfficientSam3Config, teacher: EfficientSam3Config, prompts: bool
) -> list[str]:
    """The stages that a student needs, in their order.

    Args:
        student: Its configuration.
        teacher: The teacher's.
        prompts: Whether boxes, clicks and phrases are put in the loop after stage 1.
    """
    has_trunk = student.vision_config.model_type == "efficientsam3_vision"
    own_text: Any = student.text_config
    teachers_text: Any = teacher.text_config
    has_text = own_text.model_type == "efficientsam3_text"
    stages = ["stage1_image"] if has_trunk else []
    if has_text and own_settings(own_text) != own_settings(teachers_text):
        stages.append("stage1_text")
    if prompts and has_trunk:
        stages.append("stage1_prompts")
    return [*stages, "stage3_concepts"]


def can_be_cached(stage: str, student: EfficientSam3Config, teacher: EfficientSam3Config) -> bool:
    """Whether the output of the teacher's ViT is all that a stage needs of its trunk."""
    if teacher.vision_config.model_type != VIT or stage == "stage1_text":
        return False
    is_lateral = getattr(student.vision_config, "neck", None) == "lateral"
    return stage == "stage3_concepts" or not is_lateral


def steps_of(
    stage: str, samples: int, batch_size: int, steps: int | None, epochs: float | None
) -> int:
    """Steps of the optimiser: those that were asked for, or by the recipe."""
    if steps is not None:
        return steps
    per_epoch = math.ceil(samples / batch_size)
    if epochs is not None:
        return max(1, round(epochs * per_epoch))
    recipe = RECIPES[stage]
    return min(max(round(recipe.epochs * per_epoch), recipe.least_steps), recipe.most_steps)


def show_nothing(title: str, total: int) -> Callable[[int], None]:
    """Counts for nobody."""
    return lambda done: None


class StageFolder:
    """The folder of a stage, and what is said there of how far it came.

    Args:
        folder: For checkpoints and, in the end, the student.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def record(self) -> dict[str, Any]:
        """What is said; empty where the stage was never begun."""
        path = self.folder / STAGE_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def result(self) -> str | None:
        """By what the result is known; None where the stage has not come to its end."""
        return self.record.get("result")

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise if the stage was begun with other settings, and name them."""
        if not self.record:
            return
        before, now = self.record["settings"], json.loads(json.dumps(settings))
        gone = [name for name in before if name not in now and "." in name]  # of a section
        lines = [
            f"  {name}: {before.get(name, 'default')!r} then, {now.get(name, 'default')!r} now"
            for name in [*now, *gone]
            if before.get(name) != now.get(name)
        ]
        if lines:
            raise ValueError(
                f"{self.folder.name} was begun with other settings:\n"
                + "\n".join(lines)
                + f"\nGo on with those, choose another --output, or delete {self.folder} and the "
                "folders of the stages after it, which are then made anew."
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Note with what it is made."""
        write_json(self.folder / STAGE_FILE, {"settings": settings})

    def finish(self, result: str) -> None:
        """Note that it is done."""
        write_json(self.folder / STAGE_FILE, {**self.record, "result": result})

    def train(self, settings: Mapping[str, Any], run: Run, show: Show) -> None:
        """Train, or go on with it, and note when it is done. All processes take part."""
        trainer = run.trainer
        is_first = trainer.is_world_process_zero()
        if is_first:
            self.begin(settings)
        trainer.pop_callback(PrinterCallback)
        trainer.add_callback(ShowSteps(self.folder.name, show))
        run.train()
        if is_first:
            self.finish(weights_checksum(self.folder))
            while checkpoint := last_checkpoint(self.folder):
                shutil.rmtree(checkpoint)
        trainer.accelerator.wait_for_everyone()


class ShowSteps(TrainerCallback):
    """A bar of steps, in place of `Trainer`'s."""

    def __init__(self, title: str, show: Show):
        self.title, self.show = title, show

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Begin where training does."""
        if state.is_world_process_zero:
            self.advance = self.show(self.title, state.max_steps)
            self.advance(state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """One more."""
        if state.is_world_process_zero:
            self.advance(1)


def weights_checksum(folder: Path) -> str:
    """One that changes when any file of weights does."""
    return " ".join(checksum(path)[:32] for path in sorted(folder.glob("model*.safetensors")))
