"""Which detections belong to which masklets, and which masklets are shown, doubted or forgotten.

A masklet is one object through a video. The rules are those of SAM 3's concept tracking in
transformers; what they remember of a masklet is a few numbers, however long the video.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .masks import mask_iou

# Of a masklet that has always been seen.
NEVER = -1


@dataclass
class Masklet:
    """What is remembered of one object.

    Args:
        object_id: Its name; never given twice.
        prompt: Number of the prompt that found it.
        score: Of the detection it began with.
        first_frame: Where it began.
        keep_alive: Falls with each frame in which no detection confirms it, rises with each that
            does; at 0 it is not shown.
        unmatched: Frames in which it had a mask, but no detection.
        duplicates: Older masklet -> frames in which one detection matched both.
        last_occluded: Last frame in which it was not seen, or -1.
        unconfirmed_for: Frames since a detection last confirmed it.
    """

    object_id: int
    prompt: int
    score: float
    first_frame: int
    keep_alive: int
    unmatched: int = 0
    duplicates: dict[int, int] = field(default_factory=dict)
    last_occluded: int = NEVER
    unconfirmed_for: int = 0

    def age(self, frame: int) -> int:
        """Frames since it began, in whichever direction time runs."""
        return abs(frame - self.first_frame)


@dataclass
class Association:
    """How the detections and the masklets of one frame go together, each by its position.

    Args:
        new: Detections that begin a masklet.
        matches: For each detection the masklets that it may show.
        unmatched: Masklets that have a mask which no detection confirms.
        empty: Masklets without a mask.
        sure: Masklet -> the detection that shows it beyond doubt.
    """

    new: list[int]
    matches: list[list[int]]
    unmatched: list[int]
    empty: list[int]
    sure: dict[int, int]


def associate(
    detected: Tensor,
    scores: Tensor,
    detected_prompts: list[int],
    tracked: Tensor,
    tracked_prompts: list[int],
    config,
) -> Association:
    """Compare the detections of a frame with the masklets tracked to it.

    Args:
        detected: Mask logits (detections, height, width).
        scores: (detections,) probabilities.
        detected_prompts: Prompt that found each detection; only a masklet of the same can match.
        tracked: Mask logits (masklets, height, width).
        tracked_prompts: Prompt of each masklet.
        config: Thresholds, named as in `EfficientSam3VideoConfig`.
    """
    has_mask = (tracked > 0).flatten(1).any(dim=1).tolist()
    empty = [index for index, seen in enumerate(has_mask) if not seen]
    if len(tracked) == 0:  # nothing to be confused with: every detection is believed
        everything = list(range(len(detected)))
        return Association(everything, [[] for _ in everything], [], [], {})
    if len(detected) == 0:
        return Association(
            [], [], [index for index, seen in enumerate(has_mask) if seen], empty, {}
        )

    same_prompt = torch.tensor(detected_prompts)[:, None] == torch.tensor(tracked_prompts)
    overlap = (mask_iou(detected > 0, tracked > 0).cpu() * same_prompt).tolist()
    confidence = scores.tolist()
    matches = [
        [masklet for masklet, iou in enumerate(row) if iou >= config.assoc_iou_thresh]
        for row in overlap
    ]
    confirmed = {
        masklet
        for row in overlap
        for masklet, iou in enumerate(row)
        if iou >= config.trk_assoc_iou_thresh
    }
    unmatched = [i for i, seen in enumerate(has_mask) if seen and i not in confirmed]
    new = [
        detection
        for detection, matched in enumerate(matches)
        if not matched and confidence[detection] >= config.new_det_thresh
    ]
    sure = {}
    for detection, row in enumerate(overlap):
        best = max(row)
        is_sure = (
            confidence[detection] >= config.high_conf_thresh and best >= config.high_iou_thresh
        )
        if is_sure and detection not in new:
            sure[row.index(best)] = detection
    return Association(new, matches, unmatched, empty, sure)


def judge(
    masklets: list[Masklet], association: Association, frame: int, config, weight: int = 1
) -> set[int]:
    """Note what a frame says of each masklet, and find those that are none.

    Within its first `hotstart_delay` frames a masklet turns out to be none if too many frames have
    no detection for it, or if it follows the same detections as an older one.

    Args:
        masklets: All of them, in the order that `association` counts in. They are changed.
        association: Of this frame.
        frame: Its number.
        config: Thresholds, named as in `EfficientSam3VideoConfig`.
        weight: For how many frames this one speaks: itself, and those before it that the detector
            has not seen.

    Returns:
        Ids of masklets to remove for good.
    """
    for index in {masklet for matched in association.matches for masklet in matched}:
        masklet = masklets[index]
        masklet.keep_alive = min(config.max_trk_keep_alive, masklet.keep_alive + weight)
    for index in association.unmatched:
        masklets[index].unmatched += weight
    doubted = list(association.unmatched)
    if config.decrease_trk_keep_alive_for_empty_masklets:
        doubted += association.empty
    for index in doubted:
        masklet = masklets[index]
        masklet.keep_alive = max(config.min_trk_keep_alive, masklet.keep_alive - weight)
    unconfirmed = {*association.unmatched, *association.empty}
    for index, masklet in enumerate(masklets):
        masklet.unconfirmed_for += weight
        if index not in unconfirmed:
            masklet.unconfirmed_for = 0
    for matched in association.matches:
        if len(matched) > 1:
            rivals = [masklets[index] for index in matched]
            note_duplicates(rivals, frame, config.hotstart_delay, weight)
    return {
        masklet.object_id
        for masklet in masklets
        if masklet.age(frame) < config.hotstart_delay
        and (
            masklet.unmatched >= config.hotstart_unmatch_thresh
            or max(masklet.duplicates.values(), default=0) >= config.hotstart_dup_thresh
        )
    }


def note_duplicates(rivals: list[Masklet], frame: int, delay: int, weight: int) -> None:
    """Count against the younger of several masklets that one detection matches, while young."""
    oldest = max(rivals, key=lambda masklet: masklet.age(frame))
    for masklet in rivals:
        if masklet is not oldest and masklet.age(frame) < delay:
            count = masklet.duplicates.get(oldest.object_id, 0)
            masklet.duplicates[oldest.object_id] = count + weight


def lost_masklets(masklets: list[Masklet], limit: int | None) -> set[int]:
    """Ids of masklets that no detection has confirmed for more than `limit` frames; None: never."""
    if limit is None:
        return set()
    return {masklet.object_id for masklet in masklets if masklet.unconfirmed_for > limit}


def hidden_masklets(masklets: list[Masklet], config) -> set[int]:
    """Ids of masklets not to show, since detections have left them without confirmation."""
    if config.suppress_unmatched_only_within_hotstart:
        return set()
    return {
        masklet.object_id
        for masklet in masklets
        if masklet.keep_alive <= 0 and masklet.unmatched > 0
    }


def newly_confused(
    masks: Tensor, masklets: list[Masklet], threshold: float, reverse: bool = False
) -> Tensor:
    """Masklets that came out of an occlusion onto another one.

    Of two that overlap, both having been out of sight before, the one seen again later has taken
    the other's place.

    Args:
        masks: Booleans (masklets, height, width), all of one prompt.
        masklets: In the same order.
        threshold: Intersection over union from which masks count as overlapping.
        reverse: Whether time runs backward.

    Returns:
        Booleans (masklets,).
    """
    overlap = mask_iou(masks, masks) >= threshold
    last = torch.tensor([masklet.last_occluded for masklet in masklets], device=masks.device)
    was_occluded = last != NEVER
    later = last[:, None] < last if reverse else last[:, None] > last
    both = was_occluded[:, None] & was_occluded
    return (overlap & later & both).any(dim=1)
