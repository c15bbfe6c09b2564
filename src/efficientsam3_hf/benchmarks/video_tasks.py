"""Tasks on videos: objects that are given once, and concepts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.files import exists, join, read_json
from ..data.masks_rle import Rle, decode_rle, rle_area, rle_box, to_rle
from ..data.samples import ClipSample, Masklet
from ..data.track_writers import davis_palette
from ..evaluation import units, video_concept, video_objects
from .image_tasks import plain
from .loading import Loaded
from .subsets import Subset
from .tasks import Outcome, Task
from .videos import follow_concepts, follow_objects

# Format -> rule of `evaluation.video_objects`.
RULES = {
    "davis2017": "davis",
    "mose": "mose",
    "mosev2": "mosev2",
    "lvos": "lvos",
    "youtube-vos": "youtube-vos",
    "sa-v": "sa-v",
}

# Of frames that the data set has chosen itself.
EACH_FRAME = video_objects.Rule(skip_first=False, skip_last=False)


class VosTask(Task):
    """J&F of objects whose mask is given in the first frame where they are seen."""

    name = "vos"
    job = "tracks"
    formats = tuple(RULES)
    metrics = ("J&F", "J&F_dot", "J", "F", "F_dot", "G")
    kind = "video-object-segmentation"
    options = ()
    batch_size = 1

    def run(
        self,
        loaded: Loaded,
        subset: Subset,
        keys: Sequence[str],
        samples: Sequence[ClipSample],
        folder: Path,
    ) -> list[Outcome]:
        seen = seen_categories(subset)
        return [
            Outcome(key, self.follow(loaded, subset, sample, folder / str(sample.source_id), seen))
            for key, sample in zip(keys, samples, strict=True)
        ]

    def follow(
        self,
        loaded: Loaded,
        subset: Subset,
        sample: ClipSample,
        folder: Path,
        seen: set[str] | None,
    ) -> list[dict[str, Any]]:
        """Follow the objects of one video, write their masks, and score them."""
        rule = video_objects.RULES[RULES[subset.form]]
        given = given_objects(sample, rule)
        prompts: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
        for number, masklet in given.items():
            first = min(masklet.rles)
            prompts[first][number] = decode_rle(masklet.rles[first])
        annotated = set(sample.annotated_frames)
        predicted: dict[int, dict[int, Rle]] = {number: {} for number in given}
        frames = [frame.pixels for frame in sample.video or ()]
        may_overlap = subset.form == "sa-v"
        names = sample.frame_names or [f"{index:05d}" for index in range(len(frames))]
        for index, logits in follow_objects(loaded, frames, prompts):
            masks = {number: each > 0 for number, each in logits.items()}
            if not may_overlap:
                masks = apart(logits)
            masks = {number: mask.numpy() for number, mask in masks.items()}
            if may_overlap and index in annotated:
                for number, masklet in given.items():
                    mask = masks.get(number, np.zeros(sample.size, dtype=bool))
                    path = folder / str(masklet.source_id) / f"{names[index]}.png"
                    write_mask(path, mask)
            elif not may_overlap:
                write_labels(folder / f"{names[index]}.png", masks, sample.size)
            if index in annotated:
                for number, mask in masks.items():
                    predicted[number][index] = to_rle(mask, mask.shape)
        records = []
        for number, masklet in given.items():
            wanted = frames_in_range(masklet, sample.annotated_frames, names)
            score = video_objects.score_object(
                [predicted[number].get(frame) for frame in wanted or sample.annotated_frames],
                [masklet.rles.get(frame) for frame in wanted or sample.annotated_frames],
                EACH_FRAME if wanted else rule,
            )
            if score is not None:
                if seen is not None:
                    score = {**score, "is_seen": masklet.details.get("category") in seen}
                records.append(score)
        return records

    def summarize(self, table: units.Units, weights: np.ndarray) -> Mapping[str, float]:
        return video_objects.summarize(table, weights)


class ConceptVideoTask(Task):
    """cgF1 and pHOTA of SA-Co VEval: which phrases are in a video, and all their masklets.

    `batch_size` is the number of phrases that are followed in one session.
    """

    name = "concept-video"
    job = "concept tracks"
    formats = ("saco-video",)
    metrics = ("cgF1", "pHOTA", "IL_MCC", "pmF1")
    kind = "promptable-concept-segmentation"
    submission = "predictions.json"
    samples_at_once = 1

    def run(
        self,
        loaded: Loaded,
        subset: Subset,
        keys: Sequence[str],
        samples: Sequence[ClipSample],
        folder: Path,
    ) -> list[Outcome]:
        outcomes = []
        for key, sample in zip(keys, samples, strict=True):
            frames = [frame.pixels for frame in sample.video or ()]
            outcome = Outcome(key)
            for start in range(0, len(sample.queries), self.batch_size):
                queries = sample.queries[start : start + self.batch_size]
                phrases = [query.phrase or "" for query in queries]
                found = concept_masklets(loaded, frames, phrases)
                for query, masklets in zip(queries, found, strict=True):
                    truth = query.masklets or []
                    record = video_concept.score_pair(
                        [rles for _, rles in masklets],
                        [score for score, _ in masklets],
                        [[each.rles.get(index) for index in range(len(frames))] for each in truth],
                        [bool(each.details.get("iscrowd", 0)) for each in truth],
                    )
                    outcome.records.append(plain(record))
                    category = query.details["category_id"]
                    outcome.predictions += [
                        {
                            "video_id": sample.source_id,
                            "category_id": category,
                            "score": score,
                            "segmentations": rles,
                            "bboxes": [None if rle is None else box_xywh(rle) for rle in rles],
                            "areas": [None if rle is None else rle_area(rle) for rle in rles],
                        }
                        for score, rles in masklets
                    ]
            outcomes.append(outcome)
        return outcomes

    def summarize(self, table: units.Units, weights: np.ndarray) -> Mapping[str, float]:
        return video_concept.summarize(table, weights)


def given_objects(sample: ClipSample, rule: video_objects.Rule) -> dict[int, Masklet]:
    """The objects to follow, by a number of their own in a PNG.

    Where the rule looks at whole videos, these are the ones that the first frame has.
    """
    masklets = [masklet for masklet in sample.masklets if masklet.rles]
    if not rule.from_first_appearance and not rule.needs_truth:
        first = sample.annotated_frames[0]
        masklets = [masklet for masklet in masklets if first in masklet.rles]
    return {
        masklet.source_id if isinstance(masklet.source_id, int) else place: masklet
        for place, masklet in enumerate(masklets, start=1)
    }


def frames_in_range(masklet: Masklet, annotated: Sequence[int], names: Sequence[str]) -> list[int]:
    """Annotated frames in which LVOS counts an object, by its `frame_range`; none without one.

    As in its evaluator, the range ends before its `end`, and each frame in it counts.
    """
    frame_range = masklet.details.get("frame_range") or {}
    if not {"start", "end"} <= set(frame_range):
        return []
    counted = range(int(frame_range["start"]), int(frame_range["end"]))
    return [frame for frame in annotated if int(names[frame]) in counted]


def apart(logits: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Masks that do not overlap: a pixel belongs to the object with the highest logit above 0."""
    if not logits:
        return {}
    stacked = torch.stack(list(logits.values()))
    best, owner = stacked.max(dim=0)
    return {number: (owner == row) & (best > 0) for row, number in enumerate(logits)}


def concept_masklets(
    loaded: Loaded, frames: Sequence[np.ndarray], phrases: Sequence[str]
) -> list[list[tuple[float, list[Rle | None]]]]:
    """For each phrase score and masks, one for each frame, of every object that was found."""
    objects: list[dict[int, tuple[float, list[Rle | None]]]] = [{} for _ in phrases]
    for index, result in follow_concepts(loaded, frames, phrases):
        rows = {int(number): row for row, number in enumerate(result["object_ids"])}
        for place, phrase in enumerate(phrases):
            for number in result["prompt_to_obj_ids"].get(phrase, []):
                row = rows[int(number)]
                score = float(result["scores"][row])
                _, rles = objects[place].setdefault(int(number), (score, [None] * len(frames)))
                mask = result["masks"][row].cpu().numpy().astype(bool)
                rles[index] = to_rle(mask, mask.shape)
    return [list(of_phrase.values()) for of_phrase in objects]


def seen_categories(subset: Subset) -> set[str] | None:
    """Categories of the training set of YouTube-VOS, if it lies beside; else None."""
    if subset.form != "youtube-vos":
        return None
    path = join(str(Path(subset.reader.meta).parent.parent), "train", "meta.json")
    if not exists(path):
        return None
    videos = read_json(path)["videos"].values()
    return {each.get("category") for video in videos for each in video["objects"].values()}


def write_labels(path: Path, masks: Mapping[int, np.ndarray], size: tuple[int, int]) -> None:
    """A PNG whose values are the numbers of objects, with DAVIS's palette."""
    labels = np.zeros(size, dtype=np.uint8)
    for number, mask in masks.items():
        if not 0 < number < 255:
            raise ValueError(f"{number} is no number for a PNG of 8 bits: 1 to 254 are.")
        labels[mask] = number
    picture = Image.fromarray(labels)
    picture.putpalette(davis_palette())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def write_mask(path: Path, mask: np.ndarray) -> None:
    """A PNG of one object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)


def box_xywh(rle: Rle) -> list[float]:
    """The box of a mask as (x, y, width, height)."""
    x1, y1, x2, y2 = rle_box(rle)
    return [x1, y1, x2 - x1, y2 - y1]
