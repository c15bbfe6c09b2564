"""What to distil on a folder, its phrases, and which pictures the student does not learn from."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.files import read_bytes
from ..data.own_folder import Phrases
from ..data.phrases import phrases_in
from ..data.video import PICTURES
from .folder_stages import RECIPES

CACHES = ("auto", "yes", "no")
LEAST_PICTURES = 3  # one to learn from, one to be calibrated on, one to be evaluated on


@dataclass
class FolderSettings:
    """What to distil.

    Args:
        images: Folder of pictures.
        phrases: File of phrases: one in each line, JSON in a form that `PhraseList` reads, or a
            JSON object with a list of phrases for each picture by its path in the folder.
        student: Variant of the zoo, a folder with a configuration and no weights, or the folder of
            a student that goes on from there.
        output: Folder for the student and, in `work`, for all on the way.
        teacher: Folder or Hub name of a SAM 3.
        held_out: Share of the pictures, chosen by a hash of their names, that the student does not
            learn from: half of them are for calibration, the other half for evaluation.
        confidence, absent: As for `Labeller`.
        prompts: Whether stage 1 with prompts in the loop is run, too.
        steps: Of the optimiser in each stage; None for `epochs`.
        epochs: Of each stage; None for the recipes'.
        batch_size: Pictures of a step of one process; None for 8, or 2 on a CPU.
        cache: Whether the teacher's features are cached: "auto" if it pays and there is room.
        pretrained_trunk: Whether a new student's trunk starts from timm's weights.
        device: Where everything runs.
        workers: Processes that read and decode; None for 4, or none on a CPU.
        seed: Of all that is random.
        overrides: Stage -> section -> setting -> value, in place of what would be there.
    """

    images: str
    phrases: str
    student: str
    output: str
    teacher: str = "facebook/sam3"
    held_out: float = 0.1
    confidence: float = 0.5
    absent: float = 0.1
    prompts: bool = False
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    cache: str = "auto"
    pretrained_trunk: bool = True
    device: str = "cpu"
    workers: int | None = None
    seed: int = 0
    overrides: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not Path(self.images).is_dir():
            raise ValueError(f"--images {self.images} is no folder.")
        if not Path(self.phrases).is_file():
            raise ValueError(f"--phrases {self.phrases} is no file.")
        if Path(self.output).resolve().is_relative_to(Path(self.images).resolve()):
            raise ValueError("--output lies within --images: choose a folder outside of it.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held-out {self.held_out} must lie between 0 and 1.")
        if not 0 <= self.absent <= self.confidence < 1:
            raise ValueError(
                f"--absent {self.absent} must not be more than --confidence {self.confidence}, and "
                "both lie between 0 and 1."
            )
        if self.steps is not None and self.epochs is not None:
            raise ValueError("--steps and --epochs say the same: give one of them.")
        if self.cache not in CACHES:
            raise ValueError(f"--cache is one of {', '.join(CACHES)}, not {self.cache!r}.")
        for stage in self.overrides:
            if stage not in RECIPES:
                raise ValueError(f"--set {stage}: stages are {', '.join(RECIPES)}.")

    @property
    def is_on_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def batch(self) -> int:
        return self.batch_size or (2 if self.is_on_cpu else 8)


def read_phrases(path: Path) -> Phrases:
    """The phrases of a file: for all pictures, or for each by its path in the folder."""
    text = read_bytes(str(path)).decode()
    if path.suffix.lower() != ".json":
        return clean(text.splitlines(), path)
    content = json.loads(text)
    is_of_pictures = isinstance(content, dict) and all(
        Path(name).suffix.lower() in PICTURES for name in content
    )
    if not is_of_pictures:
        return clean(phrases_in(content), path)
    return {name: clean(phrases_in(phrases), path, name) for name, phrases in content.items()}


def clean(texts: Iterable[str], path: Path, picture: str = "") -> list[str]:
    """Phrases without blanks around them, each once. A single picture may have none."""
    phrases = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not phrases and not picture:
        raise ValueError(f"{path} holds no phrases: write one in each line.")
    return phrases


def split_names(names: Sequence[str], held_out: float, folder: str) -> dict[str, list[str]]:
    """The parts "train", "validation" and "test" of a folder's pictures.

    Held out are those whose hash lies below the share; at least the two lowest. So a picture that
    is added moves no other one from one side to the other, but where there are very few.

    Args:
        names: Of the pictures.
        held_out: Share of them.
        folder: For the message.
    """
    if len(names) < LEAST_PICTURES:
        raise ValueError(
            f"{folder} has {len(names)} pictures ({', '.join(PICTURES)}). It takes {LEAST_PICTURES}"
            " at the least: one to learn from, one to be calibrated on, one to be evaluated on."
        )
    in_order = sorted(names, key=share_of)
    below = sum(share_of(name) < held_out for name in in_order)
    count = min(max(below, LEAST_PICTURES - 1), len(names) - 1)
    held = in_order[:count]
    return {
        "train": sorted(in_order[count:]),
        "validation": sorted(held[0::2]),
        "test": sorted(held[1::2]),
    }


def share_of(name: str) -> float:
    """A number from 0 to 1 that a name has by chance."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
