"""The rules of concept tracking, against those of transformers on random scenes."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor
from transformers import Sam3VideoConfig
from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoModel

from efficientsam3_hf.models.masklets import (
    Association,
    Masklet,
    associate,
    hidden_masklets,
    judge,
    lost_masklets,
    newly_confused,
)

THRESHOLDS = {
    "hotstart_delay": 6,
    "hotstart_unmatch_thresh": 2,
    "hotstart_dup_thresh": 2,
    "init_trk_keep_alive": 1,
    "max_trk_keep_alive": 2,
}


class StockRules:
    """transformers' rules, which want nothing of a model but its thresholds."""

    associate = Sam3VideoModel._associate_det_trk
    judge = Sam3VideoModel._process_hotstart
    newly_confused = Sam3VideoModel._get_objects_to_suppress_based_on_most_recently_occluded

    def __init__(self, config: Sam3VideoConfig):
        self.config = config

    def __getattr__(self, name: str):
        return getattr(self.config, name)


def squares(count: int, generator: torch.Generator, side: int = 16) -> Tensor:
    """Mask logits of squares, some of them empty."""
    masks = torch.full((count, side, side), -5.0)
    for mask in masks:
        y, x, size = torch.randint(0, 10, (3,), generator=generator).tolist()
        mask[y : y + size, x : x + size] = 5
    return masks


@pytest.mark.parametrize("seed", range(40))
def test_association_is_that_of_transformers(seed: int):
    generator = torch.Generator().manual_seed(seed)
    config = Sam3VideoConfig(high_iou_thresh=0.6)
    num_detected, num_tracked = torch.randint(0, 7, (2,), generator=generator).tolist()
    detected, tracked = squares(num_detected, generator), squares(num_tracked, generator)
    detected = torch.cat([detected, tracked[:2].roll(1, dims=2)])  # some that match
    scores = torch.rand(len(detected), generator=generator) / 2 + 0.5
    detected_prompts = torch.randint(0, 2, (len(detected),), generator=generator)
    tracked_prompts = torch.randint(0, 2, (num_tracked,), generator=generator)
    ids = list(range(100, 100 + num_tracked))

    found = associate(
        detected, scores, detected_prompts.tolist(), tracked, tracked_prompts.tolist(), config
    )

    new, unmatched, matches, sure, empty = StockRules(config).associate(
        detected, scores, tracked, ids, detected_prompts, tracked_prompts
    )
    assert found.new == new
    assert [ids[index] for index in found.unmatched] == unmatched
    assert {ids[masklet]: detection for masklet, detection in found.sure.items()} == sure
    of_stock = [matches.get(detection, []) for detection in range(len(detected))]
    if num_tracked and len(detected):
        assert [[ids[index] for index in matched] for matched in found.matches] == of_stock
        has_mask = (tracked > 0).flatten(1).any(dim=1)
        assert found.empty == [i for i in range(num_tracked) if not has_mask[i]]
    assert [ids[index] for index in found.empty] == empty or not num_tracked


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("only_young", [False, True])
@pytest.mark.parametrize("count_empty", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_judgement_over_many_frames_is_that_of_transformers(
    seed: int, count_empty: bool, only_young: bool, reverse: bool
):
    generator = torch.Generator().manual_seed(seed)
    config = Sam3VideoConfig(
        **THRESHOLDS,
        suppress_unmatched_only_within_hotstart=only_young,
        decrease_trk_keep_alive_for_empty_masklets=count_empty,
    )
    masklets: list[Masklet] = []
    memory = {
        "obj_first_frame_idx": {},
        "unmatched_frame_inds": defaultdict(list),
        "trk_keep_alive": {},
        "overlap_pair_to_frame_inds": defaultdict(list),
        "removed_obj_ids": set(),
        "suppressed_obj_ids": defaultdict(set),
    }
    seen_removed, seen_hidden, next_id = set(), set(), 0
    for step in range(40):
        frame = 100 - step if reverse else step
        states = torch.randint(0, 4, (len(masklets),), generator=generator).tolist()
        matched = [i for i, state in enumerate(states) if state in (0, 3)]
        association = Association(
            new=[],
            matches=[matched[:2], matched[2:]] if step % 3 else [[i] for i in matched],
            unmatched=[i for i, state in enumerate(states) if state == 1],
            empty=[i for i, state in enumerate(states) if state == 2],
            sure={},
        )
        ids = [masklet.object_id for masklet in masklets]
        born = [next_id, next_id + 1] if step % 5 == 0 else []
        next_id += len(born)

        removed = judge(masklets, association, frame, config)
        hidden = hidden_masklets(masklets, config) - removed

        removed_of_stock, _ = StockRules(config).judge(
            None,
            frame,
            reverse,
            {i: [ids[k] for k in one] for i, one in enumerate(association.matches)},
            born,
            [ids[k] for k in association.empty],
            [ids[k] for k in association.unmatched],
            memory,
        )
        # transformers forgets nobody: it goes on hiding, and counting, those it has removed.
        hidden_of_stock = memory["suppressed_obj_ids"][frame] & set(ids) - removed_of_stock
        assert removed == removed_of_stock
        assert hidden == hidden_of_stock
        seen_removed |= removed
        seen_hidden |= hidden
        masklets = [masklet for masklet in masklets if masklet.object_id not in removed]
        masklets += [Masklet(i, 0, 0.9, frame, config.init_trk_keep_alive) for i in born]
    assert seen_removed
    assert bool(seen_hidden) != only_young


UNCONFIRMED = Association([], [], unmatched=[0], empty=[], sure={})
CONFIRMED = Association([], [[0]], unmatched=[], empty=[], sure={})


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_look_speaks_for_the_frames_since_the_last_one(every: int):
    config = Sam3VideoConfig(
        hotstart_delay=13, hotstart_unmatch_thresh=6, init_trk_keep_alive=9, max_trk_keep_alive=12
    )
    masklet = Masklet(0, 0, 0.9, 0, config.init_trk_keep_alive)

    removed = {
        frame: judge([masklet], UNCONFIRMED, frame, config, weight=every)
        for frame in range(every, 7, every)
    }

    assert {frame for frame, ids in removed.items() if ids} == {6}  # however often one looks
    assert masklet.keep_alive == 3
    assert masklet.unconfirmed_for == 6


def test_a_duplicate_seen_in_few_looks_is_removed_as_fast_as_one_seen_in_many():
    config = Sam3VideoConfig(hotstart_delay=13, hotstart_dup_thresh=6, hotstart_unmatch_thresh=6)
    both = Association([], [[0, 1]], [], [], {})
    for every in (1, 3):
        pair = [Masklet(0, 0, 0.9, 0, 1), Masklet(1, 0, 0.9, 3, 1)]

        removed = [judge(pair, both, f, config, every) for f in range(3 + every, 10, every)]

        assert removed[-1] == {1}
        assert not any(removed[:-1])


def test_what_no_detection_confirms_is_lost_whether_it_has_a_mask_or_not():
    config = Sam3VideoConfig(hotstart_delay=0)
    empty = Association([], [], unmatched=[], empty=[0], sure={})
    for association in (UNCONFIRMED, empty):
        masklet, lost = Masklet(0, 0, 0.9, 0, 30), []
        for frame in range(1, 12):
            seen = CONFIRMED if frame == 5 else association
            assert not judge([masklet], seen, frame, config)
            lost.append(lost_masklets([masklet], 4))

        assert lost == [set()] * 9 + [{0}] * 2  # the detection of frame 5 lets it begin anew
        assert not lost_masklets([masklet], None)


@pytest.mark.parametrize("seed", range(10))
def test_confusion_after_an_occlusion_is_that_of_transformers(seed: int):
    generator = torch.Generator().manual_seed(seed)
    config = Sam3VideoConfig(suppress_overlapping_based_on_recent_occlusion_threshold=0.3)
    masks = squares(6, generator) > 0
    masks = torch.cat([masks, masks[:3]])
    last = torch.randint(-1, 4, (len(masks),), generator=generator)
    masklets = [Masklet(i, 0, 0.9, 0, 1, last_occluded=int(frame)) for i, frame in enumerate(last)]

    confused = newly_confused(masks, masklets, 0.3)

    expected = StockRules(config).newly_confused(masks, last, list(range(len(masks))))
    assert torch.equal(confused, expected)


def test_a_masklet_never_occluded_has_taken_no_ones_place():
    masks = torch.ones(2, 4, 4, dtype=torch.bool)
    never, once = Masklet(0, 0, 0.9, 9, 1), Masklet(1, 0, 0.9, 9, 1, last_occluded=7)

    for reverse in (False, True):  # transformers hides the first of them when time runs backward
        assert not newly_confused(masks, [never, once], 0.5, reverse).any()


def test_of_two_occluded_masklets_the_one_seen_again_later_is_the_wrong_one():
    masks = torch.ones(2, 4, 4, dtype=torch.bool)
    early = Masklet(0, 0, 0.9, 0, 1, last_occluded=3)
    late = Masklet(1, 0, 0.9, 0, 1, last_occluded=8)

    assert newly_confused(masks, [early, late], 0.5).tolist() == [False, True]
    assert newly_confused(masks, [early, late], 0.5, reverse=True).tolist() == [True, False]


def test_what_is_remembered_of_a_masklet_does_not_grow():
    config = Sam3VideoConfig(**THRESHOLDS)
    old = Masklet(0, 0, 0.9, 0, config.init_trk_keep_alive)

    for frame in range(1, 2000):  # a new rival in every frame
        rival = Masklet(frame, 0, 0.9, frame, config.init_trk_keep_alive)
        judge([old, rival], Association([], [[0, 1]], [], [], {}), frame, config)

    assert old.duplicates == {}
