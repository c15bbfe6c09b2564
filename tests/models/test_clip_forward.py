"""Clips with gradients: the same masks as a session, and gradients where they should be."""

from functools import partial

import pytest
import torch
from tiny import moving_squares, tiny_tracker_video
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from efficientsam3_hf import EfficientSam3TrackerVideoModel, EfficientSam3VideoSession
from efficientsam3_hf.models.clip_forward import ClipPrompts, FramePrompt

FRAMES = 9  # more than a tracker sees at once
CLIP, MASKS = moving_squares(FRAMES)
CLIPS = torch.stack([CLIP, CLIP.flip(-1) * 0.9])
POINTS = torch.tensor([[[[30.0, 30.0]], [[60.0, 45.0]]], [[[80.0, 30.0]], [[40.0, 45.0]]]])
LABELS = torch.ones(2, 2, 1, dtype=torch.long)
BOXES = torch.tensor([[[20.0, 15.0, 60.0, 50.0], [40.0, 40.0, 70.0, 70.0]]] * 2)
FIRST_MASKS = torch.stack([MASKS[0], MASKS[0].flip(-1)]).float()
ALL_MASKS = torch.stack([MASKS, MASKS.flip(-1)]).float()
PROMPTS = {
    "points": {"input_points": POINTS, "input_labels": LABELS},
    "boxes": {"input_boxes": BOXES},
    "boxes and points": {"input_boxes": BOXES, "input_points": POINTS, "input_labels": LABELS},
    "masks": {"input_masks": FIRST_MASKS},
}
MEMORY_PARTS = ("memory_attention", "memory_encoder", "object_pointer_proj")


@pytest.fixture(scope="module", params=["dense", "perceiver"])
def model(request) -> EfficientSam3TrackerVideoModel:
    return tiny_tracker_video(request.param)


@pytest.fixture
def fresh() -> EfficientSam3TrackerVideoModel:
    """A model that a test may train or take gradients of."""
    return tiny_tracker_video("perceiver")


def one_clip(prompts: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor[index : index + 1] for name, tensor in prompts.items()}


def in_a_session(
    model, clip: Tensor, prompts: dict[str, Tensor], streaming: bool
) -> tuple[Tensor, Tensor]:
    """Masks (frames, objects, height, width) and scores of a session on one clip."""
    session = EfficientSam3VideoSession(None if streaming else clip, 112, 112)
    for obj_id in range(2):
        if "input_masks" in prompts:
            session.add_mask(obj_id, 0, prompts["input_masks"][0, obj_id])
            continue
        points, labels = [], []
        if "input_boxes" in prompts:
            points.append(prompts["input_boxes"][0, obj_id].view(2, 2))
            labels.append(torch.tensor([2, 3]))
        if "input_points" in prompts:
            points.append(prompts["input_points"][0, obj_id])
            labels.append(prompts["input_labels"][0, obj_id])
        session.add_points(obj_id, 0, torch.cat(points), torch.cat(labels))
    if streaming:
        results = [model(session, frame=frame) for frame in clip]
    else:
        results = list(model.propagate_in_video_iterator(session))
    masks = torch.stack([result.pred_masks[:, 0] for result in results])
    return masks, torch.stack([result.object_score_logits[:, 0] for result in results])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", PROMPTS)
def test_a_clip_gives_the_masks_of_a_session(model, kind: str, streaming: bool):
    prompts = one_clip(PROMPTS[kind], 0)

    outputs = model.forward_clip(CLIPS[:1], **prompts, streaming=streaming)

    assert outputs.pred_masks.requires_grad
    masks, scores = in_a_session(model, CLIPS[0], prompts, streaming)
    assert (masks > -1000).all()
    atol = tolerance(model)
    torch.testing.assert_close(outputs.pred_masks[0], masks.clone(), atol=atol, rtol=1e-4)
    torch.testing.assert_close(outputs.object_score_logits[0], scores.clone(), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("kind", PROMPTS)
@torch.no_grad()
def test_clips_in_one_batch_equal_one_by_one(model, kind: str):
    forced = {"memory_masks": ALL_MASKS, "is_forced": torch.arange(FRAMES)[None] % 3 == 1}

    together = model.forward_clip(CLIPS, **PROMPTS[kind], **forced)

    assert together.pred_masks.shape == (2, FRAMES, 2, 32, 32)
    assert together.iou_scores.shape == together.object_score_logits.shape == (2, FRAMES, 2)
    assert together.object_pointers.shape == (2, FRAMES, 2, 32)
    for index in range(2):
        alone = model.forward_clip(
            CLIPS[index : index + 1],
            **one_clip(PROMPTS[kind], index),
            memory_masks=ALL_MASKS[index : index + 1],
            is_forced=forced["is_forced"],
        )
        for name in ("pred_masks", "iou_scores", "object_score_logits", "object_pointers"):
            torch.testing.assert_close(
                getattr(together, name)[index],
                getattr(alone, name)[0],
                atol=tolerance(model),
                rtol=1e-4,
            )


def tolerance(model: EfficientSam3TrackerVideoModel) -> float:
    """How near masks of the same clip come that were computed in another order.

    Dense memories are rounded to bfloat16. Where a rounding of float32 makes one cross a step of
    bfloat16, that memory moves by 1/256, and masks, which are of the size of 5, by some 1e-3.
    """
    return 1e-4 if model.config.memory == "perceiver" else 3e-3


@torch.no_grad()
def test_candidates_and_the_choice_among_them_are_returned(model):
    outputs = model.forward_clip(CLIPS, **PROMPTS["boxes"], output_conditioned_features=True)

    counts = [scores.shape[-1] for scores in outputs.all_iou_scores]
    assert counts == [1] + [3] * (FRAMES - 1)  # a box is not ambiguous, a tracked object is
    for time in range(FRAMES):
        best = outputs.all_iou_scores[time].argmax(-1)[..., None, None, None]
        chosen = outputs.all_masks[time].take_along_dim(best, dim=2)[:, :, 0]
        assert torch.equal(chosen, outputs.pred_masks[:, time])
    assert [tuple(each.shape) for each in outputs.conditioned_features] == [(2, 2, 32, 8, 8)] * 9


def test_gradients_reach_every_part_of_the_memory(model):
    outputs = model.forward_clip(CLIPS[:1, :4], **one_clip(PROMPTS["points"], 0))
    model.zero_grad()

    (outputs.pred_masks.square().mean() + outputs.iou_scores.sum()).backward()

    for name, parameter in model.named_parameters():
        if name.startswith(("memory_attention", "memory_encoder", "spatial_perceiver")):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert model.object_pointer_proj.proj_in.weight.grad.abs().sum() > 0
    assert model.memory_temporal_positional_encoding.grad.abs().sum() > 0
    assert model.vision_encoder.backbone.head[3].weight.grad.abs().sum() > 0
    model.zero_grad()


def test_checkpointing_saves_memory_and_changes_no_gradient(fresh):
    fresh.train()
    for part in fresh.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    fresh.config.memory_attention_rope_dropout = 0.0
    gradients, saved = [], []
    for checkpointing in (False, True):
        if checkpointing:
            fresh._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            # By the way in that wrappers for training take.
            outputs = fresh(pixel_values=CLIPS[:1, :3], **one_clip(PROMPTS["points"], 0))
        outputs.pred_masks.square().mean().backward()
        saved.append(sum(kept))
        gradients.append(fresh.memory_attention.layers[0].linear1.weight.grad.clone())
        fresh.zero_grad()

    torch.testing.assert_close(gradients[1], gradients[0])
    assert saved[1] < saved[0]


def reached_frames(model, gradient_frames: int | None, **fields) -> list[int]:
    """Frames whose pixels have an influence on the last mask that a gradient sees."""
    clips = CLIPS[:1].clone().requires_grad_()
    outputs = model.forward_clip(
        clips, **one_clip(PROMPTS["points"], 0), gradient_frames=gradient_frames, **fields
    )
    outputs.pred_masks[:, -1].square().mean().backward()
    model.zero_grad()
    return [time for time in range(FRAMES) if clips.grad[0, time].abs().sum() > 0]


@pytest.mark.parametrize("gradient_frames", [1, 3, FRAMES, None])
def test_gradients_go_back_as_many_frames_as_asked(model, gradient_frames: int | None):
    expected = list(range(FRAMES - (gradient_frames or FRAMES), FRAMES))

    assert reached_frames(model, gradient_frames) == expected


@pytest.mark.parametrize("gradient_frames", [0, 2])
def test_masks_do_not_depend_on_where_gradients_stop(model, gradient_frames: int):
    expected = model.forward_clip(CLIPS, **PROMPTS["points"])

    outputs = model.forward_clip(CLIPS, **PROMPTS["points"], gradient_frames=gradient_frames)

    torch.testing.assert_close(
        outputs.pred_masks, expected.pred_masks, atol=tolerance(model), rtol=1e-4
    )
    assert outputs.pred_masks.requires_grad == (gradient_frames > 0)
    constant = outputs.all_masks[: FRAMES - gradient_frames]
    assert not any(masks.requires_grad for masks in constant)


@torch.no_grad()
def test_clips_that_were_encoded_before_give_the_same(model):
    expected = model.forward_clip(CLIPS, **PROMPTS["points"])

    frames = model.encode_clips(CLIPS)

    outputs = model(frames=frames, **PROMPTS["points"])
    torch.testing.assert_close(outputs.pred_masks, expected.pred_masks, atol=1e-5, rtol=1e-5)
    fewer = model(frames=frames, **PROMPTS["points"], num_frames=2)
    torch.testing.assert_close(fewer.pred_masks, expected.pred_masks[:, :2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gradient_frames", [2, None])
def test_weights_are_cast_anew_where_gradients_begin(fresh, monkeypatch, gradient_frames):
    """Older versions of torch keep casts that were made without gradients within one autocast."""
    uses: dict[str, list[bool | None]] = {"vision_encoder": [], "memory_attention": []}
    for name, of_part in uses.items():
        part = fresh.get_submodule(name)
        part.register_forward_pre_hook(
            lambda *_, of_part=of_part: of_part.append(torch.is_grad_enabled())
        )
    clear = torch.clear_autocast_cache

    def cleared() -> None:
        clear()
        for of_part in uses.values():
            of_part.append(None)

    monkeypatch.setattr(torch, "clear_autocast_cache", cleared)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            fresh.forward_clip(CLIPS, **PROMPTS["points"])
        fresh.forward_clip(CLIPS, **PROMPTS["points"], gradient_frames=gradient_frames)

    for of_part in uses.values():
        first = of_part.index(True)
        assert False in of_part[:first]
        assert of_part[first - 1] is None


def test_mixed_precision_trains(fresh):
    fresh.train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = fresh(
            pixel_values=CLIPS[:, :3], **PROMPTS["masks"], memory_masks=ALL_MASKS[:, :3]
        )
        loss = outputs.pred_masks.float().sigmoid().mean() + outputs.iou_scores.float().mean()

    loss.backward()

    gradient = fresh.spatial_perceiver.latents_2d.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@torch.no_grad()
def test_fewer_frames_are_rolled_out_where_asked(model):
    expected = model.forward_clip(CLIPS, **PROMPTS["points"])

    outputs = model.forward_clip(CLIPS, **PROMPTS["points"], num_frames=4)

    assert outputs.pred_masks.shape[1] == 4
    torch.testing.assert_close(outputs.pred_masks, expected.pred_masks[:, :4], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_forced_memories_are_of_the_masks_given(model):
    own = model.forward_clip(CLIPS, **PROMPTS["points"])
    forced = model.forward_clip(CLIPS, **PROMPTS["points"], memory_masks=ALL_MASKS)
    never = model.forward_clip(
        CLIPS,
        **PROMPTS["points"],
        memory_masks=ALL_MASKS,
        is_forced=torch.zeros(FRAMES, dtype=torch.bool),
    )
    late = model.forward_clip(
        CLIPS,
        **PROMPTS["points"],
        memory_masks=ALL_MASKS,
        is_forced=torch.arange(FRAMES) == 4,
    )

    torch.testing.assert_close(never.pred_masks, own.pred_masks, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forced.pred_masks[:, 0], own.pred_masks[:, 0])
    assert not torch.allclose(forced.pred_masks[:, 1], own.pred_masks[:, 1], atol=1e-3)
    torch.testing.assert_close(late.pred_masks[:, :5], own.pred_masks[:, :5], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(late.pred_masks[:, 5], own.pred_masks[:, 5], atol=1e-3)


@torch.no_grad()
def test_a_forced_mask_without_pixels_is_remembered_as_an_absence(model):
    seen = {}
    hook = model.memory_encoder.register_forward_hook(
        lambda module, args, output: seen.setdefault("map", output[0].clone())
    )
    present = torch.tensor([[1.0], [-1.0]])
    tokens = model.encode_memories(torch.zeros(1, 32, 8, 8), torch.zeros(2, 1, 128, 128), present)
    hook.remove()

    # The map is the same; the embedding of occlusion makes the difference.
    torch.testing.assert_close(seen["map"][0], seen["map"][1])
    assert not torch.allclose(tokens[0].float(), tokens[1].float(), atol=1e-3)
    empty = model.forward_clip(CLIPS, **PROMPTS["points"], memory_masks=torch.zeros_like(ALL_MASKS))
    full = model.forward_clip(CLIPS, **PROMPTS["points"], memory_masks=torch.ones_like(ALL_MASKS))
    assert not torch.allclose(empty.pred_masks[:, 1:], full.pred_masks[:, 1:], atol=1e-3)


def test_a_few_steps_teach_a_clip(fresh):
    fresh.train()
    fresh.vision_encoder.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in fresh.parameters() if parameter.requires_grad], lr=3e-3
    )
    target = torch.nn.functional.interpolate(MASKS.float(), (32, 32), mode="area")[None, :4]

    losses = []
    for step in range(16):
        torch.manual_seed(step)
        outputs = fresh.forward_clip(CLIPS[:1, :4], **one_clip(PROMPTS["masks"], 0))
        logits = outputs.pred_masks[:, 1:].clamp(-20, 20)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "Give points, boxes"),
        ({"input_points": POINTS}, "points and labels together"),
        ({**PROMPTS["boxes"], **PROMPTS["masks"]}, "Give points, boxes"),
        ({**PROMPTS["boxes"], "frames": []}, "either pixel_values or frames"),
        ({**PROMPTS["boxes"], "prompts": ClipPrompts(2, [])}, "not both"),
        ({"prompts": ClipPrompts(2, [])}, "No object has a prompt in the 9 frames"),
        ({**PROMPTS["boxes"], "num_frames": 10}, "num_frames=10 of clips of 9"),
        ({**PROMPTS["boxes"], "is_forced": torch.ones(9)}, "give those too"),
        ({**PROMPTS["boxes"], "memory_masks": ALL_MASKS[:, :, :1]}, "with 2 objects"),
    ],
)
def test_inputs_that_make_no_sense_are_errors_that_say_why(model, inputs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        model.forward_clip(CLIPS, **inputs)


def mixed_prompts() -> ClipPrompts:
    """Four rows: a point, a mask and a box, begun on frames of their own, and nothing.

    The object with the mask, and that of the point, are corrected later, each on its own frame.
    """
    return ClipPrompts(
        2,
        [
            FramePrompt(0, [0], POINTS[0, :1], LABELS[0, :1]),
            FramePrompt(2, [1], masks=MASKS[2, 1][None, None].float()),
            FramePrompt(1, [3], BOXES[1, 1].view(1, 2, 2), torch.tensor([[2, 3]])),
            # One is corrected where another begins, and two at once.
            FramePrompt(2, [0], torch.tensor([[[30.0, 26.0]]]), torch.ones(1, 1).long()),
            FramePrompt(
                6, [3, 0], torch.tensor([[[50.0, 50.0]], [[9.0, 9.0]]]), torch.tensor([[1], [0]])
            ),
        ],
    )


def test_objects_begin_and_are_corrected_as_in_a_session(model):
    prompts = mixed_prompts()

    outputs = model.forward_clip(CLIPS, prompts=prompts)

    for clip in range(2):
        session = EfficientSam3VideoSession(CLIPS[clip], 112, 112)
        for time in range(FRAMES):
            given = [
                (row, each.of([place]))
                for each in prompts.prompts
                for place, row in enumerate(each.rows)
                if each.frame == time and row // 2 == clip
            ]
            if any(row in session.objects for row, _ in given):
                model(session, frame_idx=time)  # what is corrected has been seen before
            for row, prompt in given:
                if prompt.masks is not None:
                    session.add_mask(row, time, prompt.masks[0, 0])
                else:
                    session.add_points(row, time, prompt.points[0], prompt.labels[0])
            result = model(session, frame_idx=time)
            for place, row in enumerate(result.object_ids):
                for ours, theirs in (
                    (outputs.pred_masks, result.pred_masks[place, 0]),
                    (outputs.object_score_logits, result.object_score_logits[place, 0]),
                ):
                    torch.testing.assert_close(
                        ours[clip, time, row % 2], theirs.clone(), atol=tolerance(model), rtol=1e-4
                    )
            for row in {2 * clip, 2 * clip + 1} - set(result.object_ids):
                assert not outputs.pred_masks[clip, time, row % 2].any()


def test_a_correction_changes_its_object_from_its_frame_on_and_no_other(model):
    prompts = mixed_prompts()
    without = ClipPrompts(2, prompts.prompts[:3])

    with torch.no_grad():
        corrected = model.forward_clip(CLIPS, prompts=prompts).pred_masks
        plain = model.forward_clip(CLIPS, prompts=without).pred_masks

    change = (corrected - plain).abs().flatten(3).amax(-1).transpose(1, 2).flatten(0, 1)
    moved = change > tolerance(model)
    assert moved[0].tolist() == [False] * 2 + [True] * 7
    assert moved[3].tolist() == [False] * 6 + [True] * 3
    assert not moved[1:3].any()


def test_candidates_of_rows_with_one_are_filled_up(model):
    prompts = ClipPrompts(
        2,
        [
            FramePrompt(0, [1], BOXES[0, 1].view(1, 2, 2), torch.tensor([[2, 3]])),
            FramePrompt(0, [0], POINTS[0, :1], LABELS[0, :1]),
        ],
    )

    outputs = model.forward_clip(CLIPS[:1], prompts=prompts, num_frames=1)

    assert outputs.all_iou_scores[0].shape == (1, 2, 3)
    assert outputs.all_iou_scores[0][0, 1].unique().numel() == 1
    assert outputs.all_iou_scores[0][0, 0].unique().numel() == 3
    assert torch.equal(outputs.all_masks[0][0, 1, 2], outputs.pred_masks[0, 0, 1])


def test_candidates_say_where_an_object_would_be_that_is_thought_gone(fresh):
    with torch.no_grad():
        fresh.mask_decoder.pred_obj_score_head.proj_out.bias.sub_(1000)

    outputs = fresh.forward_clip(CLIPS, **PROMPTS["points"], num_frames=2)

    assert (outputs.pred_masks == -1024).all()
    assert all((masks > -1000).all() for masks in outputs.all_masks)
    sum(masks.sum() for masks in outputs.all_masks).backward()
    assert fresh.mask_decoder.transformer.layers[0].mlp.proj_in.weight.grad.abs().sum() > 0
