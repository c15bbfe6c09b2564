"""Identities through absences and crossings, with a detector and a tracker that see the truth.

What random weights find says nothing of identities. Here both answer with the true masks of a clip,
so that what is left is the bookkeeping: who is who, who is doubted, what is remembered.
"""

from typing import Any

import pytest
import torch
from tiny import tiny_video
from torch import Tensor

from efficientsam3_hf import EfficientSam3VideoModel, EfficientSam3VideoProcessor
from efficientsam3_hf.models.masks import mask_iou
from efficientsam3_hf.models.modeling_efficientsam3_video import Detections

SIDE = 32  # of predicted masks
NAMES = ("left", "right")


def square(x: int, y: int, size: int = 8) -> Tensor:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[max(y, 0) : max(y + size, 0), max(x, 0) : max(x + size, 0)] = True
    return mask


def crossing(length: int = 20) -> Tensor:
    """Two squares (frames, 2, height, width) that pass through one another."""
    return torch.stack([torch.stack([square(t, 10), square(19 - t, 13)]) for t in range(length)])


def leaving(length: int = 20, gone: range = range(6, 12)) -> Tensor:
    """A square that stays, and one that is out of the picture for a while."""
    nowhere = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    return torch.stack(
        [
            torch.stack([square(4, 4), nowhere if t in gone else square(20, 6 + t // 2)])
            for t in range(length)
        ]
    )


class TruthfulModel:
    """A model whose detector and tracker see the true masks."""

    def __init__(self, truth: Tensor, **settings: Any):
        self.truth, self.followed = truth, {}
        self.model = tiny_video(
            "dense", hotstart_delay=0, recondition_every_nth_frame=0, **settings
        )
        self.model.detect = self.detect
        self.model.track = self.track
        self.blind_to: set[tuple[int, int]] = set()  # (frame, object) the detector misses

    def detect(self, session, vision, frame_idx: int) -> Detections:
        seen = [
            number
            for number, mask in enumerate(self.truth[frame_idx])
            if mask.any() and (frame_idx, number) not in self.blind_to
        ]
        return Detections(
            self.logits(frame_idx, seen), torch.full((len(seen),), 0.95), [0] * len(seen)
        )

    def track(self, session, frame_idx: int, reverse: bool) -> tuple[Tensor, Tensor]:
        EfficientSam3VideoModel.track(self.model, session, frame_idx, reverse)  # its memories
        for obj_id, masklet in session.masklets.items():
            if obj_id not in self.followed:  # begun on a detection: follow that object from now on
                before = self.truth[masklet.first_frame]
                begun = session.tracker.objects[obj_id].memories[masklet.first_frame].pred_masks > 0
                self.followed[obj_id] = int(mask_iou(begun, before).argmax())
        rows = [self.followed[obj_id] for obj_id in session.obj_ids]
        is_there = self.truth[frame_idx][rows].flatten(1).any(dim=1)
        return self.logits(frame_idx, rows), torch.where(is_there, 5.0, -5.0)

    def logits(self, frame_idx: int, rows: list[int]) -> Tensor:
        return self.truth[frame_idx][rows].float() * 10 - 5

    def run(self, processor: EfficientSam3VideoProcessor, **options: Any) -> list[Any]:
        frames = torch.zeros(len(self.truth), 3, 60, 60, dtype=torch.uint8)
        session = processor.init_video_session(frames)
        processor.add_text_prompt(session, "square")
        self.session = session
        return list(self.model.propagate_in_video_iterator(session, **options))


@pytest.fixture(scope="module")
def video_processor(processor) -> EfficientSam3VideoProcessor:
    return EfficientSam3VideoProcessor(processor.image_processor, processor.tokenizer)


def test_an_object_that_leaves_and_comes_back_keeps_its_identity(video_processor):
    truthful = TruthfulModel(leaving())

    outputs = truthful.run(video_processor)

    assert all(output.object_ids == [0, 1] for output in outputs)
    assert truthful.session.max_obj_id == 1
    seen = [
        [bool((output.obj_id_to_mask[obj_id] > 0).any()) for obj_id in (0, 1)] for output in outputs
    ]
    assert [both[0] for both in seen] == [True] * 20
    assert [both[1] for both in seen] == [t not in range(6, 12) for t in range(20)]
    away = truthful.session.masklets[1]
    assert away.last_occluded == 11
    assert away.lost_for == 0
    results = [
        video_processor.post_process_frame(truthful.session, output).object_ids
        for output in outputs
    ]
    assert [1 in ids for ids in results] == [both[1] for both in seen]


def test_an_object_that_is_away_for_too_long_comes_back_as_another(video_processor):
    truthful = TruthfulModel(leaving(), lost_after=3)

    outputs = truthful.run(video_processor)

    assert outputs[5].object_ids == [0, 1]
    assert outputs[11].object_ids == [0]
    assert outputs[-1].object_ids == [0, 2]


def test_objects_that_cross_keep_their_identities(video_processor):
    truth = crossing()
    truthful = TruthfulModel(truth)

    outputs = truthful.run(video_processor)

    overlap = max(float(mask_iou(both[:1], both[1:])) for both in truth)
    assert overlap > 0.3  # they do meet
    assert all(output.object_ids == [0, 1] for output in outputs)
    for frame, output in enumerate(outputs):
        for obj_id, row in truthful.followed.items():
            shown = output.obj_id_to_mask[obj_id][0] > 0
            assert torch.equal(shown, truth[frame, row])
    assert truthful.session.masklets[0].duplicates == truthful.session.masklets[1].duplicates == {}


def test_masks_of_objects_that_cross_do_not_overlap_in_results(video_processor):
    truthful = TruthfulModel(crossing())

    outputs = truthful.run(video_processor)

    for output in outputs:
        masks = video_processor.post_process_frame(truthful.session, output).masks
        assert masks.sum(dim=0).max() <= 1
        assert len(masks) == 2


def test_a_short_lapse_of_the_detector_is_forgiven_and_a_long_one_is_not(video_processor):
    thresholds = {"hotstart_unmatch_thresh": 4, "hotstart_dup_thresh": 4}
    outputs = {}
    for lapse in (3, 4):
        truthful = TruthfulModel(leaving(12, range(0)), **thresholds)
        truthful.model.config.hotstart_delay = 8
        truthful.blind_to = {(frame, 1) for frame in range(1, 1 + lapse)}
        outputs[lapse] = truthful.run(video_processor)

    assert all(1 in output.object_ids for output in outputs[3])
    assert 1 not in outputs[4][-1].object_ids
    # Shown in no frame, since results come late; it begins again when it is detected again.
    assert all(1 in output.removed_obj_ids for output in outputs[4][:5])
    assert outputs[4][-1].object_ids == [0, 2]


def test_two_masklets_of_one_object_become_one(video_processor):
    truth = leaving(14, range(0))
    truthful = TruthfulModel(truth, hotstart_unmatch_thresh=3, hotstart_dup_thresh=3)
    truthful.model.config.hotstart_delay = 8
    original = truthful.model.settle

    def settle(session, frame_idx, *args, **kwargs):
        output = original(session, frame_idx, *args, **kwargs)
        if frame_idx == 2:  # a second masklet begins on the first object
            detections = truthful.detect(session, None, 2)
            truthful.model.begin(session, 2, detections, [0], False)
        return output

    truthful.model.settle = settle

    truthful.run(video_processor)

    assert truthful.session.obj_ids == [0, 1]  # the younger of the two is gone
    assert truthful.session.max_obj_id == 2


def test_backward_the_same_objects_are_found(video_processor):
    truthful = TruthfulModel(crossing())

    outputs = truthful.run(video_processor, start_frame_idx=19, reverse=True)

    assert [output.frame_idx for output in outputs] == list(range(19, -1, -1))
    assert all(output.object_ids == [0, 1] for output in outputs)
