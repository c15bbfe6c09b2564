"""Concepts in video: against transformers' `Sam3VideoModel`, and what ours adds to it."""

import copy
import gc
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tiny import (
    LOW_THRESHOLDS,
    TINY_CLIP,
    TINY_VIT,
    moving_squares,
    see_objects,
    stir,
    tiny_config,
    tiny_video,
    tiny_video_config,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, Sam3Config, Sam3VideoConfig, Sam3VideoModel, Sam3VideoProcessor
from transformers.models.sam3_video import modeling_sam3_video as stock_code

from efficientsam3_hf import (
    EfficientSam3ConceptSession,
    EfficientSam3ImageProcessor,
    EfficientSam3VideoConfig,
    EfficientSam3VideoModel,
    EfficientSam3VideoProcessor,
    EfficientSam3VideoSession,
    zoo,
)
from efficientsam3_hf.data.video import Frame, open_video
from efficientsam3_hf.models.masks import component_areas
from efficientsam3_hf.models.processing_efficientsam3_video import FrameMasklets

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


def with_weights_of(stock: Sam3VideoModel, model_class: type) -> EfficientSam3VideoModel:
    """Ours with the weights of transformers'."""
    parts = wide_parts(always_encode_geometry=False, has_point_branch=False)
    model = model_class(EfficientSam3VideoConfig(**parts, **LOW_THRESHOLDS))
    model.load_state_dict(stock.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def ours(stock) -> EfficientSam3VideoModel:
    return with_weights_of(stock, EfficientSam3VideoModel)


@pytest.fixture(scope="module")
def slipping(stock) -> EfficientSam3VideoModel:
    return with_weights_of(stock, TracksTwice)


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
@pytest.mark.parametrize(
    ("which", "new_threshold"),
    [("ours", 0.99), ("slipping", 0.2)],  # objects begin in the first frame only, or in many
)
def test_masklets_are_those_of_transformers(
    stock, which: str, new_threshold: float, video_processor, monkeypatch, recondition: int, request
):
    ours = request.getfixturevalue(which)
    monkeypatch.setattr(stock_code, "cv_utils_kernel", PlainKernels)
    for name, value in (
        ("new_det_thresh", new_threshold),
        ("recondition_every_nth_frame", recondition),
    ):
        monkeypatch.setattr(stock, name, value)
        monkeypatch.setattr(ours.config, name, value)
    frames, _ = moving_squares(10)
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
            if obj_id in output.removed_obj_ids:
                continue  # transformers still gives its mask, which nobody sees
            torch.testing.assert_close(
                output.obj_id_to_mask[obj_id],
                of_stock.obj_id_to_mask[name],
                atol=2e-4,
                rtol=1e-3,
            )
            assert output.obj_id_to_score[obj_id] == pytest.approx(
                of_stock.obj_id_to_score[obj_id], abs=1e-5
            )
    assert len(session.obj_ids) > 1
    assert removed  # some begin and some turn out to be none


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


# What ours adds.


@pytest.fixture(scope="module")
def student() -> EfficientSam3VideoModel:
    return tiny_video("perceiver", hotstart_delay=0)


def pictures(count: int, size: tuple[int, int] = (60, 90)) -> list[np.ndarray]:
    """Frames of a street in which squares drift."""
    clip, _ = moving_squares(count)
    clip = F.interpolate(clip, size)
    clip = ((clip + 1) * 127).clamp(0, 255).byte()
    return list(clip.movedim(1, -1).numpy())


def as_plain(result: FrameMasklets) -> tuple:
    """What can be compared of a result."""
    return (
        result.frame_index,
        result.object_ids,
        result.labels,
        result.scores.tolist(),
        result.boxes.tolist(),
        result.masks.numpy().tobytes(),
        result.is_confirmed,
        None if result.pixels is None else result.pixels.tobytes(),
    )


def test_a_stream_gives_each_frame_as_it_comes(student, video_processor):
    asked = []

    def camera() -> Iterator[np.ndarray]:
        for index, picture in enumerate(itertools.cycle(pictures(8))):
            asked.append(index)
            yield picture

    stream = student.stream(camera(), text=PHRASES, processor=video_processor)

    for index, result in zip(range(10), stream, strict=False):
        assert asked[-1] <= index + 1
        assert result.frame_index == index
        assert result.masks.shape[1:] == (60, 90)
        assert set(result.labels) <= set(PHRASES)
        assert len(result.object_ids) == len(result.scores) == len(result.boxes)
        assert result.pixels.shape == (60, 90, 3)


def test_a_stream_that_comes_late_equals_the_whole_video(video_processor):
    doubtful = {"hotstart_unmatch_thresh": 2, "trk_assoc_iou_thresh": 0.9}
    model = tiny_video("dense", hotstart_delay=4, **doubtful)
    frames = pictures(17)  # as long as pointers reach, whose unit of time is then a stream's
    session = video_processor.init_video_session(frames)
    video_processor.add_text_prompt(session, PHRASES)

    whole = [
        video_processor.post_process_frame(session, output)
        for output in model.propagate_in_video_iterator(session)
    ]
    late = list(model.stream(frames, text=PHRASES, processor=video_processor))
    at_once = list(model.stream(frames, text=PHRASES, processor=video_processor, delay=0))

    assert [as_plain(result)[:-1] for result in late] == [as_plain(result)[:-1] for result in whole]
    assert [result.frame_index for result in late] == list(range(17))
    assert all(all(result.is_confirmed) for result in late[:-3])
    assert not any(at_once[0].is_confirmed)
    removed = {i for r in at_once for i in r.object_ids} - {i for r in late for i in r.object_ids}
    assert removed  # shown when results come at once, found to be none when they come late


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize(
    "kind", ["array", "PIL", "channels first", "floats", "path", "name", "one buffer"]
)
def test_results_bring_their_pictures_as_arrays_of_their_own(
    student, video_processor, kind: str, delay: int, tmp_path
):
    frames = pictures(4)

    def as_they_come() -> Iterator[Any]:
        buffer = np.zeros_like(frames[0])
        for index, pixels in enumerate(frames):
            buffer[:] = pixels
            Image.fromarray(pixels).save(tmp_path / f"{index}.png")
            yield {
                "array": pixels,
                "PIL": Image.fromarray(pixels),
                "channels first": torch.from_numpy(pixels).movedim(-1, 0),
                "floats": pixels.astype(np.float32),
                "path": tmp_path / f"{index}.png",
                "name": str(tmp_path / f"{index}.png"),
                "one buffer": buffer,
            }[kind]

    stream = student.stream(as_they_come(), text="cat", processor=video_processor, delay=delay)

    for index, (result, expected) in enumerate(zip(stream, frames, strict=True)):
        assert result.frame_index == index
        assert result.pixels.dtype == np.uint8
        assert np.array_equal(result.pixels, expected)


def test_half_precision_follows_concepts_too(video_processor, tmp_path):
    model = tiny_video("dense", hotstart_delay=4).to(torch.bfloat16)
    options = {"text": PHRASES, "processor": video_processor}
    expected = list(map(as_plain, model.stream(pictures(8), **options)))
    session = video_processor.init_video_session(dtype=torch.bfloat16)
    stream = model.stream(pictures(8), session=session, **options)

    before = [as_plain(next(stream)) for _ in range(3)]
    session.save(tmp_path / "session")
    session = EfficientSam3ConceptSession.load(tmp_path / "session")
    after = model.stream(pictures(8)[session.num_frames :], session=session, **options)

    assert before + list(map(as_plain, after)) == expected
    assert sum(len(objects) for _, objects, *_ in expected) > 0
    assert session.tracker.dtype == torch.bfloat16


def test_autocast_finds_and_follows_concepts(student, video_processor):
    with torch.autocast("cpu", torch.bfloat16):
        results = list(student.stream(pictures(3), text=PHRASES, processor=video_processor))

    assert all(result.object_ids for result in results)


def test_a_session_for_another_device_is_an_error_that_says_so(student, video_processor, tmp_path):
    session = video_processor.init_video_session(inference_device="meta")
    tracker = tiny.tiny_tracker_video("perceiver")

    for model, of_model in ((student, session), (tracker, session.tracker)):
        with pytest.raises(ValueError, match=r"on meta, and this one is on cpu: .*model.device"):
            model(of_model, frame_idx=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_stream_goes_on_on_a_gpu(dtype: torch.dtype, video_processor, tmp_path):
    model = tiny_video("dense", hotstart_delay=4).to("cuda", dtype)
    session = video_processor.init_video_session(inference_device="cuda", dtype=dtype)
    options = {"text": PHRASES, "processor": video_processor}
    stream = model.stream(pictures(8), session=session, **options)
    before = [next(stream).frame_index for _ in range(3)]
    session.save(tmp_path / "session")

    elsewhere = EfficientSam3ConceptSession.load(tmp_path / "session")
    with pytest.raises(ValueError, match="The session is for a model on cpu"):
        next(model.stream(pictures(1), session=elsewhere, **options))
    session = EfficientSam3ConceptSession.load(tmp_path / "session", inference_device="cuda")
    rest = list(model.stream(pictures(8)[session.num_frames :], session=session, **options))

    assert before + [result.frame_index for result in rest] == list(range(8))
    assert any(result.object_ids for result in rest)


def test_frames_keep_their_numbers_when_some_are_skipped(student, video_processor):
    frames = open_video(pictures(9), start=1, step=3)

    results = list(student.stream(frames, text="cat", processor=video_processor))

    assert [result.frame_index for result in results] == [1, 4, 7]


EVERY_SECOND = {
    "detect_every_nth_frame": 2,
    "hotstart_delay": 4,
    "hotstart_unmatch_thresh": 2,
    "hotstart_dup_thresh": 2,
}


@pytest.mark.parametrize("delay", [0, 4])
def test_a_killed_stream_goes_on_from_its_saved_session(delay: int, video_processor, tmp_path):
    model = tiny_video("perceiver", **EVERY_SECOND)
    frames = [Frame(3 * index, None, pixels) for index, pixels in enumerate(pictures(14))]
    arguments = {
        "text": "cat",
        "input_boxes": [[9, 6, 45, 30]],
        "processor": video_processor,
        "delay": delay,
    }
    expected = list(map(as_plain, model.stream(frames, **arguments)))

    session = video_processor.init_video_session()
    stream = model.stream(iter(frames), session=session, **arguments)
    before = [as_plain(next(stream)) for _ in range(6)]
    session.save(tmp_path / "session.safetensors")
    del session, stream
    session = EfficientSam3ConceptSession.load(tmp_path / "session.safetensors")
    rest = frames[session.num_frames :]
    after = list(map(as_plain, model.stream(rest, session=session, **arguments)))  # all said again

    assert before + after == expected
    assert len(session.prompts) == 1
    assert all(result[-1] is not None for result in after)  # with their pictures


def test_a_stream_killed_at_its_end_still_gives_what_was_waiting(video_processor, tmp_path):
    model = tiny_video("perceiver", hotstart_delay=4)
    session = video_processor.init_video_session()
    stream = model.stream(pictures(6), text="cat", processor=video_processor, session=session)
    results = list(itertools.islice(stream, 4))
    assert session.num_frames == 6
    session.save(tmp_path / "session")

    loaded = EfficientSam3ConceptSession.load(tmp_path / "session")
    rest = list(model.stream([], session=loaded, processor=video_processor))

    assert [result.frame_index for result in [*results, *rest]] == list(range(6))
    assert [as_plain(result) for result in rest] == [as_plain(result) for result in stream]


@pytest.mark.parametrize("span", [{}, {"start_frame_idx": 9, "reverse": True}])
def test_a_killed_run_through_a_whole_video_goes_on_from_its_saved_session(
    span: dict, video_processor, tmp_path
):
    model = tiny_video("dense", **EVERY_SECOND)
    frames = pictures(11)

    def start() -> EfficientSam3ConceptSession:
        session = video_processor.init_video_session(frames)
        return video_processor.add_text_prompt(session, PHRASES)

    def results(session, run) -> list[tuple]:
        return [as_plain(video_processor.post_process_frame(session, output)) for output in run]

    whole = start()
    run = model.propagate_in_video_iterator(whole, **span)
    expected = results(whole, run)
    session = start()
    run = model.propagate_in_video_iterator(session, **span)
    before = results(session, itertools.islice(run, 3))
    session.save(tmp_path / "session.safetensors")

    video = video_processor.frames(frames)
    loaded = EfficientSam3ConceptSession.load(tmp_path / "session.safetensors", video)
    run = model.propagate_in_video_iterator(loaded, resume=True)
    after = results(loaded, run)

    assert len(loaded.pending) == 0 < len(session.pending)
    assert before + after == expected
    assert any(objects for _, objects, *_ in after)
    # What is done has nothing left, and may be started again.
    assert list(model.propagate_in_video_iterator(loaded, resume=True)) == []
    loaded.save(tmp_path / "session.safetensors")
    loaded = EfficientSam3ConceptSession.load(tmp_path / "session.safetensors", video)
    assert list(model.propagate_in_video_iterator(loaded, resume=True)) == []
    assert len(list(model.propagate_in_video_iterator(loaded, 5))) == 6


def test_what_has_not_been_started_cannot_be_resumed(student, video_processor):
    session = video_processor.init_video_session(pictures(2))
    with pytest.raises(ValueError, match="nothing to resume: this session has not been started"):
        next(student.propagate_in_video_iterator(session, resume=True))
    with pytest.raises(ValueError, match="A stream has no end"):
        next(student.propagate_in_video_iterator(video_processor.init_video_session()))


def test_a_session_of_another_kind_is_refused(video_processor, tmp_path):
    session = video_processor.init_video_session()
    session.tracker.save(tmp_path / "objects")
    session.save(tmp_path / "concepts")

    with pytest.raises(ValueError, match="is a session of objects"):
        EfficientSam3ConceptSession.load(tmp_path / "objects")
    with pytest.raises(ValueError, match="a stream: give no video"):
        EfficientSam3ConceptSession.load(tmp_path / "concepts", pictures(2))


def test_objects_are_looked_for_in_every_nth_frame_only(video_processor, monkeypatch):
    model = tiny_video("perceiver", hotstart_delay=0, detect_every_nth_frame=3)
    looked = []
    original = model.detect
    monkeypatch.setattr(
        model,
        "detect",
        lambda session, vision, frame: looked.append(frame) or original(session, vision, frame),
    )

    session = video_processor.init_video_session(pictures(8))
    video_processor.add_text_prompt(session, PHRASES)

    outputs = [model(session, frame_idx=index) for index in range(8)]

    assert looked == [0, 3, 6]
    first_frames = {frame for output in outputs for frame in output.obj_id_to_first_frame.values()}
    assert first_frames <= {0, 3, 6}
    assert outputs[1].obj_id_to_mask  # tracked in between


def test_several_phrases_run_each_encoder_once(student, video_processor):
    calls = {"vision": 0, "text": 0, "detr": 0}
    detector = student.detector_model
    hooks = [
        module.register_forward_hook(lambda *args, kind=kind: calls.update({kind: calls[kind] + 1}))
        for kind, module in (
            ("vision", detector.vision_encoder),
            ("text", detector.text_encoder),
            ("detr", detector.detr_encoder),
        )
    ]

    list(student.stream(pictures(5), text=[*PHRASES, "a bird"], processor=video_processor))

    for hook in hooks:
        hook.remove()
    assert calls == {"vision": 5, "text": 3, "detr": 5}  # phrases are encoded once a video


def test_an_optional_package_changes_nothing(student, video_processor, monkeypatch):
    options = {"text": PHRASES, "processor": video_processor}
    expected = list(map(as_plain, student.stream(pictures(3), **options)))

    class Kernels:
        def __getattr__(self, name: str):
            raise AssertionError(f"{name} of an optional package was asked for")

    monkeypatch.setattr(stock_code, "cv_utils_kernel", Kernels())
    monkeypatch.setitem(sys.modules, "kernels", Kernels())

    assert list(map(as_plain, student.stream(pictures(3), **options))) == expected


def test_exemplars_of_one_frame_are_followed_through_the_others(student, video_processor):
    box = [[9, 6, 45, 30]]

    alone = list(student.stream(pictures(4), input_boxes=box, processor=video_processor))
    both = list(
        student.stream(
            pictures(4),
            text="cat",
            input_boxes=box,
            input_boxes_labels=[0],
            processor=video_processor,
        )
    )

    assert {label for result in alone for label in result.labels} == {"exemplars"}
    assert {label for result in both for label in result.labels} == {"cat"}
    session = video_processor.init_video_session()
    with pytest.raises(ValueError, match="size of the frames is not known"):
        video_processor.add_exemplars(session, 0, box)


def test_what_is_found_depends_on_boxes_and_labels(student, video_processor):
    def found(box: list[int], label: int) -> Tensor:
        session = video_processor.init_video_session(pictures(1))
        video_processor.add_exemplars(session, 0, [box], [label], "cat")
        vision, _ = student.encode_frame(session.tracker.get_frame(0)[None])
        return student.detect(session, vision, 0).scores

    expected = found([9, 6, 45, 30], 1)

    assert torch.equal(found([9, 6, 45, 30], 1), expected)
    for other in (found([9, 6, 45, 30], 0), found([30, 20, 88, 58], 1)):
        assert other.shape != expected.shape or not torch.allclose(other, expected, atol=1e-4)


def test_exemplar_tokens_are_those_of_their_frame(student, video_processor):
    frames = pictures(6)
    session = video_processor.init_video_session(frames)
    video_processor.add_exemplars(session, 2, [[9, 6, 45, 30]])

    outputs = [student(session, frame_idx=index) for index in range(3)]

    assert all(output.object_ids for output in outputs)  # of a whole video, every frame is at hand
    tokens = session.prompts[0].exemplar_tokens
    assert tokens.shape == (1, 2, tiny.WIDTH)
    again = video_processor.init_video_session(frames[2:])
    video_processor.add_exemplars(again, 0, [[9, 6, 45, 30]])
    student(again, frame_idx=0)
    torch.testing.assert_close(again.prompts[0].exemplar_tokens, tokens)


def test_exemplars_of_a_frame_that_a_stream_has_just_seen_are_used(video_processor, tmp_path):
    finds_all = {"score_threshold_detection": 0.01, "new_det_thresh": 0.01}
    student = tiny_video("perceiver", hotstart_delay=0, **finds_all)
    frames, box = pictures(6), [[9, 6, 45, 30]]
    expected = video_processor.init_video_session(frames)
    video_processor.add_exemplars(expected, 2, box)
    student(expected, frame_idx=3)
    session = video_processor.init_video_session()

    results = {}
    for result in student.stream(frames, text="cat", processor=video_processor, session=session):
        results[result.frame_index] = result
        if result.frame_index == 2:
            video_processor.add_exemplars(session, None, box)
            video_processor.add_exemplars(session, 2, box)  # once more changes nothing
            session.save(tmp_path / "session")
        if result.frame_index == 4:
            with pytest.raises(ValueError, match="Frame 2 of the stream has passed"):
                video_processor.add_exemplars(session, 2, [[0, 0, 20, 20]])

    assert [prompt.label for prompt in session.prompts] == ["cat", "exemplars"]
    assert "exemplars" in results[3].labels
    assert not {"exemplars"} & {label for i in range(3) for label in results[i].labels}
    tokens = expected.prompts[0].exemplar_tokens
    torch.testing.assert_close(session.prompts[1].exemplar_tokens, tokens)
    loaded = EfficientSam3ConceptSession.load(tmp_path / "session")
    list(student.stream(frames[3:], processor=video_processor, session=loaded))
    torch.testing.assert_close(loaded.prompts[1].exemplar_tokens, tokens)


def test_exemplars_of_a_frame_to_come_wait_for_it(student, video_processor):
    session = video_processor.init_video_session()
    video_processor.add_exemplars(session, 2, [[9, 6, 45, 30]], original_size=(60, 90))

    results = list(student.stream(pictures(4), processor=video_processor, session=session))

    assert [bool(result.object_ids) for result in results] == [False, False, True, True]


def test_exemplars_name_frames_as_the_session_counts(student, video_processor):
    session, box = video_processor.init_video_session(), [[9, 6, 45, 30]]
    with pytest.raises(ValueError, match="the newest frame of a stream: there is none"):
        video_processor.add_exemplars(session, None, box, original_size=(60, 90))
    stream = student.stream(
        open_video(pictures(9), start=3, step=2),
        text="cat",
        processor=video_processor,
        session=session,
    )

    result = next(stream)

    assert result.frame_index == 3
    with pytest.raises(ValueError, match="0 is its newest, which has the number 3 where it came"):
        video_processor.add_exemplars(session, result.frame_index, box)
    assert video_processor.add_exemplars(session, None, box).prompts[-1].frame_idx == 0


def test_a_phrase_may_come_in_mid_video(student, video_processor):
    frames = pictures(8)
    session = video_processor.init_video_session(frames)
    video_processor.add_text_prompt(session, "cat")
    for index in range(4):
        student(session, frame_idx=index)
    known = set(session.obj_ids)

    video_processor.add_text_prompt(session, ["dog", "cat"])
    outputs = [student(session, frame_idx=index) for index in range(4, 8)]

    assert [prompt.label for prompt in session.prompts] == ["cat", "dog"]
    prompts = outputs[-1].obj_id_to_prompt_id
    assert {prompts[i] for i in known if i in prompts} == {0}
    assert 1 in {prompt for output in outputs for prompt in output.obj_id_to_prompt_id.values()}


def test_an_object_may_be_removed_by_hand(student, video_processor):
    session = video_processor.init_video_session(pictures(4))
    video_processor.add_text_prompt(session, "cat")
    first = student(session, frame_idx=0).object_ids[0]

    session.remove_object(first, strict=True)

    assert first not in student(session, frame_idx=1).object_ids
    with pytest.raises(ValueError, match="no object 99"):
        session.remove_object(99, strict=True)


def test_identities_are_never_given_twice(student, video_processor):
    session = video_processor.init_video_session(pictures(12))
    video_processor.add_text_prompt(session, PHRASES)
    births: dict[int, int] = {}

    for index in range(12):
        for obj_id, first in student(session, frame_idx=index).obj_id_to_first_frame.items():
            assert births.setdefault(obj_id, first) == first
        if session.obj_ids:
            session.remove_object(session.obj_ids[-1])

    in_order = [births[obj_id] for obj_id in sorted(births)]
    assert in_order == sorted(in_order)
    assert len(set(in_order)) > 3


def test_lost_objects_are_forgotten(video_processor):
    model = tiny_video("perceiver", hotstart_delay=0, lost_after=2, new_det_thresh=0.99)
    session = video_processor.init_video_session(pictures(12))
    video_processor.add_text_prompt(session, "cat")
    model(session, frame_idx=0)
    for masklet in list(session.masklets.values())[1:]:
        session.remove_object(masklet.object_id)
    lost = session.obj_ids[0]
    with torch.no_grad():  # from here on the tracker sees nothing
        model.tracker_model.mask_decoder.pred_obj_score_head.proj_out.bias.sub_(100)

    alive = [lost in model(session, frame_idx=index).object_ids for index in range(1, 5)]

    assert alive == [True, True, False, False]
    assert lost not in session.tracker.objects


def test_more_objects_than_there_is_room_for_are_left_out(video_processor):
    counts = {}
    for room in (9, 1):
        model = tiny_video("perceiver", hotstart_delay=0, max_num_objects=room)
        session = video_processor.init_video_session(pictures(4))
        video_processor.add_text_prompt(session, PHRASES)

        outputs = [model(session, frame_idx=index) for index in range(4)]

        counts[room] = [len(output.object_ids) for output in outputs]
    assert min(counts[9]) > 1
    assert counts[1] == [1] * 4
    with torch.inference_mode():
        vision, _ = model.encode_frame(session.tracker.get_frame(0)[None])
        surest = float(model.detect(session, vision, 0).scores.max())
    assert session.masklets[0].score == pytest.approx(surest)


def small_video(**fields: Any) -> EfficientSam3VideoModel:
    """A model of 56 pixels, which is faster than a student of this size."""
    vision = copy.deepcopy(TINY_VIT)
    vision["backbone_config"]["image_size"] = 56
    return tiny_video("perceiver", vision, **fields)


@pytest.fixture(scope="module")
def small_processor(processor) -> EfficientSam3VideoProcessor:
    image_processor = EfficientSam3ImageProcessor(size={"height": 56, "width": 56})
    return EfficientSam3VideoProcessor(image_processor, processor.tokenizer)


@pytest.mark.slow
def test_the_state_does_not_grow(small_processor):
    model = small_video(  # finds more objects than it may follow, and loses none of these
        max_num_objects=3,
        lost_after=None,
        hotstart_delay=0,
        recondition_every_nth_frame=0,
        score_threshold_detection=0.02,
        det_nms_thresh=0.0,
    )
    frames = itertools.islice(itertools.cycle(pictures(10)), 2000)
    session = small_processor.init_video_session()
    resident, sizes, counts = [], set(), set()

    stream = model.stream(frames, text="cat", processor=small_processor, session=session, delay=4)
    for index, _ in enumerate(stream):
        if index >= 300 and index % 50 == 0:
            gc.collect()
            resident.append((index, resident_bytes()))
            sizes.add(session.num_bytes)
            counts.add((len(session.obj_ids), len(session.pending)))

    slope = np.polyfit(*zip(*resident, strict=True), 1)[0]
    assert slope < 1000
    assert counts == {(3, 3)}  # objects, and results that wait
    assert len(sizes) == 1


def test_what_comes_and_goes_leaves_nothing_behind(small_processor):
    doubtful = {"lost_after": 3, "trk_assoc_iou_thresh": 0.9, "det_nms_thresh": 0.0}
    model = small_video(max_num_objects=3, **doubtful)
    frames = itertools.islice(itertools.cycle(pictures(10)), 60)
    session = small_processor.init_video_session()

    for _ in model.stream(frames, text=PHRASES, processor=small_processor, session=session):
        assert session.tracker.objects.keys() == session.masklets.keys()
        assert len(session.masklets) <= 3
        assert all(abs(frame - session.last_look) <= 4 for frame in session.removed.values())
        assert len(session.pending) <= 4
        waiting = sum(output.pixels.nbytes for output in session.pending)
        prompts = sum(prompt.text_embeds.nbytes for prompt in session.prompts)
        assert session.num_bytes > session.tracker.num_bytes + waiting + prompts
        for masklet in session.masklets.values():
            assert len(masklet.duplicates) <= 2 * 4  # rivals within its first frames

    assert session.max_obj_id > 12  # many have come and gone


@pytest.mark.parametrize("trunk", tiny.TRUNKS)
@pytest.mark.parametrize("neck", ["sam3", "lateral"])
def test_every_trunk_and_neck_tracks_concepts(neck: str, trunk: str, processor):
    model = tiny_video("perceiver", tiny.tiny_vision(neck, trunk), hotstart_delay=0)
    size = {"height": model.config.image_size, "width": model.config.image_size}
    image_processor = EfficientSam3ImageProcessor(size=size)
    video_processor = EfficientSam3VideoProcessor(image_processor, processor.tokenizer)

    results = list(model.stream(pictures(3), text=PHRASES, processor=video_processor))

    assert sum(len(result.object_ids) for result in results) > 0


def test_saved_and_loaded_it_tracks_the_same(student, video_processor, tmp_path):
    student.save_pretrained(tmp_path)
    video_processor.save_pretrained(tmp_path)

    loaded = AutoModel.from_pretrained(tmp_path)

    assert isinstance(loaded, EfficientSam3VideoModel)
    state, reloaded = student.state_dict(), loaded.state_dict()
    assert state.keys() == reloaded.keys()
    assert all(torch.equal(state[name], reloaded[name]) for name in state)
    loaded = copy.deepcopy(loaded).eval()  # a mapped file is not aligned as torch likes it
    expected = student.stream(pictures(4), text=PHRASES, processor=video_processor)
    assert list(map(as_plain, loaded_stream(loaded))) == list(map(as_plain, expected))


def loaded_stream(model: EfficientSam3VideoModel) -> Iterator[FrameMasklets]:
    return model.stream(pictures(4), text=PHRASES)  # with the processor of its folder


def test_one_folder_serves_concepts_in_video_too(student, video_processor, tmp_path):
    model, tracker = tiny.tiny_model(), tiny.tiny_tracker_video("perceiver")
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    zoo.save(model.config, tmp_path, model, tracker)

    loaded = EfficientSam3VideoModel.from_pretrained(
        tmp_path, **{**LOW_THRESHOLDS, "hotstart_delay": 0}
    ).eval()

    assert loaded.config.hotstart_delay == 0
    state, expected = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(state[f"detector_model.{n}"], expected[n]) for n in expected)
    for name, tensor in tracker.state_dict().items():
        if name.startswith("vision_encoder.neck."):
            name = name.replace("vision_encoder.neck.", "tracker_neck.")
        elif not name.startswith("vision_encoder."):
            name = f"tracker_model.{name}"
        else:
            continue
        assert torch.equal(state[name], tensor), name
    results = list(loaded.stream(pictures(3), text=PHRASES))  # with the processor of the folder
    assert any(result.object_ids for result in results)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: m.stream([], processor=p), "nothing to look for: give text or input_boxes"),
        (
            lambda m, p: m.stream([], text=["a", "b"], input_boxes=[[0, 0, 5, 5]], processor=p),
            "Exemplars go with one phrase or none",
        ),
        (lambda m, p: m.stream([], text="cat"), "not loaded from a folder: pass processor"),
        (
            lambda m, p: [m(p.init_video_session(pictures(1)), frame_idx=0)],
            "add a phrase or exemplars first",
        ),
        (lambda m, p: m.stream(pictures(1), text=" ", processor=p), "phrase is empty"),
        (lambda m, p: m.stream(iter([]), text="cat", processor=p), "There are no frames to follow"),
        (
            lambda m, p: m.stream([*pictures(1), *pictures(1, (40, 40))], text="a", processor=p),
            "40 x 40 pixels in a video of 60 x 90",
        ),
    ],
)
def test_what_cannot_be_tracked_is_an_error_that_says_why(video_processor, call, message: str):
    with pytest.raises(ValueError, match=message):
        list(call(tiny_video("perceiver"), video_processor))


def test_settings_that_contradict_one_another_are_errors():
    with pytest.raises(StrictDataclassError, match="never be reached within hotstart_delay=3"):
        EfficientSam3VideoConfig(hotstart_delay=3)
    with pytest.raises(StrictDataclassError, match="detect_every_nth_frame is 1 or more"):
        EfficientSam3VideoConfig(detect_every_nth_frame=0)
    with pytest.raises(StrictDataclassError, match="detections speak for 0 frames by then"):
        EfficientSam3VideoConfig(detect_every_nth_frame=15)
    with pytest.raises(StrictDataclassError, match="unmatch_thresh=15 can never be reached"):
        EfficientSam3VideoConfig(hotstart_unmatch_thresh=15)
    EfficientSam3VideoConfig(detect_every_nth_frame=14)
    EfficientSam3VideoConfig(detect_every_nth_frame=15, hotstart_delay=0)


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
