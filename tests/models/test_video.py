"""Concepts in video: against transformers' `Sam3VideoModel`, and what ours adds to it."""

import copy
from typing import Any

import pytest
import tiny
import torch
from tiny import (
    LOW_THRESHOLDS,
    TINY_CLIP,
    TINY_VIT,
    moving_squares,
    see_objects,
    stir,
    tiny_config,
    tiny_video_config,
)
from torch import Tensor
from transformers import Sam3Config, Sam3VideoConfig, Sam3VideoModel, Sam3VideoProcessor
from transformers.models.sam3_video import modeling_sam3_video as stock_code

from efficientsam3_hf import (
    EfficientSam3ConceptSession,
    EfficientSam3VideoConfig,
    EfficientSam3VideoModel,
    EfficientSam3VideoProcessor,
    EfficientSam3VideoSession,
)
from efficientsam3_hf.models.masks import component_areas

PHRASES = ["cat", "dog"]


class PlainKernels:
    """What transformers asks of an optional package, answered by our plain torch."""

    @staticmethod
    def generic_nms(ious: Tensor, scores: Tensor, threshold: float, use_iou_matrix: bool):
        kept: list[int] = []
        for index in scores.argsort(descending=True, stable=True).tolist():
            if all(ious[index, other] <= threshold for other in kept):
                kept.append(index)
        return torch.tensor(kept)

    @staticmethod
    def cc_2d(mask: Tensor, get_counts: bool):
        return mask, component_areas(mask[:, 0].bool())[:, None].int()


def wide_parts(**detector: Any) -> dict[str, dict[str, Any]]:
    """Detector and tracker of a width that transformers' tracker takes: 128."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WIDTH", 128)
        patch.setattr(tiny, "HEADS", {**tiny.HEADS, "hidden_size": 128})
        vision = {**copy.deepcopy(TINY_VIT), "fpn_hidden_size": 128}
        return {
            "detector_config": tiny_config(vision, TINY_CLIP, **detector).to_dict(),
            "tracker_config": tiny_video_config(
                vision=vision, memory_encoder_output_channels=64, perceiver_resampler_hidden_size=64
            ).to_dict(),
        }


@pytest.fixture(scope="module")
def stock() -> Sam3VideoModel:
    parts = wide_parts()
    detector = {name: parts["detector_config"][name] for name in Sam3Config.sub_configs_defaults}
    tracker = {
        name: value
        for name, value in parts["tracker_config"].items()
        if not name.startswith("perceiver") and name not in ("memory", "auto_map")
    }
    tracker |= {"model_type": "sam3_tracker_video", "image_size": 112}
    tracker["memory_attention_rope_feat_sizes"] = [8, 8]
    config = Sam3VideoConfig(
        detector_config=detector, tracker_config=tracker, low_res_mask_size=32, **LOW_THRESHOLDS
    )
    torch.manual_seed(0)
    model = stir(Sam3VideoModel(config))
    see_objects(model.tracker_model)
    return model


class TracksTwice(EfficientSam3VideoModel):
    """Ours with a slip of transformers: where an object begins, all others are tracked again.

    Their memories of that frame, which had been settled, are overwritten by raw masks, made binary
    as if they had been prompts.
    """

    def begin(self, session, frame_idx, *args, **kwargs):
        others = [
            obj_id
            for obj_id, tracked in session.tracker.objects.items()
            if not tracked.memories[frame_idx].is_conditioning
        ]
        begun = super().begin(session, frame_idx, *args, **kwargs)
        if others:
            tracker, soft = self.tracker_model, self.tracker_model.memory_masks
            tracker.memory_masks = lambda masks, _: soft(masks, torch.ones(len(masks)).bool())
            tracker.track_frame(session.tracker, frame_idx, object_ids=others)
            tracker.memory_masks = soft
        return begun


@pytest.fixture(scope="module")
def ours(stock) -> EfficientSam3VideoModel:
    """Ours with the weights of transformers'."""
    parts = wide_parts(always_encode_geometry=False, has_point_branch=False)
    model = TracksTwice(EfficientSam3VideoConfig(**parts, **LOW_THRESHOLDS))
    model.load_state_dict(stock.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def video_processor(processor) -> EfficientSam3VideoProcessor:
    return EfficientSam3VideoProcessor(processor.image_processor, processor.tokenizer)


def stock_session(stock, processor, frames):
    session = stock_code.Sam3VideoInferenceSession(frames, 112, 112, dtype=torch.float32)
    for phrase in PHRASES:
        inputs = processor(text=phrase)
        number = session.add_prompt(phrase)
        session.prompt_input_ids[number] = inputs["input_ids"]
        session.prompt_attention_masks[number] = inputs["attention_mask"]
    return session


def ours_session(processor, frames) -> EfficientSam3ConceptSession:
    tracker = EfficientSam3VideoSession(frames, 112, 112)
    return processor.add_text_prompt(EfficientSam3ConceptSession(tracker), PHRASES)


def as_stock_names_them(before: list[int], of_stock) -> dict[int, int]:
    """Our objects -> under which id transformers shows their masks.

    In a frame that removes objects, it gives the masks of all to the ids of those that are left.
    """
    names = dict(zip(before, of_stock.object_ids, strict=False))
    return {ours: name for ours, name in names.items() if name in before}


@pytest.mark.parametrize("recondition", [0, 4])
@pytest.mark.parametrize("new_threshold", [0.2, 0.99])
def test_masklets_are_those_of_transformers(
    stock, ours, video_processor, monkeypatch, new_threshold: float, recondition: int
):
    monkeypatch.setattr(stock_code, "cv_utils_kernel", PlainKernels)
    for name, value in (
        ("new_det_thresh", new_threshold),
        ("recondition_every_nth_frame", recondition),
    ):
        monkeypatch.setattr(stock, name, value)
        monkeypatch.setattr(ours.config, name, value)
    frames, _ = moving_squares(14)
    theirs = stock_session(stock, video_processor, frames)
    session = ours_session(video_processor, frames)
    removed = set()

    for index in range(len(frames)):
        before = session.obj_ids
        output = ours(session, frame_idx=index)
        of_stock = stock(theirs, frame_idx=index)

        removed |= output.removed_obj_ids
        assert output.object_ids == of_stock.object_ids
        assert removed == of_stock.removed_obj_ids
        names = as_stock_names_them(before, of_stock)
        names |= {obj_id: obj_id for obj_id in set(output.object_ids) - set(before)}
        for obj_id, name in names.items():
            torch.testing.assert_close(
                output.obj_id_to_mask[obj_id], of_stock.obj_id_to_mask[name], atol=2e-4, rtol=1e-3
            )
            if obj_id in output.removed_obj_ids:
                continue
            assert output.obj_id_to_score[obj_id] == pytest.approx(
                of_stock.obj_id_to_score[obj_id], abs=1e-5
            )
    assert len(session.obj_ids) > 5
    assert bool(removed) == (new_threshold < 0.5)


def test_post_processing_is_that_of_transformers(stock, ours, video_processor, monkeypatch):
    monkeypatch.setattr(stock_code, "cv_utils_kernel", PlainKernels)
    frames, _ = moving_squares(3)
    monkeypatch.setattr(stock, "new_det_thresh", 0.99)
    monkeypatch.setattr(ours.config, "new_det_thresh", 0.99)
    theirs = stock_session(stock, video_processor, frames)
    session = ours_session(video_processor, frames)
    stock_processor = Sam3VideoProcessor.__new__(Sam3VideoProcessor)

    seen = 0
    for index in range(3):
        result = video_processor.postprocess_outputs(session, ours(session, frame_idx=index))
        expected = stock_processor.postprocess_outputs(theirs, stock(theirs, frame_idx=index))

        assert result["object_ids"].tolist() == expected["object_ids"].tolist()
        assert result["prompt_to_obj_ids"] == expected["prompt_to_obj_ids"]
        assert (result["masks"] != expected["masks"]).sum() <= 5  # on the border, by rounding
        torch.testing.assert_close(result["scores"], expected["scores"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(result["boxes"], expected["boxes"])
        seen += len(result["masks"])
    assert seen > 5


def test_whole_video_comes_late_and_knows_what_was_removed(
    stock, ours, video_processor, monkeypatch
):
    monkeypatch.setattr(stock_code, "cv_utils_kernel", PlainKernels)
    frames, _ = moving_squares(10)
    session = ours_session(video_processor, frames)

    outputs = list(ours.propagate_in_video_iterator(session))

    theirs = stock_session(stock, video_processor, frames)
    expected = list(stock.propagate_in_video_iterator(theirs))
    assert [output.frame_idx for output in outputs] == [output.frame_idx for output in expected]
    results = [video_processor.post_process_frame(session, output) for output in outputs]
    gone = theirs.hotstart_removed_obj_ids
    assert gone
    for result in results:
        assert not gone & set(result.object_ids)
