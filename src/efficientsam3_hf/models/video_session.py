"""What a tracker remembers of a video: frames at hand, objects, prompts, and a bounded memory.

transformers' `Sam3TrackerVideoInferenceSession` keeps every frame, mask and memory it has seen.
Here nothing grows with the number of frames: see `EfficientSam3VideoSession.forget`.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .object_memory import FLAGS, TENSORS, FrameFeatures, FrameMemory, Prompt, TrackedObject

FORMAT = 2  # of saved sessions


class EfficientSam3VideoSession:
    """The state of tracking in one video, of a size that does not depend on its length.

    Args:
        video: Frames of a whole video as the model takes them: a tensor (frames, 3, height, width)
            or any sequence of (3, height, width). None for a stream, whose frames come one by one.
        video_height: Height of the original frames, in pixels.
        video_width: Their width.
        inference_device: Where the model runs.
        inference_state_device: Where memories lie.
        video_storage_device: Where frames lie.
        dtype: Of the frames.
        max_vision_features_cache_size: Frames whose vision features are kept, and frames of a
            stream that are.
        max_conditioning_frames: Frames with prompts that are remembered of an object; the one
            farthest from the current frame is forgotten first.
        history: Frames tracked farther from the current one than the model can see, whose memories
            are kept all the same: for corrections far back. None keeps all, as transformers does.
    """

    def __init__(
        self,
        video: Tensor | Sequence[Tensor] | None = None,
        video_height: int | None = None,
        video_width: int | None = None,
        inference_device: torch.device | str = "cpu",
        inference_state_device: torch.device | str = "cpu",
        video_storage_device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        max_vision_features_cache_size: int = 1,
        max_conditioning_frames: int = 16,
        history: int | None = 0,
    ):
        if max_vision_features_cache_size < 1 or max_conditioning_frames < 1:
            raise ValueError("A session keeps at least one frame and one frame with prompts.")
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.video = video
        if isinstance(video, Tensor):
            self.video = video.to(video_storage_device, dtype=self.dtype)
        if video is not None and len(video) == 0:
            raise ValueError("The video has no frames.")
        self.video_height = video_height
        self.video_width = video_width
        self.inference_device = inference_device
        self.inference_state_device = inference_state_device
        self.video_storage_device = video_storage_device
        self.max_vision_features_cache_size = max_vision_features_cache_size
        self.max_conditioning_frames = max_conditioning_frames
        self.history = history
        self.frames_seen = 0  # of a stream
        self.recent_frames: dict[int, Tensor] = {}  # of a stream
        self.features: dict[int, FrameFeatures] = {}
        self.objects: dict[int, TrackedObject] = {}

    # Frames.

    @property
    def is_streaming(self) -> bool:
        """Whether frames come one by one, and cannot be gone back to."""
        return self.video is None

    @property
    def num_frames(self) -> int:
        """Frames of the video, or of the stream so far."""
        return self.frames_seen if self.video is None else len(self.video)

    def add_new_frame(self, pixel_values: Tensor, frame_idx: int | None = None) -> int:
        """Take the next frame of a stream, (3, height, width); gives its index."""
        if not self.is_streaming:
            raise ValueError("This session has a whole video; a stream starts without one.")
        if pixel_values.ndim == 4 and len(pixel_values) == 1:
            pixel_values = pixel_values[0]
        if pixel_values.ndim != 3:
            raise ValueError(
                f"A frame is (3, height, width), not {tuple(pixel_values.shape)}: give one frame "
                "at a time."
            )
        frame_idx = self.frames_seen if frame_idx is None else frame_idx
        if frame_idx < self.frames_seen - 1:
            raise ValueError(
                f"Frame {frame_idx} comes after frame {self.frames_seen - 1}: a stream only goes "
                "forward."
            )
        frame = pixel_values.to(self.video_storage_device, dtype=self.dtype)
        self.features.pop(frame_idx, None)
        self.recent_frames[frame_idx] = frame
        keep_newest(self.recent_frames, self.max_vision_features_cache_size)
        self.frames_seen = frame_idx + 1
        return frame_idx

    def get_frame(self, frame_idx: int) -> Tensor:
        """Pixel values (3, height, width) of a frame that is at hand."""
        if self.video is None:
            if frame_idx not in self.recent_frames:
                raise ValueError(
                    f"Frame {frame_idx} is not at hand: of a stream, these are: "
                    f"{sorted(self.recent_frames)}. max_vision_features_cache_size keeps more."
                )
            frame = self.recent_frames[frame_idx]
        else:
            if not 0 <= frame_idx < len(self.video):
                raise ValueError(f"The video has {len(self.video)} frames, and none {frame_idx}.")
            frame = self.video[frame_idx]
        return frame.to(self.inference_device, dtype=self.dtype)

    def has_frame(self, frame_idx: int) -> bool:
        """Whether a frame is at hand."""
        if self.video is None:
            return frame_idx in self.recent_frames
        return 0 <= frame_idx < len(self.video)

    def check_device(self, device: torch.device) -> None:
        """Raise for a model on another device than the one the session is for."""
        own = torch.device(self.inference_device)
        is_same_card = own.index == device.index or None in (own.index, device.index)
        is_offloaded = device.type == "meta"  # weights that come when they are needed
        if not is_offloaded and not (own.type == device.type and is_same_card):
            raise ValueError(
                f"The session is for a model on {own}, and this one is on {device}: make or load "
                "the session with inference_device=model.device."
            )

    def cache_features(self, frame_idx: int, features: FrameFeatures) -> None:
        """Keep what the vision encoder made of a frame, in place of the oldest."""
        self.features.pop(frame_idx, None)
        self.features[frame_idx] = features.to(self.inference_state_device)
        keep_newest(self.features, self.max_vision_features_cache_size)

    def cached_features(self, frame_idx: int) -> FrameFeatures | None:
        """What the vision encoder made of a frame, if that is at hand."""
        features = self.features.get(frame_idx)
        return None if features is None else features.to(self.inference_device)

    # Objects and prompts.

    @property
    def obj_ids(self) -> list[int]:
        """Identities of the objects, in the order in which they came."""
        return list(self.objects)

    def get_obj_num(self) -> int:
        """Number of objects."""
        return len(self.objects)

    def add_points(
        self, obj_id: int, frame_idx: int, points: Tensor, labels: Tensor, clear_old: bool = True
    ) -> None:
        """Say by points, in pixels of the model's input, what an object is in a frame.

        Args:
            obj_id: A new object, or one to correct.
            frame_idx: The frame.
            points: (points, 2) as (x, y).
            labels: (points,): 1 on the object, 0 beside it, 2 and 3 for the corners of a box.
            clear_old: Whether points given before for this frame are dropped.
        """
        obj_id, frame_idx = int(obj_id), int(frame_idx)
        self.check_reachable(frame_idx)
        points = points.to(self.inference_device, torch.float32)
        labels = labels.to(self.inference_device, torch.int64)
        tracked = self.objects.setdefault(obj_id, TrackedObject())
        old = tracked.prompts.get(frame_idx)
        if not clear_old and old is not None and old.points is not None:
            points, labels = torch.cat([old.points, points]), torch.cat([old.labels, labels])
        tracked.add_prompt(frame_idx, Prompt(points=points, labels=labels))

    def add_mask(self, obj_id: int, frame_idx: int, mask: Tensor) -> None:
        """Say by a mask (height, width) in the size of the model's input what an object is."""
        obj_id, frame_idx = int(obj_id), int(frame_idx)
        self.check_reachable(frame_idx)
        tracked = self.objects.setdefault(obj_id, TrackedObject())
        tracked.add_prompt(frame_idx, Prompt(mask=mask.to(self.inference_device, self.dtype)))

    def check_reachable(self, frame_idx: int) -> None:
        """Raise for a frame that the tracker will never see."""
        if self.video is None:
            if frame_idx < self.frames_seen and frame_idx not in self.recent_frames:
                raise ValueError(
                    f"Frame {frame_idx} of the stream has passed: prompts are for the newest frame "
                    f"({self.frames_seen - 1}) or for one to come."
                )
        elif not 0 <= frame_idx < len(self.video):
            raise ValueError(f"The video has {len(self.video)} frames, and none {frame_idx}.")

    def remove_object(self, obj_id: int, strict: bool = False) -> None:
        """Forget an object; unknown ones are an error if `strict`."""
        if strict and obj_id not in self.objects:
            raise ValueError(f"There is no object {obj_id}; there are {self.obj_ids}.")
        self.objects.pop(obj_id, None)

    def prompted_frames(self) -> list[int]:
        """Frames with prompts that are remembered or yet to be seen, sorted."""
        frames = set()
        for tracked in self.objects.values():
            frames.update(tracked.prompts, tracked.conditioning())
        return sorted(frames)

    def reset_tracking_data(self) -> None:
        """Forget all objects; keep frames and their features."""
        self.objects.clear()

    def reset_inference_session(self) -> None:
        """Forget all objects and features."""
        self.objects.clear()
        self.features.clear()

    # Bounds.

    def forget(
        self, frame_idx: int, num_memories: int, num_pointers: int, max_conditioning: int
    ) -> None:
        """Drop what no frame to come can need; to be called when a frame is done.

        Of each object stay the memories and pointers that the model can see from this frame; in a
        whole video, where one may go back to a prompt and from there in the other direction, also
        those it can see from a frame with prompts. From one that only counts as such, since a
        detection confirmed it, nobody turns around.

        Args:
            frame_idx: The frame.
            num_memories: `num_maskmem` of the configuration.
            num_pointers: `max_object_pointers_in_encoder` of the configuration.
            max_conditioning: `max_cond_frame_num` of the configuration.
        """
        if self.history is None:
            return
        reach = max(num_memories - 1, self.history)
        pointer_reach = max(num_pointers - 1, self.history)
        for tracked in self.objects.values():
            prompted = sorted(tracked.conditioning(), key=lambda frame: abs(frame - frame_idx))
            for frame in prompted[self.max_conditioning_frames :]:
                del tracked.memories[frame]
                tracked.prompts.pop(frame, None)
            prompted = prompted[: self.max_conditioning_frames]
            if self.is_streaming:
                self.forget_passed(tracked, frame_idx - reach, prompted, max_conditioning)
            anchors = [frame_idx]
            if not self.is_streaming:
                memories = tracked.memories
                anchors += [frame for frame in prompted if not memories[frame].is_reconditioned]
            for frame, memory in list(tracked.memories.items()):
                distance = min(abs(frame - anchor) for anchor in anchors)
                if memory.is_conditioning:
                    continue
                if distance > pointer_reach:
                    del tracked.memories[frame]
                elif distance > reach:
                    memory.features = None

    def forget_passed(
        self, tracked: TrackedObject, horizon: int, prompted: list[int], max_conditioning: int
    ) -> None:
        """Drop what a stream, which does not come back to a frame, can need no more.

        Args:
            tracked: The object.
            horizon: First frame that the model sees also without a prompt.
            prompted: Frames with prompts, newest first.
            max_conditioning: How many of them the model sees; -1 for all.
        """
        at_hand = min(self.recent_frames, default=self.frames_seen)
        tracked.spans = [span for span in tracked.spans if span[1] >= at_hand]
        for frame in list(tracked.prompts):
            if frame < at_hand:
                del tracked.prompts[frame]
        unseen = [] if max_conditioning == -1 else prompted[max_conditioning:]
        for frame in prompted:
            if frame < at_hand:
                tracked.memories[frame].pred_masks = None
            if frame in unseen and frame < min(horizon, at_hand):
                tracked.memories[frame].features = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the state, a whole video not among them."""
        return count_bytes(self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the state."""
        yield from self.recent_frames.values()
        for features in self.features.values():
            yield from features
        for tracked in self.objects.values():
            for kind, names in TENSORS.items():
                for item in getattr(tracked, kind).values():
                    tensors = (getattr(item, name) for name in names)
                    yield from (tensor for tensor in tensors if tensor is not None)

    # Saving.

    def save(self, path: str | os.PathLike) -> Path:
        """Write the state to a safetensors file, to go on from there another time.

        The file appears whole or not at all. A whole video is not written: it is given again to
        `load`.
        """
        return write_state(path, *self.state())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that `load` needs: tensors, and what JSON can hold."""
        tensors = {f"frames.{frame}": tensor for frame, tensor in self.recent_frames.items()}
        objects = []
        for index, (obj_id, tracked) in enumerate(self.objects.items()):
            record = {"id": obj_id, "spans": tracked.spans, "first_frame": tracked.first_frame}
            for kind, names in TENSORS.items():
                record[kind] = {}
                for frame, item in getattr(tracked, kind).items():
                    record[kind][frame] = {name: getattr(item, name) for name in FLAGS[kind]}
                    found = {name: getattr(item, name) for name in names}
                    tensors |= {
                        f"{index}.{kind}.{frame}.{name}": tensor
                        for name, tensor in found.items()
                        if tensor is not None
                    }
            objects.append(record)
        state = {
            "format": FORMAT,
            "is_streaming": self.is_streaming,
            "num_frames": self.num_frames,
            "settings": {
                "video_height": self.video_height,
                "video_width": self.video_width,
                "dtype": str(self.dtype).removeprefix("torch."),
                "max_vision_features_cache_size": self.max_vision_features_cache_size,
                "max_conditioning_frames": self.max_conditioning_frames,
                "history": self.history,
            },
            "objects": objects,
        }
        return tensors, state

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        video: Tensor | Sequence[Tensor] | None = None,
        inference_device: torch.device | str = "cpu",
        inference_state_device: torch.device | str | None = None,
        video_storage_device: torch.device | str | None = None,
    ) -> "EfficientSam3VideoSession":
        """A session as it was when it was saved.

        Args:
            path: Where `save` wrote it.
            video: The whole video, if it had one.
            inference_device: Where the model runs.
            inference_state_device: Where memories lie; None for `inference_device`.
            video_storage_device: Where frames lie; None for `inference_device`.
        """
        tensors, state = read_state(path)
        check_state(state, path, video)
        devices = (inference_device, inference_state_device, video_storage_device)
        return cls.from_state(tensors, state, video, *devices)

    @classmethod
    def from_state(
        cls,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        video: Tensor | Sequence[Tensor] | None = None,
        inference_device: torch.device | str = "cpu",
        inference_state_device: torch.device | str | None = None,
        video_storage_device: torch.device | str | None = None,
    ) -> "EfficientSam3VideoSession":
        """A session as it was when `state` was called; devices and video as in `load`."""
        session = cls(
            video,
            inference_device=inference_device,
            inference_state_device=inference_state_device or inference_device,
            video_storage_device=video_storage_device or inference_device,
            **state["settings"],
        )
        session.frames_seen = state["num_frames"] if video is None else 0
        frames = [name.removeprefix("frames.") for name in tensors if name.startswith("frames.")]
        for frame in sorted(map(int, frames)):
            session.recent_frames[frame] = tensors[f"frames.{frame}"].to(
                session.video_storage_device
            )
        for index, record in enumerate(state["objects"]):
            tracked = TrackedObject(spans=record["spans"], first_frame=record["first_frame"])
            for kind, item_class, device in (
                ("prompts", Prompt, session.inference_device),
                ("memories", FrameMemory, session.inference_state_device),
            ):
                for frame, flags in record[kind].items():
                    fields = dict.fromkeys(TENSORS[kind])
                    for name in fields:
                        tensor = tensors.get(f"{index}.{kind}.{frame}.{name}")
                        fields[name] = None if tensor is None else tensor.to(device)
                    getattr(tracked, kind)[int(frame)] = item_class(**fields, **flags)
            session.objects[record["id"]] = tracked
        return session


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors keep alive, those they share counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def write_state(path: str | os.PathLike, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write a session to a file that appears whole or not at all."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    copies = {name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, unfinished, metadata={"state": json.dumps(state)})
    os.replace(unfinished, path)
    return path


def read_state(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote."""
    with safe_open(path, framework="pt") as file:
        state = json.loads((file.metadata() or {}).get("state", "{}"))
        # Copies, so that the session does not hold on to the file.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return tensors, state


def check_state(state: dict, path: str | os.PathLike, video: Tensor | Sequence | None) -> None:
    """Raise for a file that holds no session, or none of the video that is given."""
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no session of format {FORMAT}, which this version reads, but "
            f"{state.get('format', 'something else')}."
        )
    if state["is_streaming"] != (video is None):
        given = "a stream: give no video" if state["is_streaming"] else "a video: give it again"
        raise ValueError(f"{path} is a session of {given}.")
    if video is not None and len(video) != state["num_frames"]:
        raise ValueError(
            f"The video has {len(video)} frames; the session was saved with {state['num_frames']}."
        )


def keep_newest(entries: dict[int, object], count: int) -> None:
    """Drop all but the entries that were put in last."""
    for key in list(entries)[:-count]:
        del entries[key]
