"""Identities through absences and crossings, with a detector and a tracker that see the truth.

What random weights find says nothing of identities. Here both answer with the true masks of a clip,
so that what is left is the bookkeeping: who is who, who is doubted, what is remembered.
"""

from functools import lru_cache
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
        # All frames look alike, so one stands for all.
        encode_frame = self.model.encode_frame
        self.encode_once = lru_cache(1)(lambda: encode_frame(torch.zeros(1, 3, 112, 112)))
        self.model.encode_frame = lambda pixel_values: self.encode_once()
        self.blind_to: set[tuple[int, int]] = set()  # (frame, object) the detector misses
        self.strength = torch.full((truth.shape[1],), 5.0)  # of the logits of each object
        self.looks: list[int] = []  # frames that the detector has searched

    def detect(self, session, vision, frame_idx: int) -> Detections:
        self.looks.append(frame_idx)
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
        return (self.truth[frame_idx][rows].float() * 2 - 1) * self.strength[rows, None, None]

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
    assert away.unconfirmed_for == 0
    results = [
        video_processor.post_process_frame(truthful.session, output).object_ids
        for output in outputs
    ]
    assert [1 in ids for ids in results] == [both[1] for both in seen]


def test_a_masklet_that_no_detection_confirms_is_forgotten_though_it_has_a_mask(video_processor):
    truthful = TruthfulModel(leaving(gone=range(0)), lost_after=3)
    truthful.blind_to = {(frame, 1) for frame in range(6, 20)}  # from then on it is a ghost

    outputs = truthful.run(video_processor)

    assert [1 in output.object_ids for output in outputs] == [t < 9 for t in range(20)]
    assert [1 in output.obj_id_to_mask for output in outputs] == [t < 9 for t in range(20)]
    assert (outputs[8].obj_id_to_mask[1] > 0).any()
    assert list(truthful.session.tracker.objects) == [0]


def test_what_is_lost_was_an_object_all_the_same(video_processor):
    truthful = TruthfulModel(leaving(), lost_after=2)
    truthful.model.config.hotstart_delay = 12  # results wait for longer than it takes to be lost

    outputs = truthful.run(video_processor)

    results = [video_processor.post_process_frame(truthful.session, output) for output in outputs]
    assert [1 in result.object_ids for result in results] == [t < 6 for t in range(20)]
    assert outputs[-1].object_ids == [0, 2]  # and when it came back, it was another


@pytest.mark.parametrize("every", [1, 3])
def test_what_detections_leave_alone_is_found_to_be_none_however_often_one_looks(
    every: int, video_processor
):
    thresholds = {"hotstart_unmatch_thresh": 6, "hotstart_dup_thresh": 6}
    truthful = TruthfulModel(
        leaving(14, range(0)), new_det_thresh=0.9, detect_every_nth_frame=every, **thresholds
    )
    truthful.model.config.hotstart_delay = 12
    truthful.blind_to = {(frame, 1) for frame in range(1, 14)}

    outputs = truthful.run(video_processor)

    assert truthful.looks == list(range(0, 14, every))
    assert outputs[5].object_ids == [0, 1]
    assert outputs[6].object_ids == [0]
    assert all(1 in output.removed_obj_ids for output in outputs[:6])


def test_what_is_none_takes_no_room_in_what_others_remember(video_processor):
    nowhere = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    truth = torch.stack([torch.stack([square(10, 10), square(8, 8, 14)])] * 8)
    memories = {}
    for has_ghost in (True, False):
        if not has_ghost:
            truth[:, 1] = nowhere
        truthful = TruthfulModel(
            truth, assoc_iou_thresh=0.4, hotstart_unmatch_thresh=3, hotstart_dup_thresh=3
        )
        truthful.model.config.hotstart_delay = 8
        truthful.strength[1] = 9  # it would cover the other
        truthful.blind_to = {(frame, 1) for frame in range(8) if frame != 2}
        truthful.run(video_processor, max_frame_num_to_track=5)
        memories[has_ghost] = truthful.session.tracker.objects[0].memories
        assert truthful.session.removed == ({1: 5} if has_ghost else {})

    # In frame 4 the ghost was believed; in frame 5 it is found to be none.
    torch.testing.assert_close(memories[True][5].features, memories[False][5].features)
    assert not torch.allclose(memories[True][4].features, memories[False][4].features)


def test_a_hidden_object_stays_hidden_between_looks(video_processor):
    truthful = TruthfulModel(
        leaving(14, range(0)),
        detect_every_nth_frame=3,
        suppress_unmatched_only_within_hotstart=False,
        init_trk_keep_alive=4,
    )
    truthful.blind_to = {(frame, 1) for frame in range(1, 12)}

    outputs = truthful.run(video_processor)

    # It falls by 3 in frames 3 and 6, and rises again in frame 12.
    assert [1 in output.suppressed_obj_ids for output in outputs] == [
        6 <= t < 12 for t in range(14)
    ]


@pytest.mark.parametrize(("start", "reverse"), [(5, False), (16, True)])
def test_looks_are_counted_from_the_first_frame_of_a_run(
    start: int, reverse: bool, video_processor
):
    truthful = TruthfulModel(leaving(gone=range(0)), detect_every_nth_frame=4)

    outputs = truthful.run(video_processor, start_frame_idx=start, reverse=reverse)
    first = truthful.looks.copy()
    list(truthful.model.propagate_in_video_iterator(truthful.session, 2, 5))

    assert first == list(range(start, -1 if reverse else 20, -4 if reverse else 4))
    assert all(output.object_ids == [0, 1] for output in outputs)
    assert truthful.looks[len(first) :] == [2, 6]


def test_a_new_phrase_is_looked_for_at_once(video_processor):
    truthful = TruthfulModel(leaving(gone=range(0)), detect_every_nth_frame=8)
    frames = torch.zeros(20, 3, 60, 60, dtype=torch.uint8)
    session = video_processor.init_video_session(frames)
    video_processor.add_text_prompt(session, "square")

    for frame_idx in range(20):
        if frame_idx == 3:
            video_processor.add_text_prompt(session, "circle")
        truthful.model(session, frame_idx=frame_idx)

    assert truthful.looks == [0, 3, 11, 19]


@pytest.mark.parametrize(("every", "expected"), [(1, [4, 8, 12]), (3, [6, 9, 12])])
def test_masks_are_confirmed_for_good_however_often_one_looks(
    every: int, expected: list[int], video_processor
):
    truthful = TruthfulModel(leaving(14, range(0)), detect_every_nth_frame=every)
    truthful.model.config.recondition_every_nth_frame = 4

    truthful.run(video_processor)

    tracked = truthful.session.tracker.objects[0]
    assert sorted(tracked.conditioning()) == [0, *expected]
    assert [tracked.memories[frame].is_reconditioned for frame in (0, *expected)] == [
        False, True, True, True,
    ]  # fmt: skip


def test_frames_confirmed_by_detections_keep_no_others_in_memory(video_processor):
    truthful = TruthfulModel(leaving(40, range(0)))
    truthful.model.config.recondition_every_nth_frame = 4

    truthful.run(video_processor)

    tracked = truthful.session.tracker.objects[0]
    assert sorted(tracked.conditioning()) == list(range(0, 40, 4))
    kept = {frame for frame, memory in tracked.memories.items() if memory.features is not None}
    # Around its birth and around the latest frame, as if there had been nothing in between.
    assert kept == {*range(7), *range(33, 40), *range(0, 40, 4)}


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
