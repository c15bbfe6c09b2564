"""What distilling on a folder will take: counts, time as measured on a batch, bytes on disk."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import zoo
from .cache_files import thumbnails
from .codecs import Int8Codec, bytes_of
from .family import Family
from .teacher import Teacher
from .teacher_labels import Labeller

# Of the free disk that a cache may take, and how often a picture must be looked at for it to pay:
# it is written twice, as it is and flipped, and should spare at least as much again.
MOST_OF_DISK = 0.8
LOOKS_THAT_PAY = 4


@dataclass
class Speeds:
    """Seconds, as measured on one batch after another that warmed up.

    Args:
        label: The teacher's, to label a picture with all of its phrases.
        trunk: The teacher's, to look at a picture.
        heads: The teacher's, to answer a prompt.
        student_look: The student's, to look at a picture, with gradients.
        student_heads: To answer a prompt, with gradients.
        student_text: To read a phrase, with gradients.
    """

    label: float = 0.0
    trunk: float = 0.0
    heads: float = 0.0
    student_look: float = 0.0
    student_heads: float = 0.0
    student_text: float = 0.0


@dataclass
class StagePlan:
    """A stage that will be run, or is done.

    Args:
        name: Row of `launch.STAGES`.
        steps: Of the optimiser.
        batch_size: Samples of a step, in all processes together.
        uses_cache: Whether the teacher's features come from disk.
        is_done: Whether there is nothing left to do.
        seconds: That it takes, as long as pictures are read as fast.
    """

    name: str
    steps: int
    batch_size: int
    uses_cache: bool
    is_done: bool
    seconds: float = 0.0


@dataclass
class FolderPlan:
    """What there is to do.

    Args:
        pictures: In the folder.
        training, validation, test: How many of them the student learns from, is calibrated on and
            is evaluated on.
        phrases: Different ones.
        pairs: Of picture and phrase.
        labelled: Pictures whose labels are there.
        label_seconds: For those that are not.
        cache_bytes: Of the teacher's features, whether they are to be cached or not.
        free_bytes: Where the output lies.
        caches: Whether they are.
        cache_seconds: To write what is missing of them.
        stages: In their order.
        remarks: What to know before it starts.
    """

    pictures: int
    training: int
    validation: int
    test: int
    phrases: int
    pairs: int
    labelled: int
    label_seconds: float
    cache_bytes: int
    free_bytes: int
    caches: bool
    cache_seconds: float
    stages: list[StagePlan]
    remarks: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """All in all, but for calibration and evaluation, which are short."""
        return self.label_seconds + self.cache_seconds + sum(each.seconds for each in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "seconds": self.seconds}

    def rows(self) -> list[tuple[str, str, str]]:
        """For readers: what, how much, how long."""
        rows = [
            (
                "labels",
                f"{self.pairs:,} pairs of {self.pictures:,} pictures and {self.phrases:,} phrases"
                + (f"; {self.labelled:,} pictures are done" if self.labelled else ""),
                duration(self.label_seconds),
            ),
            (
                "cache",
                f"{size(self.cache_bytes)}; {size(self.free_bytes)} are free"
                + ("" if self.caches else ": none, the teacher looks anew"),
                duration(self.cache_seconds) if self.caches else "",
            ),
        ]
        for stage in self.stages:
            what = f"{stage.steps:,} steps of {stage.batch_size}"
            rows.append((stage.name, what, "done" if stage.is_done else duration(stage.seconds)))
        rows.append(
            (
                "result",
                f"calibrated on {self.validation:,} pictures, evaluated on {self.test:,}, which "
                f"are not among the {self.training:,} to learn from",
                "",
            )
        )
        return rows


def duration(seconds: float) -> str:
    """Seconds as a reader has them.

    >>> duration(7300), duration(150), duration(4)
    ('2 h 02 min', '3 min', '4 s')
    """
    if seconds < 90:
        return f"{round(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def size(count: float) -> str:
    """Bytes as a reader has them.

    >>> size(5_310_000_000), size(1500)
    ('5.3 GB', '1.5 kB')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def timed(compute: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a computation, the second time it is done."""
    seconds = 0.0
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        compute()
        synchronize(device)
        seconds = time.perf_counter() - start
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for a device that computes by itself."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_teacher(
    teacher: Teacher, labeller: Labeller, pixels: Any, phrases: Sequence[str]
) -> tuple[Speeds, int]:
    """Its speeds on one picture, and bytes of its cached features of a picture and its flip."""
    speeds = Speeds(label=timed(lambda: labeller.label(pixels, phrases), teacher.device))
    side = teacher.image_size
    blank = torch.zeros(1, 3, side, side, device=teacher.device, dtype=teacher.dtype)
    speeds.trunk = timed(lambda: teacher.see(blank), teacher.device)
    seen = teacher.see(blank)
    some = list(phrases[: labeller.prompts_at_once])
    answers = timed(lambda: list(labeller.ask(seen, some, image=0)), teacher.device)
    speeds.heads = answers / max(len(some), 1)
    tokens = teacher.features("trunk", blank)["trunk"]
    stored = bytes_of(Int8Codec().encode(tokens).values())
    return speeds, 2 * (stored + 2 * thumbnails(torch.zeros(1, 3, 32, 32)).numel())


def measure_student(
    student: Family,
    speeds: Speeds,
    phrases: Sequence[str],
    batch_size: int,
    device: torch.device,
    bf16: bool,
) -> None:
    """Add a student's speeds, with gradients, on a blank batch. Its weights stay as they are."""
    student.to(device).eval()  # in training, batch norms would remember the batch
    side = student.configuration.image_size
    pixels = torch.zeros(batch_size, 3, side, side, device=device)
    tokens = zoo.processor(student.configuration)(text=list(phrases[:8]), return_tensors="pt")
    ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
    prompts = len(ids)
    detector: Any = student.detector

    def look() -> list[Tensor]:
        return list(student.see(pixels).fpn_hidden_states[:3])

    def read() -> list[Tensor]:
        return [detector.get_text_features(ids, mask, return_dict=True).pooler_output]

    def answer() -> list[Tensor]:
        outputs = detector(
            vision_embeds=student.see(pixels[:1]),
            input_ids=ids,
            attention_mask=mask,
            return_dict=True,
        )
        return [outputs.pred_logits, outputs.pred_boxes, outputs.pred_masks]

    def step(compute: Callable[[], list[Tensor]]) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            results = compute()
        torch.stack([each.float().mean() for each in results]).sum().backward()

    student.requires_grad_(True)
    looking, reading, answering = (
        timed(lambda compute=compute: step(compute), device) for compute in (look, read, answer)
    )
    student.zero_grad(set_to_none=True)
    speeds.student_look = looking / batch_size
    speeds.student_text = reading / prompts
    one_picture = speeds.student_look + reading
    speeds.student_heads = max(answering - one_picture, 0.1 * answering) / prompts


def seconds_of(stage: StagePlan, speeds: Speeds, prompts_per_picture: int) -> float:
    """How long a stage takes, by what was measured of its parts."""
    samples = stage.steps * stage.batch_size
    if stage.name == "stage1_text":
        return samples * 2 * speeds.student_text  # each phrase in two orders
    seconds = speeds.student_look + (0.0 if stage.uses_cache else speeds.trunk)
    if stage.name != "stage1_image":
        seconds += prompts_per_picture * (speeds.heads + speeds.student_heads)
    return samples * seconds
