"""The tracker in video: against transformers, bookkeeping of objects, bounds, saving, loading."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import (
    TINY_VIT,
    TRUNKS,
    moving_squares,
    see_objects,
    stir,
    tiny_model,
    tiny_tracker,
    tiny_tracker_video,
    tiny_video_config,
    tiny_vision,
)
from torch import Tensor
from transformers import (
    AutoModel,
    AutoProcessor,
    Sam2VideoVideoProcessor,
    Sam3ImageProcessor,
    Sam3TrackerVideoConfig,
    Sam3TrackerVideoInferenceSession,
    Sam3TrackerVideoModel,
    Sam3TrackerVideoProcessor,
)

from efficientsam3_hf import (
    EfficientSam3ImageProcessor,
    EfficientSam3TrackerConfig,
    EfficientSam3TrackerModel,
    EfficientSam3TrackerVideoConfig,
    EfficientSam3TrackerVideoModel,
    EfficientSam3TrackerVideoProcessor,
    EfficientSam3VideoSession,
    zoo,
)
from efficientsam3_hf.models.modeling_efficientsam3_tracker_video import tracker_video_config

SIZE = 112
CLIP, MASKS = moving_squares(40)
# Object -> what is said of it: points and labels (a box is two points), or a mask.
POINT = (torch.tensor([[30.0, 30.0]]), torch.tensor([1]))
POINTS = (torch.tensor([[70.0, 60.0], [20.0, 90.0], [80.0, 55.0]]), torch.tensor([1, 0, 1]))
BOX = (torch.tensor([[20.0, 15.0], [60.0, 50.0]]), torch.tensor([2, 3]))


@pytest.fixture(scope="module")
def dense() -> EfficientSam3TrackerVideoModel:
    return tiny_tracker_video("dense")


@pytest.fixture(scope="module")
def perceiver() -> EfficientSam3TrackerVideoModel:
    return tiny_tracker_video("perceiver")


@pytest.fixture(scope="module", params=["dense", "perceiver"])
def model(request) -> EfficientSam3TrackerVideoModel:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def stock() -> Sam3TrackerVideoModel:
    """transformers' tracker, whose width must be a multiple of 64 and more."""
    width = 128
    vision = {**copy.deepcopy(TINY_VIT), "fpn_hidden_size": width}
    config = Sam3TrackerVideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": width, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
        memory_attention_hidden_size=width,
        memory_attention_num_layers=2,
        memory_attention_feed_forward_hidden_size=64,
        memory_encoder_hidden_size=width,
        mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=64,
        image_size=SIZE,
    )
    torch.manual_seed(0)
    return see_objects(stir(Sam3TrackerVideoModel(config)))


@pytest.fixture(scope="module")
def same(stock) -> EfficientSam3TrackerVideoModel:
    """Ours with the weights of transformers'."""
    parts = stock.config.to_dict()
    for name in ("model_type", "image_size", "memory_attention_rope_feat_sizes"):
        parts.pop(name, None)
    for name in ("prompt_encoder_config", "mask_decoder_config"):
        parts[name].pop("model_type")
    model = EfficientSam3TrackerVideoModel(EfficientSam3TrackerVideoConfig(**parts))
    model.load_state_dict(stock.state_dict())
    return model.eval()


def session(video: Tensor | None = None, **fields: Any) -> EfficientSam3VideoSession:
    return EfficientSam3VideoSession(video, SIZE, SIZE, **fields)


class Pair:
    """transformers' tracker and ours side by side, asked the same."""

    def __init__(self, stock, same, video: Tensor | None, gone: bool = False, **fields: Any):
        self.gone = gone
        self.models = stock, same
        self.sessions = (
            Sam3TrackerVideoInferenceSession(video, SIZE, SIZE, dtype=torch.float32),
            session(video, **fields),
        )

    def prompt(self, obj_id: int, frame_idx: int, prompt) -> None:
        theirs, ours = self.sessions
        index = theirs.obj_id_to_idx(obj_id)
        if isinstance(prompt, tuple):
            points, labels = prompt
            inputs = {"point_coords": points[None, None], "point_labels": labels[None, None]}
            theirs.add_point_inputs(index, frame_idx, inputs)
            ours.add_points(obj_id, frame_idx, points, labels)
        else:
            theirs.add_mask_inputs(index, frame_idx, prompt[None, None].float())
            ours.add_mask(obj_id, frame_idx, prompt)
        theirs.obj_with_new_inputs.append(obj_id)

    def go(self, frame_idx: int, atol: float = 1e-3, **fields: Any) -> None:
        theirs, ours = (
            model(session, frame_idx=frame_idx, **fields)
            for model, session in zip(self.models, self.sessions, strict=True)
        )
        assert ours.object_ids == theirs.object_ids
        assert ours.frame_idx == theirs.frame_idx
        torch.testing.assert_close(ours.pred_masks, theirs.pred_masks, atol=atol, rtol=1e-3)
        torch.testing.assert_close(
            ours.object_score_logits, theirs.object_score_logits, atol=atol, rtol=1e-3
        )
        # Masks of absent objects would be equal by chance.
        assert self.gone or (theirs.pred_masks > -1000).all()


def test_points_boxes_and_masks_are_tracked_as_by_transformers(stock, same):
    pair = Pair(stock, same, CLIP[:20])
    pair.prompt(3, 0, POINT)
    pair.prompt(1, 0, BOX)
    pair.prompt(7, 0, MASKS[0, 0])
    pair.prompt(8, 0, POINTS)

    # transformers rounds the masks of all objects in a frame where any has a prompt; so do we here,
    # since all of them have.
    for frame_idx in range(20):
        pair.go(frame_idx)


def test_tracking_forward_and_then_backward_equals_transformers(stock, same):
    pair = Pair(stock, same, CLIP[:34])
    pair.prompt(1, 16, POINT)
    pair.prompt(2, 16, BOX)

    for frame_idx in range(16, 34):
        pair.go(frame_idx)
    for frame_idx in range(16, -1, -1):
        pair.go(frame_idx, reverse=True)


def test_objects_that_are_gone_are_remembered_as_by_transformers(stock, same):
    absent = (see_objects(copy.deepcopy(model), shift=-6.0) for model in (stock, same))
    pair = Pair(*absent, CLIP[:12], gone=True)
    pair.prompt(1, 0, MASKS[0, 0])
    pair.prompt(2, 0, torch.zeros_like(MASKS[0, 0]))
    pair.prompt(3, 0, POINT)

    for frame_idx in range(12):
        pair.go(frame_idx)
    last = [memory.object_score_logits for memory in pair.sessions[1].objects[1].memories.values()]
    assert (torch.stack(last[1:]) < 0).all()


def test_an_object_followed_forward_before_its_prompt_is_as_in_transformers(stock, same):
    pair = Pair(stock, same, CLIP[:12])
    pair.prompt(1, 0, POINT)
    pair.go(0)
    pair.prompt(2, 8, BOX)
    pair.go(8)

    for frame_idx in range(1, 12):  # until frame 8, object 2 knows of its prompt, but no pointer
        pair.go(frame_idx)


def test_a_prompt_on_the_last_frame_is_tracked_backward_as_by_transformers(stock, same):
    pair = Pair(stock, same, CLIP[:12])
    pair.prompt(1, 11, MASKS[11, 0])

    for frame_idx in range(11, -1, -1):
        pair.go(frame_idx, reverse=True)


def test_many_frames_with_prompts_are_chosen_from_as_by_transformers(stock, same):
    pair = Pair(stock, same, CLIP)
    prompted = (0, 4, 8, 12, 20, 30)  # more than the model sees at once
    for frame_idx in prompted:
        pair.prompt(1, frame_idx, POINT if frame_idx % 8 else BOX)
        pair.go(frame_idx)

    for frame_idx in (*range(14, 24), *range(24, 2, -1)):
        pair.go(frame_idx, reverse=False)


def test_frames_with_prompts_beyond_the_bound_are_forgotten_farthest_first(dense):
    video = session(CLIP, max_conditioning_frames=3)
    for frame_idx in (0, 10, 20, 30):
        video.add_points(1, frame_idx, *POINT)
        dense(video, frame_idx=frame_idx)

    assert sorted(video.objects[1].conditioning()) == [10, 20, 30]
    assert 0 not in video.objects[1].prompts


def test_a_stream_equals_that_of_transformers(stock, same):
    theirs = Sam3TrackerVideoInferenceSession(
        video_height=SIZE, video_width=SIZE, dtype=torch.float32
    )
    ours = session()
    theirs.add_point_inputs(
        theirs.obj_id_to_idx(5),
        0,
        {"point_coords": BOX[0][None, None], "point_labels": BOX[1][None, None]},
    )
    theirs.obj_with_new_inputs = [5]
    ours.add_points(5, 0, *BOX)

    for frame in CLIP[:20]:
        expected, outputs = stock(theirs, frame=frame), same(ours, frame=frame)
        assert outputs.frame_idx == expected.frame_idx
        torch.testing.assert_close(outputs.pred_masks, expected.pred_masks, atol=1e-3, rtol=1e-3)


def test_a_correction_equals_that_of_transformers_in_its_own_frame(stock, same):
    pair = Pair(stock, same, CLIP[:16])
    pair.prompt(1, 0, POINT)
    for frame_idx in range(16):
        pair.go(frame_idx)

    pair.prompt(1, 15, POINTS)

    pair.go(15)


def test_a_correction_is_remembered_as_a_prompt_is(stock, same):
    theirs = Pair(stock, same, CLIP[:20])
    theirs.prompt(1, 0, POINT)
    for frame_idx in range(11):
        theirs.go(frame_idx)
    theirs.prompt(1, 10, POINTS)
    theirs.go(10)
    reference, ours = theirs.sessions

    corrected = same(ours, frame_idx=10).pred_masks
    again = stock(reference, frame_idx=10).pred_masks

    # transformers tracks the frame anew when it is visited again, and loses the correction.
    assert ours.objects[1].memories[10].is_conditioning
    torch.testing.assert_close(corrected[0], ours.objects[1].memories[10].pred_masks)
    assert not torch.allclose(again, corrected, atol=0.1)


def outputs_of(
    results: Iterator | list,
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Masks and scores by frame and object, each of which comes once."""
    found = {}
    for result in results:
        for row, obj_id in enumerate(result.object_ids):
            assert (result.frame_idx, obj_id) not in found
            found[result.frame_idx, obj_id] = (
                result.pred_masks[row],
                result.object_score_logits[row],
            )
    return found


def assert_same(found: dict, expected: dict, atol: float = 1e-4) -> None:
    for key, (masks, scores) in expected.items():
        torch.testing.assert_close(found[key][0], masks, atol=atol, rtol=1e-4)
        torch.testing.assert_close(found[key][1], scores, atol=atol, rtol=1e-4)


def tell_two_objects(video: EfficientSam3VideoSession, obj_ids=(1, 2, 3, 4)) -> None:
    """Prompts of each kind, on different frames, of objects that come at different times."""
    prompts = {1: (0, POINT), 2: (0, BOX), 3: (5, MASKS[5, 1]), 4: (9, POINTS)}
    for obj_id in obj_ids:
        frame_idx, prompt = prompts[obj_id]
        if isinstance(prompt, tuple):
            video.add_points(obj_id, frame_idx, *prompt)
        else:
            video.add_mask(obj_id, frame_idx, prompt)


def test_objects_of_different_age_in_one_pass_equal_one_by_one(model):
    together = session(CLIP[:16])
    tell_two_objects(together)

    found = outputs_of(model.propagate_in_video_iterator(together))

    for obj_id in (1, 2, 3, 4):
        alone = session(CLIP[:16])
        tell_two_objects(alone, [obj_id])
        expected = outputs_of(model.propagate_in_video_iterator(alone))
        assert {key for key in found if key[1] == obj_id} == expected.keys()
        assert_same(found, expected, atol=1e-3)


def test_the_memory_path_takes_all_objects_in_one_pass(model):
    video = session(CLIP[:12])
    tell_two_objects(video)
    for frame_idx in range(11):
        model(video, frame_idx=frame_idx)
    rows = {}
    parts = {"attention": model.memory_attention, "encoder": model.memory_encoder}
    parts["decoder"] = model.mask_decoder
    if model.spatial_perceiver is not None:
        parts["perceiver"] = model.spatial_perceiver

    def counted(name: str):
        return lambda module, args, output: rows.setdefault(name, []).append(
            len(output[0] if isinstance(output, tuple) else output)
        )

    hooks = [part.register_forward_hook(counted(name)) for name, part in parts.items()]
    model(video, frame_idx=11)
    for hook in hooks:
        hook.remove()

    assert rows == {name: [4] for name in parts}


def test_objects_come_go_and_are_corrected_while_a_stream_runs(model):
    stream = session()
    stream.add_points(1, 0, *POINT)
    seen = []
    for frame_idx, frame in enumerate(CLIP):
        if frame_idx == 10:
            stream.add_mask(2, 10, MASKS[10, 1])
        if frame_idx == 20:
            stream.remove_object(1)
        output = model(stream, frame=frame)
        assert output.frame_idx == frame_idx
        if frame_idx == 30:
            before = output.pred_masks
            stream.add_points(2, 30, *POINTS)
            output = model(stream, frame_idx=30)
            assert not torch.allclose(output.pred_masks, before, atol=0.01)
        seen.append(output.object_ids)
        if frame_idx == 10:  # a mask that was given is the answer
            shown = output.pred_masks[output.object_ids.index(2), 0] > 0
            assert abs(shown.float().mean() - MASKS[10, 1].float().mean()) < 0.01

    assert seen == [[1]] * 10 + [[1, 2]] * 10 + [[2]] * 20
    tracked = stream.objects[2]
    assert sorted(tracked.conditioning()) == [10, 30]
    assert tracked.memories[10].is_initial
    assert not tracked.memories[30].is_initial
    assert tracked.first_frame == 10
    assert sorted(tracked.memories)[-1] == 39


def test_a_removed_object_may_come_back_under_its_old_name(dense):
    stream = session()
    stream.add_points(1, 0, *POINT)
    for frame in CLIP[:5]:
        dense(stream, frame=frame)
    stream.remove_object(1)

    empty = dense(stream, frame=CLIP[5])
    stream.add_points(1, 6, *BOX)
    output = dense(stream, frame=CLIP[6])

    assert empty.object_ids == []
    assert empty.pred_masks.shape == (0, 1, 32, 32)
    assert output.object_ids == [1]
    assert sorted(stream.objects[1].memories) == [6]
    fresh = session()
    fresh.add_points(1, 0, *BOX)
    torch.testing.assert_close(output.pred_masks, dense(fresh, frame=CLIP[6]).pred_masks)


def test_an_object_is_not_tracked_before_its_first_prompt(dense):
    video = session(CLIP[:10])
    video.add_points(1, 2, *POINT)
    video.add_points(2, 6, *BOX)

    seen = {
        result.frame_idx: result.object_ids for result in dense.propagate_in_video_iterator(video)
    }

    assert seen == {2: [1], 3: [1], 4: [1], 5: [1], 6: [1, 2], 7: [1, 2], 8: [1, 2], 9: [1, 2]}
    assert list(video.objects[2].conditioning()) == [6]


def test_a_prompt_on_the_last_frame_reaches_all_frames_backward(model):
    video = session(CLIP[:12])
    video.add_mask(1, 11, MASKS[11, 0])

    results = list(model.propagate_in_video_iterator(video, reverse=True))

    assert [result.frame_idx for result in results] == list(range(11, -1, -1))
    assert all(result.object_ids == [1] for result in results)
    assert video.objects[1].spans == [[0, 11]]


def test_both_ways_every_object_comes_once_in_every_frame(model):
    video = session(CLIP[:16])
    tell_two_objects(video)

    found = outputs_of(model.propagate_both_ways_iterator(video))

    assert found.keys() == {(frame, obj_id) for frame in range(16) for obj_id in (1, 2, 3, 4)}
    for obj_id in (3, 4):
        alone = session(CLIP[:16])
        tell_two_objects(alone, [obj_id])
        assert_same(found, outputs_of(model.propagate_both_ways_iterator(alone)), atol=1e-3)


def test_the_clicks_of_one_frame_add_up_where_asked(dense):
    added, at_once = session(CLIP[:3]), session(CLIP[:3])
    points, labels = POINTS
    for index in range(3):
        added.add_points(1, 0, points[index, None], labels[index, None], clear_old=index == 0)
        output = dense(added, frame_idx=0)
    at_once.add_points(1, 0, points, labels)

    torch.testing.assert_close(output.pred_masks, dense(at_once, frame_idx=0).pred_masks)


def test_history_keeps_what_a_correction_far_back_needs(dense):
    short, long, full = (session(CLIP, history=history) for history in (0, 40, None))
    masks = []
    for video in (short, long, full):
        video.add_points(1, 0, *POINT)
        list(dense.propagate_in_video_iterator(video))
        video.add_points(1, 25, *BOX)
        masks.append(dense(video, frame_idx=25).pred_masks)

    assert len(short.objects[1].memories) < 40 == len(long.objects[1].memories)
    assert torch.equal(masks[1], masks[2])
    assert not torch.equal(masks[0], masks[2])


def test_frames_are_remembered_or_not_as_asked(dense):
    video = session(CLIP[:4])
    video.add_points(1, 0, *POINT)
    dense(video, frame_idx=0)

    dense(video, frame_idx=1, run_mem_encoder=False)
    dense(video, frame_idx=2)

    memories = video.objects[1].memories
    assert memories[1].features is None
    assert memories[2].features is not None
    shown = session(CLIP[:4])  # a prompt that is not remembered says nothing of other frames
    shown.add_points(1, 0, *POINT)
    assert dense(shown, frame_idx=0, run_mem_encoder=False).object_ids == [1]
    assert dense(shown, frame_idx=1).object_ids == []


def test_a_tracker_without_eyes_sees_through_those_of_another(dense):
    blind = EfficientSam3TrackerVideoModel(dense.config, remove_vision_encoder=True).eval()
    blind.load_state_dict(
        {name: tensor for name, tensor in dense.state_dict().items() if "vision" not in name}
    )
    stream, expected = session(), session()
    for each in (stream, expected):
        each.add_points(1, 0, *POINT)

    for frame_idx, frame in enumerate(CLIP[:4]):
        stream.add_new_frame(frame)
        with pytest.raises(ValueError, match="This tracker has no vision encoder"):
            blind(stream, frame_idx=frame_idx)
        with torch.no_grad():
            seen = dense.vision_encoder(frame[None])
            features = blind.project_levels(seen.fpn_hidden_states, seen.fpn_position_encoding)
        stream.cache_features(frame_idx, features)
        masks = blind(stream, frame_idx=frame_idx).pred_masks
        assert torch.equal(masks, dense(expected, frame=frame).pred_masks)


def long_stream(num_frames: int) -> Iterator[Tensor]:
    """As many frames as one likes, each in memory of its own."""
    for index in range(num_frames):
        yield CLIP[index % len(CLIP), :, :56, :56].clone()


@pytest.mark.parametrize("memory", ["perceiver", "dense"])
def test_a_state_is_of_constant_size(memory: str):
    vision = tiny_vision()
    vision["backbone_config"]["image_size"] = 56
    tracker = tiny_tracker_video(memory, vision)
    stream = EfficientSam3VideoSession(video_height=56, video_width=56)
    for obj_id in range(3):
        stream.add_points(obj_id, 0, torch.tensor([[10.0 * obj_id + 15, 20.0]]), torch.tensor([1]))

    sizes = []
    for frame_idx, frame in enumerate(long_stream(90)):
        tracker(stream, frame=frame)
        if 20 <= frame_idx < 25:  # a correction adds no more than its bound
            stream.add_points(1, frame_idx, torch.tensor([[25.0, 25.0]]), torch.tensor([1]))
            tracker(stream, frame_idx=frame_idx)
        sizes.append((stream.num_bytes, len(stream.objects[0].spans)))

    of_corrected = [len(stream.objects[1].conditioning()), len(stream.objects[1].prompts)]
    assert of_corrected == [6, 0]
    assert len(stream.objects[0].memories) == 16 + 1
    kept = [memory for memory in stream.objects[0].memories.values() if memory.features is not None]
    assert len(kept) == 7 + 1
    assert len(stream.recent_frames) == len(stream.features) == 1
    assert len(set(sizes[50:])) == 1


@pytest.mark.slow
def test_resident_memory_does_not_grow_with_the_number_of_frames():
    vision = copy.deepcopy(TINY_VIT)  # faster than a student of this size
    vision["backbone_config"]["image_size"] = 56
    tracker = tiny_tracker_video("perceiver", vision)
    stream = EfficientSam3VideoSession(video_height=56, video_width=56)
    for obj_id in range(3):
        stream.add_points(obj_id, 0, torch.tensor([[10.0 * obj_id + 15, 20.0]]), torch.tensor([1]))
    process = psutil.Process()

    resident, state = [], []
    for frame_idx, frame in enumerate(long_stream(2000)):
        tracker(stream, frame=frame)
        if frame_idx >= 400 and frame_idx % 50 == 0:
            resident.append((frame_idx, process.memory_info().rss))
            state.append(stream.num_bytes)

    frames, sizes = np.array(resident, dtype=float).T
    slope = np.polyfit(frames, sizes, 1)[0]
    assert slope < 1000, f"{slope:.0f} bytes a frame"
    assert len(set(state)) == 1


def test_a_stream_that_was_killed_goes_on_from_its_saved_session(model, tmp_path):
    whole, cut = session(), session()
    for stream in (whole, cut):
        tell_two_objects(stream, [1, 2])
    expected, found = [], []
    for frame_idx, frame in enumerate(CLIP[:30]):
        if frame_idx == 12:
            for stream in (whole, cut):
                stream.add_mask(3, 12, MASKS[12, 1])
        if frame_idx == 14:
            path = cut.save(tmp_path / "cut.safetensors")
            cut = EfficientSam3VideoSession.load(path)
            cut = EfficientSam3VideoSession.load(cut.save(path))  # over the file it came from
        if frame_idx == 20:
            for stream, results in ((whole, expected), (cut, found)):
                stream.add_points(2, 19, *POINTS)
                results.append(model(stream, frame_idx=19))
        expected.append(model(whole, frame=frame))
        found.append(model(cut, frame=frame))

    for ours, theirs in zip(found, expected, strict=True):
        assert ours.object_ids == theirs.object_ids
        assert ours.frame_idx == theirs.frame_idx
        assert torch.equal(ours.pred_masks, theirs.pred_masks)
        assert torch.equal(ours.object_score_logits, theirs.object_score_logits)
    assert cut.num_frames == 30
    assert [path.name for path in tmp_path.iterdir()] == ["cut.safetensors"]


def test_a_session_of_a_whole_video_is_saved_without_it(dense, tmp_path):
    video = session(CLIP[:10])
    tell_two_objects(video, [1, 2, 3, 4])
    for frame_idx in range(5):
        dense(video, frame_idx=frame_idx)
    path = video.save(tmp_path / "session.safetensors")

    loaded = EfficientSam3VideoSession.load(path, CLIP[:10])

    for frame_idx in range(5, 10):
        expected, found = (dense(each, frame_idx=frame_idx) for each in (video, loaded))
        assert found.object_ids == expected.object_ids
        assert torch.equal(found.pred_masks, expected.pred_masks)
    with pytest.raises(ValueError, match="a session of a video: give it again"):
        EfficientSam3VideoSession.load(path)
    with pytest.raises(ValueError, match="The video has 9 frames; the session was saved with 10"):
        EfficientSam3VideoSession.load(path, CLIP[:9])
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no session of format 2"):
        EfficientSam3VideoSession.load(path)


def test_recent_frames_keep_their_order_when_saved(dense, tmp_path):
    stream = session(max_vision_features_cache_size=3)
    stream.add_points(1, 0, *POINT)
    for frame in CLIP[:11]:  # 8, 9 and 10 in the order of numbers, not of letters
        dense(stream, frame=frame)

    loaded = EfficientSam3VideoSession.load(stream.save(tmp_path / "stream.safetensors"))

    assert list(loaded.recent_frames) == [8, 9, 10]
    loaded.add_new_frame(CLIP[11])
    assert list(loaded.recent_frames) == [9, 10, 11]
    loaded.add_points(1, 9, *BOX)
    stream.add_new_frame(CLIP[11])
    stream.add_points(1, 9, *BOX)
    masks = [dense(each, frame_idx=9).pred_masks for each in (stream, loaded)]
    assert torch.equal(*masks)


def processors() -> tuple[Sam3TrackerVideoProcessor, EfficientSam3TrackerVideoProcessor]:
    size = {"height": SIZE, "width": SIZE}
    half = [0.5, 0.5, 0.5]
    theirs = Sam3TrackerVideoProcessor(
        Sam3ImageProcessor(size=size),
        Sam2VideoVideoProcessor(size=size, image_mean=half, image_std=half),
    )
    return theirs, EfficientSam3TrackerVideoProcessor(EfficientSam3ImageProcessor(size=size))


def photographs(count: int = 4, height: int = 60, width: int = 90) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.integers(0, 255, (count, height, width, 3), dtype=np.uint8)


def test_code_for_transformers_processor_runs_and_means_the_same(stock, same):
    theirs, ours = processors()
    mask = np.zeros((60, 90), dtype=bool)
    mask[10:40, 20:70] = True
    runs = []
    for model, processor in ((stock, theirs), (same, ours)):
        video = processor.init_video_session(video=photographs(), inference_device="cpu")
        processor.add_inputs_to_inference_session(
            inference_session=video,
            frame_idx=0,
            obj_ids=[2, 5],
            input_points=[[[[45, 30]], [[10, 50]]]],
            input_labels=[[[1], [1]]],
        )
        results = [model(inference_session=video, frame_idx=0)]
        processor.add_inputs_to_inference_session(
            inference_session=video, frame_idx=1, obj_ids=9, input_masks=[mask]
        )
        results += list(model.propagate_in_video_iterator(video, start_frame_idx=0))
        sizes = [[video.video_height, video.video_width]]
        masks = [processor.post_process_masks([r.pred_masks], sizes)[0] for r in results[:1]]
        runs.append((video, results, masks))

    (their_video, expected, their_masks), (video, found, our_masks) = runs
    torch.testing.assert_close(video.get_frame(2), their_video.get_frame(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0].pred_masks, expected[0].pred_masks, atol=1e-3, rtol=1e-3)
    assert our_masks[0].shape == their_masks[0].shape == (2, 1, 60, 90)
    assert (our_masks[0] == their_masks[0]).float().mean() > 0.999
    # transformers takes frame 0 for a prompt of object 9, whose mask is for frame 1.
    assert [result.object_ids for result in found[1:]] == [[2, 5], *[[2, 5, 9]] * 3]
    assert expected[1].object_ids == [2, 5, 9]


def test_a_stream_is_fed_by_the_processor(dense):
    _, processor = processors()
    frames = photographs()
    stream = processor.init_video_session()
    processor.add_inputs_to_inference_session(
        stream, 0, 1, input_boxes=[[[10, 10, 60, 50]]], original_size=(60, 90)
    )

    for index, frame in enumerate(frames):
        given = Image.fromarray(frame) if index % 2 else frame
        frame_idx = processor.add_frame(stream, given)
        output = dense(stream, frame_idx=frame_idx)

        assert output.frame_idx == frame_idx == index
        masks = processor.post_process_masks(
            [output.pred_masks], [[stream.video_height, stream.video_width]]
        )[0]
        assert masks.shape == (1, 1, 60, 90)
    inputs = processor(frames[0], return_tensors="pt")  # as users of transformers do it
    torch.testing.assert_close(
        dense(stream, frame=inputs["pixel_values"][0]).frame_idx, len(frames)
    )


def test_clicks_of_objects_with_fewer_of_them_are_not_padded():
    _, processor = processors()
    video = processor.init_video_session(photographs())

    processor.add_inputs_to_inference_session(
        video, 0, [1, 2], [[[[45, 30], [9, 6]], [[10, 20]]]], [[[1, 0], [1]]]
    )

    assert video.objects[1].prompts[0].labels.tolist() == [1, 0]
    assert video.objects[2].prompts[0].labels.tolist() == [1]
    torch.testing.assert_close(video.objects[1].prompts[0].points[0], torch.tensor([56.0, 56.0]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"obj_ids": 1}, "at least one of points, boxes, or masks"),
        ({"obj_ids": 1, "input_points": [[[[1, 2]]]]}, "provided together"),
        ({"obj_ids": [1, 1], "input_boxes": [[[1, 2, 3, 4]] * 2]}, "name an object twice"),
        ({"obj_ids": [1, 2], "input_boxes": [[[1, 2, 3, 4]]]}, "2 objects, as obj_ids are, not of"),
        ({"obj_ids": 1, "input_boxes": [[[5, 5, 5, 9]]]}, "has no area"),
        ({"obj_ids": 1, "input_boxes": [[[95, 0, 99, 9]]]}, "outside the image of 90 x 60"),
        ({"obj_ids": 1, "input_masks": [np.zeros((2, 9, 9))]}, r"is \(height, width\), not"),
        ({"obj_ids": 1, "input_masks": [np.full((9, 9), np.nan)]}, "not finite"),
        ({"obj_ids": [1, 2, 3], "input_masks": [np.zeros((9, 9))]}, "1 masks do not fit 3 objects"),
        ({"obj_ids": 1, "input_masks": [np.ones((9, 9))], "frame_idx": 4}, "4 frames, and none 4"),
        (
            {"obj_ids": 1, "input_boxes": [[[1, 2, 3, 4]]], "clear_old_inputs": False},
            "A box comes before any point",
        ),
    ],
)
def test_prompts_that_make_no_sense_are_errors_that_say_why(inputs: dict, message: str):
    _, processor = processors()
    video = processor.init_video_session(photographs())

    with pytest.raises(ValueError, match=message):
        processor.add_inputs_to_inference_session(video, **{"frame_idx": 0, **inputs})


def test_videos_that_make_no_sense_are_errors_that_say_why():
    _, processor = processors()
    frames = photographs()

    with pytest.raises(ValueError, match="has no frames"):
        processor.init_video_session([])
    with pytest.raises(ValueError, match=r"A video is \(frames, height, width, 3\)"):
        processor.init_video_session(frames[0])
    with pytest.raises(TypeError, match="not str"):
        processor.init_video_session("clip.mp4")
    uneven = processor.init_video_session([frames[0], frames[0, :30]])
    with pytest.raises(ValueError, match="Frame 1 is of 30 x 90 pixels, the first one of 60 x 90"):
        uneven.get_frame(1)
    stream = processor.init_video_session()
    with pytest.raises(ValueError, match="give original_size"):
        processor.add_inputs_to_inference_session(stream, 0, 1, input_boxes=[[[1, 2, 3, 4]]])
    processor.add_frame(stream, frames[0])
    with pytest.raises(ValueError, match="30 x 90 pixels in a video of 60 x 90"):
        processor.add_frame(stream, frames[1, :30])


def test_calls_that_make_no_sense_are_errors_that_say_why(dense):
    stream, video = session(), session(CLIP[:4])
    with pytest.raises(ValueError, match="No object has a prompt"):
        next(dense.propagate_in_video_iterator(video))
    with pytest.raises(ValueError, match="A stream has no end"):
        next(dense.propagate_in_video_iterator(stream))
    with pytest.raises(ValueError, match="an inference_session or, of clips, either"):
        dense()
    with pytest.raises(ValueError, match="Give a frame of a stream"):
        dense(stream)
    with pytest.raises(TypeError, match=r"these mean nothing: \['mask_threshold'\]"):
        dense(video, frame_idx=0, mask_threshold=0.5)
    with pytest.raises(ValueError, match=r"There are no objects \[7\], only \[\]"):
        dense(video, frame_idx=0, object_ids=[7])
    with pytest.raises(ValueError, match="whole video; a stream starts without one"):
        dense(video, frame=CLIP[0])
    with pytest.raises(ValueError, match="4 frames, and none 4"):
        dense(video, frame_idx=4)
    with pytest.raises(ValueError, match="There is no object 3"):
        video.remove_object(3, strict=True)
    for frame in CLIP[:3]:
        dense(stream, frame=frame)
    with pytest.raises(ValueError, match="A stream only goes forward"):
        dense(stream, frame_idx=2, reverse=True)
    with pytest.raises(ValueError, match="Frame 0 is not at hand"):
        dense(stream, frame_idx=0)
    with pytest.raises(ValueError, match="Frame 1 of the stream has passed"):
        stream.add_points(1, 1, *POINT)
    with pytest.raises(ValueError, match="a stream only goes forward"):
        stream.add_new_frame(CLIP[0], 0)
    with pytest.raises(ValueError, match="one frame at a time"):
        stream.add_new_frame(CLIP[:2])
    with pytest.raises(ValueError, match="takes 112 x 112, not 96 x 96"):
        dense(session(), frame=torch.zeros(3, 96, 96))


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("neck", ["sam3", "lateral"])
@pytest.mark.parametrize("memory", ["dense", "perceiver"])
def test_every_trunk_and_neck_serves_the_tracker_in_video(memory: str, neck: str, trunk: str):
    tracker = tiny_tracker_video(memory, tiny_vision(neck, trunk))
    size = tracker.config.image_size
    video = EfficientSam3VideoSession(torch.randn(3, 3, size, size), size, size)
    video.add_points(1, 0, *POINT)

    results = list(tracker.propagate_in_video_iterator(video))

    assert [tuple(result.pred_masks.shape) for result in results] == [(1, 1, 32, 32)] * 3
    assert all(result.pred_masks.isfinite().all() for result in results)


@pytest.mark.parametrize("memory", ["dense", "perceiver"])
def test_half_precision_tracks_too(memory: str):
    tracker = tiny_tracker_video(memory).to(torch.bfloat16)
    video = session(CLIP[:4], dtype=torch.bfloat16)
    tell_two_objects(video, [1, 2])
    video.add_mask(3, 1, MASKS[1, 0])

    results = list(tracker.propagate_in_video_iterator(video))

    assert results[-1].pred_masks.dtype == torch.bfloat16
    assert all(result.pred_masks.isfinite().all() for result in results)
    assert results[-1].object_ids == [1, 2, 3]


def family(memory: str = "perceiver"):
    """A concept model and a tracker in video with one trunk."""
    model, tracker = tiny_model(), tiny_tracker_video(memory)
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    return model, tracker


def tracked(tracker) -> Tensor:
    video = session(CLIP[:3])
    video.add_points(1, 0, *POINT)
    return torch.cat([result.pred_masks for result in tracker.propagate_in_video_iterator(video)])


@pytest.mark.parametrize("memory", ["dense", "perceiver"])
def test_one_folder_serves_images_and_video(memory: str, tmp_path):
    model, tracker = family(memory)
    zoo.save(model.config, tmp_path, model, tracker)

    in_video = EfficientSam3TrackerVideoModel.from_pretrained(tmp_path).eval()
    on_images = EfficientSam3TrackerModel.from_pretrained(tmp_path).eval()
    concepts = AutoModel.from_pretrained(tmp_path)

    assert in_video.config.memory == memory
    torch.testing.assert_close(tracked(in_video), tracked(tracker), atol=1e-3, rtol=1e-3)
    mine, theirs = on_images.state_dict(), in_video.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert set(theirs) - set(mine)
    processor = EfficientSam3TrackerVideoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor.image_processor, EfficientSam3ImageProcessor)
    config = EfficientSam3TrackerConfig.from_pretrained(tmp_path)
    assert config.vision_config.backbone_config.trunk == "efficientvit_b0"
    assert concepts.config.tracker_video_config.memory == memory
    trunk = sum(parameter.numel() for parameter in model.vision_encoder.backbone.parameters())
    parameters = sum(p.numel() for each in (model, tracker) for p in each.parameters())
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert stored < 4.1 * (parameters - trunk) + 200_000  # names and buffers


def test_a_tracker_alone_is_saved_and_loaded_with_its_processor(perceiver, tmp_path):
    perceiver.save_pretrained(tmp_path)
    processors()[1].save_pretrained(tmp_path)

    loaded = AutoModel.from_pretrained(tmp_path).eval()

    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, EfficientSam3TrackerVideoProcessor)
    assert processor.target_size == SIZE
    assert isinstance(loaded, EfficientSam3TrackerVideoModel)
    torch.testing.assert_close(tracked(loaded), tracked(perceiver), atol=1e-3, rtol=1e-3)


def test_a_folder_without_a_tracker_in_video_names_the_missing_weights(tmp_path):
    model, tracker = tiny_model(), tiny_tracker()
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    zoo.save(model.config, tmp_path, model, tracker)
    config = tiny_video_config("dense")

    with pytest.raises(ValueError, match=r"missing in the checkpoint \(mask_downsample"):
        EfficientSam3TrackerVideoModel.from_pretrained(tmp_path, config=config)


def test_a_folder_that_says_nothing_of_video_has_the_memory_of_sam3(tmp_path):
    zoo.save("efficientsam3-repvit-s", tmp_path)

    config = EfficientSam3TrackerVideoConfig.from_pretrained(tmp_path)

    assert config.to_diff_dict().keys() == EfficientSam3TrackerVideoConfig().to_diff_dict().keys()
    assert config.memory == "dense"
    assert config.vision_config.backbone_config.trunk == "repvit_m0_9"
    smaller = EfficientSam3TrackerVideoConfig.from_pretrained(tmp_path, image_size=504)
    assert smaller.grid_size == 36
    assert smaller.prompt_encoder_config.image_size == 504


def test_the_image_size_of_a_family_reaches_its_tracker_in_video(tmp_path):
    family = zoo.config("efficientsam3-repvit-s")
    family.tracker_video_config = tracker_video_config(family, memory="perceiver")
    family.image_size = 504
    family.save_pretrained(tmp_path)

    config = EfficientSam3TrackerVideoConfig.from_pretrained(tmp_path)

    assert (config.memory, config.grid_size) == ("perceiver", 36)
    assert type(family.tracker_video_config) is EfficientSam3TrackerVideoConfig
    concepts_only = zoo.config("efficientsam3-repvit-s")
    concepts_only.tracker_config = None
    concepts_only.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="serves the concept model only"):
        EfficientSam3TrackerVideoConfig.from_pretrained(tmp_path)


def test_a_zoo_name_is_enough_and_its_memory_can_be_chosen():
    variant = zoo.config("efficientsam3-efficientvit-s")

    with torch.device("meta"):
        dense = EfficientSam3TrackerVideoModel(variant)
        perceiver = EfficientSam3TrackerVideoModel(
            tracker_video_config(variant, memory="perceiver")
        )

        stock = Sam3TrackerVideoModel(Sam3TrackerVideoConfig())

    ours, theirs = (
        {name: tensor.shape for name, tensor in model.state_dict().items() if "vision" not in name}
        for model in (dense, stock)
    )
    assert ours == theirs
    assert (dense.config.tokens_per_memory, perceiver.config.tokens_per_memory) == (5184, 400)
    assert len(perceiver.memory_attention.layers) == 2
    assert sum(p.numel() for p in perceiver.spatial_perceiver.parameters()) < 0.25e6


def test_a_student_starts_from_the_trackers_of_transformers(stock):
    parts = tracker_video_config(
        EfficientSam3TrackerVideoConfig(
            **{
                **{
                    name: value
                    for name, value in stock.config.to_dict().items()
                    if name.startswith(("memory_", "mask_downsampler_"))
                    and name != "memory_attention_rope_feat_sizes"
                },
                "vision_config": {**tiny_vision(), "fpn_hidden_size": 128},
                "prompt_encoder_config": {"hidden_size": 128, "mask_input_channels": 4},
                "mask_decoder_config": {
                    "hidden_size": 128,
                    "mlp_dim": 64,
                    "num_attention_heads": 4,
                    "iou_head_hidden_dim": 32,
                },
                "perceiver_resampler_num_latents_2d": 16,
            }
        ),
        memory="perceiver",
        memory_attention_num_layers=1,
    )

    student = EfficientSam3TrackerVideoModel.from_teacher(stock, parts)

    assert set(student.fresh_parts) == {
        "vision_encoder.backbone",
        "spatial_perceiver",
        "spatial_perceiver.layers",
        "spatial_perceiver.layer_norm",
    }
    theirs = stock.state_dict()
    for name in ("memory_attention.layers.0.linear1.weight", "memory_encoder.projection.weight"):
        assert torch.equal(student.state_dict()[name], theirs[name])


@pytest.mark.gpu
def test_memories_may_lie_elsewhere_than_the_model(dense):
    model = copy.deepcopy(dense).cuda()
    video = session(CLIP[:6].cuda(), inference_device="cuda", inference_state_device="cpu")
    tell_two_objects(video, [1, 2, 3])

    results = list(model.propagate_in_video_iterator(video))

    assert all(result.pred_masks.is_cuda for result in results)
    memories = [memory for item in video.objects.values() for memory in item.memories.values()]
    assert all(memory.features.device.type == "cpu" for memory in memories)
