"""What is known of the objects of a video: prompts, and what was found frame by frame."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class FrameFeatures(NamedTuple):
    """What the vision encoder made of frames: three maps, and the positions of the last."""

    fine: Tensor  # (frames, channels / 8, 4 * height, 4 * width)
    middle: Tensor  # (frames, channels / 4, 2 * height, 2 * width)
    coarse: Tensor  # (frames, channels, height, width)
    positions: Tensor  # (1, height * width, channels)

    def to(self, device: torch.device | str) -> "FrameFeatures":
        return FrameFeatures(*(tensor.to(device) for tensor in self))


@dataclass
class Prompt:
    """What a user said of one object in one frame: points (boxes are two of them), or a mask.

    Args:
        points: (points, 2) as (x, y), in pixels of the model's input.
        labels: (points,): 1 on the object, 0 beside it, 2 and 3 for the corners of a box.
        mask: (height, width) of the model's input.
        is_new: Whether the tracker has yet to see it.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    mask: Tensor | None = None
    is_new: bool = True


@dataclass
class FrameMemory:
    """What is remembered of one object in one frame.

    Args:
        pointer: (channels,): the object in one vector.
        features: (tokens, channels) for the memory attention; None once they are out of its reach.
        pred_masks: Mask logits (1, height, width) of a frame with prompts, to be shown again.
        object_score_logits: (1,): whether the object was in the frame.
        is_conditioning: Whether there were prompts in the frame, or it counts as if there were.
        is_initial: Whether these stood for themselves, without a memory of earlier frames.
        is_reconditioned: Whether it only counts so, since a detection confirmed a tracked mask.
    """

    pointer: Tensor
    features: Tensor | None
    pred_masks: Tensor | None
    object_score_logits: Tensor
    is_conditioning: bool = False
    is_initial: bool = False
    is_reconditioned: bool = False


# What an object has of the two: their fields that hold tensors, and those that hold what JSON can.
# By name and not by class, since as remote code a model and a processor may each have their own.
TENSORS = {
    "prompts": ("points", "labels", "mask"),
    "memories": ("pointer", "features", "pred_masks", "object_score_logits"),
}
FLAGS = {"prompts": ("is_new",), "memories": ("is_conditioning", "is_initial", "is_reconditioned")}


@dataclass
class Recollection:
    """What one object brings to the memory attention of one frame.

    Args:
        features: Of each remembered frame, (tokens, channels).
        offsets: Rows of the temporal position table: 0 for a frame with prompts, else how many
            frames ago.
        pointers: Of each remembered frame, (channels,).
        pointer_offsets: How many frames ago.
    """

    features: list[Tensor] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    pointers: list[Tensor] = field(default_factory=list)
    pointer_offsets: list[int] = field(default_factory=list)


@dataclass
class TrackedObject:
    """One object of a session.

    Args:
        prompts: By frame.
        memories: By frame, bounded in number.
        spans: First and last of each run of frames that it has been tracked on, sorted.
        first_frame: Earliest frame with a prompt.
    """

    prompts: dict[int, Prompt] = field(default_factory=dict)
    memories: dict[int, FrameMemory] = field(default_factory=dict)
    spans: list[list[int]] = field(default_factory=list)
    first_frame: int | None = None

    def add_prompt(self, frame_idx: int, prompt: Prompt) -> None:
        self.prompts[frame_idx] = prompt
        earlier = [frame_idx] if self.first_frame is None else [frame_idx, self.first_frame]
        self.first_frame = min(earlier)

    def new_prompt(self, frame_idx: int) -> Prompt | None:
        """The prompt in a frame that the tracker has yet to see, if there is one."""
        prompt = self.prompts.get(frame_idx)
        return prompt if prompt is not None and prompt.is_new else None

    def conditioning(self) -> dict[int, FrameMemory]:
        """Memories of frames with prompts."""
        return {frame: memory for frame, memory in self.memories.items() if memory.is_conditioning}

    def starts_anew(self, frame_idx: int) -> bool:
        """Whether a prompt in this frame stands for itself, rather than corrects a tracked mask."""
        here = self.memories.get(frame_idx)
        was_tracked = any(first <= frame_idx <= last for first, last in self.spans)
        is_redone = here is not None and here.is_initial
        return is_redone or not was_tracked or not self.is_known(frame_idx)

    def is_known(self, frame_idx: int) -> bool:
        """Whether a frame other than this one says what the object is."""
        return bool(self.nearest_conditioning(frame_idx, 1))

    def remember(self, frame_idx: int, memory: FrameMemory) -> None:
        self.memories[frame_idx] = memory
        self.spans = merge_spans([*self.spans, [frame_idx, frame_idx]])
        prompt = self.prompts.get(frame_idx)
        if prompt is not None and prompt.mask is not None:
            del self.prompts[frame_idx]  # the memory says it all; points may be added to
        elif prompt is not None:
            prompt.is_new = False

    def nearest_conditioning(self, frame_idx: int, count: int) -> list[int]:
        """Frames with prompts that are seen from a frame: nearest before, nearest after, others."""
        frames = [
            frame
            for frame, memory in self.conditioning().items()
            if frame != frame_idx and memory.features is not None
        ]
        if count == -1 or len(frames) <= count:
            return frames
        before = [max((frame for frame in frames if frame < frame_idx), default=None)]
        after = [min((frame for frame in frames if frame > frame_idx), default=None)]
        chosen = [frame for frame in before + after if frame is not None]
        others = sorted(
            (frame for frame in frames if frame not in chosen),
            key=lambda frame: abs(frame - frame_idx),
        )
        return (chosen + others)[: max(count, len(chosen))]

    def recall(
        self,
        frame_idx: int,
        reverse: bool,
        num_memories: int,
        num_pointers: int,
        max_conditioning: int,
    ) -> Recollection:
        """What is remembered for a frame, going forward or in reverse.

        Args:
            frame_idx: The frame.
            reverse: Whether later frames are those that have been tracked before.
            num_memories: `num_maskmem` of the configuration.
            num_pointers: Frames whose pointers are seen, plus one.
            max_conditioning: `max_cond_frame_num` of the configuration.
        """
        step = 1 if reverse else -1
        chosen = self.nearest_conditioning(frame_idx, max_conditioning)
        result = Recollection()
        for frame in chosen:
            result.features.append(self.memories[frame].features)
            result.offsets.append(0)
        for offset in range(num_memories - 1, 0, -1):
            frame = frame_idx + step * offset
            memory = self.memories.get(frame)
            if memory is not None and memory.features is not None and frame not in chosen:
                result.features.append(memory.features)
                result.offsets.append(offset)

        for frame, memory in self.conditioning().items():
            offset = step * (frame - frame_idx)
            if offset > 0:
                result.pointers.append(memory.pointer)
                result.pointer_offsets.append(offset)
        for offset in range(1, num_pointers):
            memory = self.memories.get(frame_idx + step * offset)
            if memory is not None and not memory.is_conditioning:
                result.pointers.append(memory.pointer)
                result.pointer_offsets.append(offset)
        return result


def merge_spans(spans: list[list[int]]) -> list[list[int]]:
    """Runs of frames (first, last), sorted, those that touch made one.

    >>> merge_spans([[0, 4], [9, 9], [5, 5]])
    [[0, 5], [9, 9]]
    """
    merged: list[list[int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged
