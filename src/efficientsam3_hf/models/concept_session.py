"""What concept tracking remembers of a video: prompts, masklets, and the tracker's session."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoSegmentationOutput

from .masklets import Masklet
from .video_session import (
    EfficientSam3VideoSession,
    check_state,
    count_bytes,
    read_state,
    write_state,
)


@dataclass
class ConceptPrompt:
    """One concept to follow: a phrase, or exemplars in one frame, or both.

    Args:
        label: What results call it.
        input_ids: (1, length) token ids of the phrase.
        attention_mask: (1, length), 0 where a token is padding.
        boxes: (1, boxes, 4) exemplars as (cx, cy, w, h) in [0, 1].
        boxes_labels: (1, boxes): 1 positive, 0 negative.
        frame_idx: Frame of the exemplars, by the session's count.
        frame: (3, height, width): the pixels of that frame, of a stream, until they are encoded.
        text_embeds: (1, length, channels) of the phrase, once it has been encoded.
        exemplar_tokens: (1, boxes + 1, channels) of the exemplars, once their frame has been seen.
        is_new: Whether no frame has been searched for it yet.
    """

    label: str
    input_ids: Tensor
    attention_mask: Tensor
    boxes: Tensor | None = None
    boxes_labels: Tensor | None = None
    frame_idx: int | None = None
    frame: Tensor | None = None
    text_embeds: Tensor | None = None
    exemplar_tokens: Tensor | None = None
    is_new: bool = True

    def is_like(self, other: "ConceptPrompt") -> bool:
        """Whether both say the same: one phrase, with the same exemplars of one frame or none."""
        if (self.label, self.frame_idx) != (other.label, other.frame_idx):
            return False
        if self.boxes is None or other.boxes is None:
            return self.boxes is other.boxes
        mine, theirs = (self.boxes, self.boxes_labels), (other.boxes, other.boxes_labels)
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(mine, theirs, strict=True))


@dataclass
class EfficientSam3VideoOutput(Sam3VideoSegmentationOutput):
    """What is known of the objects of one frame; the fields of transformers', and some more.

    Args:
        obj_id_to_prompt_id: Number of the prompt that each belongs to.
        obj_id_to_first_frame: Where each began.
        confirmed_obj_ids: Objects that can no longer turn out to be none.
        source_frame: Number of the frame where it came from; None if the session counts alike.
        pixels: (height, width, 3) of 8 bits: the frame of a stream, while its result is waiting.
    """

    obj_id_to_prompt_id: dict[int, int] | None = None
    obj_id_to_first_frame: dict[int, int] | None = None
    confirmed_obj_ids: set[int] | None = None
    source_frame: int | None = None
    pixels: np.ndarray | None = None

    def learn(self, later: "EfficientSam3VideoOutput", hotstart_delay: int) -> None:
        """Take over what a later frame says of the objects of this one."""
        self.removed_obj_ids = self.removed_obj_ids | later.removed_obj_ids
        self.confirmed_obj_ids = {
            obj_id
            for obj_id, first in self.obj_id_to_first_frame.items()
            if abs(later.frame_idx - first) + 1 >= hotstart_delay
        }


# Fields of an output that JSON holds; its masks and pixels are tensors.
OUTPUT_FIELDS = (
    "object_ids", "obj_id_to_score", "obj_id_to_tracker_score", "removed_obj_ids",
    "suppressed_obj_ids", "frame_idx", "obj_id_to_prompt_id", "obj_id_to_first_frame",
    "confirmed_obj_ids", "source_frame",
)  # fmt: skip

# Fields of a session that are single numbers.
COUNTS = ("max_obj_id", "last_look", "clock", "source_frame")

# Fields of a prompt that hold tensors.
PROMPT_TENSORS = (
    "input_ids", "attention_mask", "boxes", "boxes_labels", "frame", "text_embeds",
    "exemplar_tokens",
)  # fmt: skip


class EfficientSam3ConceptSession:
    """The state of concept tracking in one video, of a size that does not depend on its length.

    Args:
        tracker: Frames, and the objects as the tracker knows them.
    """

    def __init__(self, tracker: EfficientSam3VideoSession):
        self.tracker = tracker
        self.prompts: list[ConceptPrompt] = []
        self.masklets: dict[int, Masklet] = {}
        self.removed: dict[int, int] = {}  # object -> frame in which it was found to be none
        self.max_obj_id = -1
        self.last_look: int | None = None  # frame that was searched last, in this run
        self.clock = -1  # frames that the detector has spoken for, from 0
        self.ahead: range | None = None  # frames of a whole video that are still to come
        self.source_frame: int | None = None  # number of the newest frame where it came from
        self.pending: list[EfficientSam3VideoOutput] = []  # outputs whose results come late

    @property
    def obj_ids(self) -> list[int]:
        """Identities of the objects, in the order in which they came."""
        return list(self.masklets)

    @property
    def num_frames(self) -> int:
        """Frames of the video, or of the stream so far."""
        return self.tracker.num_frames

    def add_prompt(self, prompt: ConceptPrompt) -> int:
        """Follow one more concept from now on; gives its number.

        One that is followed already keeps its number.
        """
        for number, known in enumerate(self.prompts):
            if known.is_like(prompt):
                return number
        if prompt.frame_idx is not None:
            self.tracker.check_reachable(prompt.frame_idx)
            if self.tracker.is_streaming and self.tracker.has_frame(prompt.frame_idx):
                prompt.frame = self.tracker.get_frame(prompt.frame_idx)  # the next drives it out
        device = self.tracker.inference_device
        for name in PROMPT_TENSORS:
            value = getattr(prompt, name)
            setattr(prompt, name, None if value is None else value.to(device))
        self.prompts.append(prompt)
        return len(self.prompts) - 1

    def can_look_for(self, prompt: ConceptPrompt) -> bool:
        """Whether the exemplars of a prompt, if it has some, have been seen or can be."""
        if prompt.frame_idx is None or prompt.exemplar_tokens is not None:
            return True
        return prompt.frame is not None or self.tracker.has_frame(prompt.frame_idx)

    def is_due(self, frame_idx: int, every: int) -> bool:
        """Whether to search a frame: every so many of a run, and at once where a prompt is new."""
        if any(prompt.is_new and self.can_look_for(prompt) for prompt in self.prompts):
            return True
        if self.last_look is None or self.last_look == frame_idx:
            return True
        return abs(frame_idx - self.last_look) >= every

    def note_look(self, frame_idx: int, every: int) -> int:
        """Note that a frame has been searched; gives for how many frames it speaks.

        These are itself and those since the last search, but never more than `every`: of frames
        that were left out nobody has said anything.
        """
        since = 1 if self.last_look is None else abs(frame_idx - self.last_look)
        weight = min(max(since, 1), every)
        self.last_look = frame_idx
        self.clock += weight
        for prompt in self.prompts:
            prompt.is_new = prompt.is_new and not self.can_look_for(prompt)
        return weight

    def begin_run(self, order: range) -> None:
        """Go through a whole video, or through it again; what an earlier run left waiting is lost.

        Args:
            order: Its frames.
        """
        self.ahead, self.last_look = order, None
        self.pending.clear()

    def add_masklet(self, masklet: Masklet) -> None:
        """Begin to follow an object."""
        self.masklets[masklet.object_id] = masklet
        self.max_obj_id = max(self.max_obj_id, masklet.object_id)

    def remove_object(self, obj_id: int, strict: bool = False) -> None:
        """Forget an object; unknown ones are an error if `strict`."""
        self.tracker.remove_object(obj_id, strict)
        self.masklets.pop(obj_id, None)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the state, a whole video not among them."""
        return count_bytes([*self.tracker.tensors(), *self.tensors().values()])

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of prompts and of waiting outputs, by the names under which they are saved."""
        found = {}
        for number, prompt in enumerate(self.prompts):
            for name in PROMPT_TENSORS:
                if getattr(prompt, name) is not None:
                    found[f"prompts.{number}.{name}"] = getattr(prompt, name)
        for number, output in enumerate(self.pending):
            for obj_id, mask in output.obj_id_to_mask.items():
                found[f"pending.{number}.masks.{obj_id}"] = mask
            if output.pixels is not None:
                found[f"pending.{number}.pixels"] = torch.from_numpy(output.pixels)
        return found

    def save(self, path: str | os.PathLike) -> Path:
        """Write the state to a safetensors file, to go on from there another time.

        The file appears whole or not at all. A whole video is not written: it is given again to
        `load`.
        """
        tensors, tracker = self.tracker.state()
        tensors = {f"tracker.{name}": tensor for name, tensor in tensors.items()} | self.tensors()
        state = {
            "format": tracker["format"],
            "is_streaming": tracker["is_streaming"],
            "num_frames": tracker["num_frames"],
            "tracker": tracker,
            "prompts": [
                {"label": p.label, "frame_idx": p.frame_idx, "is_new": p.is_new}
                for p in self.prompts
            ],
            "masklets": [asdict(masklet) for masklet in self.masklets.values()],
            "removed": list(self.removed.items()),
            "ahead": None if self.ahead is None else as_list(self.ahead),
            **{name: getattr(self, name) for name in COUNTS},
            "pending": [
                {name: to_json(getattr(output, name)) for name in OUTPUT_FIELDS}
                for output in self.pending
            ],
        }
        return write_state(path, tensors, state)

    @classmethod
    def load(cls, path: str | os.PathLike, video=None, **devices) -> "EfficientSam3ConceptSession":
        """A session as it was when it was saved.

        Args:
            path: Where `save` wrote it.
            video: The whole video, if it had one, as `processor.frames(video)` gives it.
            devices: As in `EfficientSam3VideoSession.load`.
        """
        tensors, state = read_state(path)
        check_state(state, path, video)
        if "masklets" not in state:
            raise ValueError(
                f"{path} is a session of objects: load it by EfficientSam3VideoSession."
            )
        of_tracker = under("tracker.", tensors)
        tracker = EfficientSam3VideoSession.from_state(
            of_tracker, state["tracker"], video, **devices
        )
        session = cls(tracker)
        device = tracker.inference_device
        for number, fields in enumerate(state["prompts"]):
            found = under(f"prompts.{number}.", tensors)
            moved = {name: tensor.to(device) for name, tensor in found.items()}
            session.prompts.append(ConceptPrompt(**fields, **moved))
        for fields in state["masklets"]:
            duplicates = {int(older): count for older, count in fields.pop("duplicates").items()}
            session.add_masklet(Masklet(**fields, duplicates=duplicates))
        session.removed = dict(state["removed"])
        session.ahead = None if state["ahead"] is None else range(*state["ahead"])
        for name in COUNTS:
            setattr(session, name, state[name])
        for number, fields in enumerate(state["pending"]):
            output = EfficientSam3VideoOutput(
                **{name: from_json(name, value) for name, value in fields.items()}
            )
            masks = under(f"pending.{number}.masks.", tensors)
            output.obj_id_to_mask = {int(i): mask.to(device) for i, mask in masks.items()}
            pixels = tensors.get(f"pending.{number}.pixels")
            output.pixels = None if pixels is None else pixels.numpy()
            session.pending.append(output)
        return session


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names begin so, without the prefix."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def as_list(order: range) -> list[int]:
    """What makes a range again."""
    return [order.start, order.stop, order.step]


def to_json(value: Any) -> Any:
    """A value of an output as JSON holds it."""
    return sorted(value) if isinstance(value, set) else value


def from_json(name: str, value: Any) -> Any:
    """A value of an output as it was."""
    if isinstance(value, dict):  # JSON makes strings of numbers
        return {int(obj_id): item for obj_id, item in value.items()}
    is_set = name in ("removed_obj_ids", "suppressed_obj_ids", "confirmed_obj_ids")
    return set(value) if is_set and value is not None else value
