"""How videos are put to a model, whoever made it: given objects, or phrases."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .loading import Loaded


@torch.inference_mode()
def follow_objects(
    loaded: Loaded,
    frames: Sequence[np.ndarray],
    masks: Mapping[int, Mapping[int, np.ndarray]],
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Mask logits (height, width) of objects in each frame from where they are given.

    Objects that are given in one frame are followed together; those of another frame have a session
    of their own, since transformers' trackers know no object that begins later.

    Args:
        loaded: For the job "tracks".
        frames: Pixels (height, width, 3) of the whole video.
        masks: Frame -> object -> its mask there.
    """
    begun: list[Iterator] = []
    for index in range(len(frames)):
        if index in masks:
            begun.append(follow_together(loaded, frames, index, masks[index]))
        shown: dict[int, Tensor] = {}
        for iterator in begun:
            shown |= next(iterator)
        yield index, shown


@torch.inference_mode()
def follow_together(
    loaded: Loaded, frames: Sequence[np.ndarray], start: int, masks: Mapping[int, np.ndarray]
) -> Iterator[dict[int, Tensor]]:
    """Logits of the objects of one frame, in this frame and all after it."""
    session = new_session(loaded, frames)
    object_ids = list(masks)
    loaded.processor.add_inputs_to_inference_session(
        session,
        frame_idx=start,
        obj_ids=object_ids,
        input_masks=[np.asarray(masks[number], dtype=bool) for number in object_ids],
    )
    for output in loaded.model.propagate_in_video_iterator(session, start_frame_idx=start):
        logits = F.interpolate(
            output.pred_masks.float(), frames[0].shape[:2], mode="bilinear", align_corners=False
        )[:, 0]
        given = getattr(output, "object_ids", None)
        order = session.obj_ids if given is None else given
        yield {int(number): logits[row].cpu() for row, number in enumerate(order)}


@torch.inference_mode()
def follow_concepts(
    loaded: Loaded, frames: Sequence[np.ndarray], phrases: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of the frames, and for each `object_ids`, `scores`, `masks`, `prompt_to_obj_ids`.

    Args:
        loaded: For the job "concept tracks".
        frames: Pixels (height, width, 3) of the whole video.
        phrases: To look for at once.
    """
    session = new_session(loaded, frames)
    loaded.processor.add_text_prompt(session, list(phrases))
    for output in loaded.model.propagate_in_video_iterator(session):
        yield output.frame_idx, loaded.processor.postprocess_outputs(session, output)


def new_session(loaded: Loaded, frames: Sequence[np.ndarray]) -> Any:
    """A session with a whole video, whose frames wait on the CPU."""
    return loaded.processor.init_video_session(
        video=list(frames),
        inference_device=loaded.device,
        processing_device="cpu",
        video_storage_device="cpu",
        dtype=loaded.dtype,
    )
