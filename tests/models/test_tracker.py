"""The image tracker: prompts, several objects and images, mask generation, loading."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY_VIT, TRUNKS, tiny_model, tiny_tracker, tiny_vision
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskGeneration,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    pipeline,
)

from efficientsam3_hf import EfficientSam3TrackerModel, EfficientSam3TrackerProcessor, zoo

POINTS = torch.tensor([[[[30.0, 40.0]], [[70.0, 20.0]]]])
LABELS = torch.tensor([[[1], [1]]])
BOX = torch.tensor([[[10.0, 20.0, 80.0, 90.0]]])


def pixels(count: int = 1, size: int = 112) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_tracker_equals_transformers_but_for_the_misplaced_embedding():
    ours = tiny_tracker(TINY_VIT)
    parts = ours.config.to_dict()
    stock = Sam3TrackerModel(
        Sam3TrackerConfig(**{name: parts[name] for name in Sam3TrackerConfig.sub_configs_defaults})
    ).eval()
    stock.load_state_dict(ours.state_dict())
    embedding = ours.no_memory_embedding.detach().clone()
    assert embedding.abs().max() > 0

    with_embedding = ours(pixel_values=pixels(), input_points=POINTS, input_labels=LABELS)
    ours.no_memory_embedding.zero_()
    without = ours(pixel_values=pixels(), input_points=POINTS, input_labels=LABELS)

    # transformers adds the embedding to a fourth level that nothing reads, so it has no effect.
    expected = stock(pixel_values=pixels(), input_points=POINTS, input_labels=LABELS)
    torch.testing.assert_close(without.pred_masks, expected.pred_masks)
    torch.testing.assert_close(without.iou_scores, expected.iou_scores)
    assert not torch.allclose(with_embedding.pred_masks, expected.pred_masks, atol=1e-3)


@torch.no_grad()
def test_no_memory_embedding_is_added_to_the_level_that_is_read(tracker):
    features = tracker.vision_encoder(pixels()).fpn_hidden_states[2]

    embeddings = tracker.get_image_embeddings(pixels())

    assert [tuple(e.shape[2:]) for e in embeddings] == [(32, 32), (16, 16), (8, 8)]
    expected = features + tracker.no_memory_embedding.view(1, -1, 1, 1)
    torch.testing.assert_close(embeddings[2], expected)


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("neck", ["sam3", "lateral"])
@torch.no_grad()
def test_every_trunk_and_neck_serves_the_tracker(neck: str, trunk: str):
    model = tiny_tracker(tiny_vision(neck, trunk))
    image = pixels(1, model.config.image_size)

    outputs = model(pixel_values=image, input_points=POINTS, input_labels=LABELS)

    assert outputs.pred_masks.shape == (1, 2, 3, 32, 32)
    assert outputs.iou_scores.shape == (1, 2, 3)
    assert outputs.pred_masks.isfinite().all()


@torch.no_grad()
def test_objects_in_one_call_equal_one_by_one(tracker):
    together = tracker(pixel_values=pixels(), input_points=POINTS, input_labels=LABELS)

    for index in range(2):
        one = slice(index, index + 1)
        alone = tracker(
            pixel_values=pixels(), input_points=POINTS[:, one], input_labels=LABELS[:, one]
        )
        torch.testing.assert_close(together.pred_masks[:, one], alone.pred_masks)


@torch.no_grad()
def test_images_in_one_call_equal_one_by_one(tracker):
    boxes = torch.cat([BOX, BOX + 10])

    together = tracker(pixel_values=pixels(2), input_boxes=boxes, multimask_output=False)

    assert together.pred_masks.shape == (2, 1, 1, 32, 32)
    alone = tracker(pixel_values=pixels(2)[1:], input_boxes=boxes[1:], multimask_output=False)
    torch.testing.assert_close(together.pred_masks[1:], alone.pred_masks)


@torch.no_grad()
def test_a_mask_prompt_refines_and_any_size_will_do(tracker):
    plain = tracker(pixel_values=pixels(), input_points=POINTS[:, :1], input_labels=LABELS[:, :1])
    low_resolution = plain.pred_masks[:, 0, :1]

    refined = tracker(
        pixel_values=pixels(),
        input_points=POINTS[:, :1],
        input_labels=LABELS[:, :1],
        input_masks=low_resolution,
    )

    assert not torch.allclose(refined.pred_masks, plain.pred_masks, atol=1e-4)
    enlarged = F.interpolate(low_resolution, scale_factor=4, mode="nearest")
    outputs = tracker(pixel_values=pixels(), input_boxes=BOX, input_masks=enlarged)
    assert outputs.pred_masks.isfinite().all()


@torch.no_grad()
def test_image_embeddings_are_computed_once_and_reused(tracker):
    embeddings = tracker.get_image_embeddings(pixels())

    outputs = tracker(image_embeddings=embeddings, input_boxes=BOX)

    expected = tracker(pixel_values=pixels(), input_boxes=BOX)
    torch.testing.assert_close(outputs.pred_masks, expected.pred_masks)


@pytest.mark.parametrize("trunk", TRUNKS)
@torch.no_grad()
def test_tiny_trackers_see_the_image(trunk: str):
    tracker = tiny_tracker(tiny_vision("sam3", trunk))

    noise = tracker(pixel_values=pixels(), input_boxes=BOX)
    grey = tracker(pixel_values=torch.zeros_like(pixels()), input_boxes=BOX)

    assert (noise.pred_masks - grey.pred_masks).abs().max() > 0.01


def test_another_size_is_an_error_that_says_which_fits(tracker):
    with pytest.raises(ValueError, match="takes 112 x 112, not 96 x 96"):
        tracker(pixel_values=pixels(1, 96), input_boxes=BOX)


@torch.no_grad()
def test_the_size_is_chosen_in_the_configuration(tmp_path):
    tracker = tiny_tracker()
    tracker.save_pretrained(tmp_path)

    bigger = EfficientSam3TrackerModel.from_pretrained(tmp_path, image_size=168).eval()

    assert bigger.config.prompt_encoder_config.image_size == 168
    outputs = bigger(pixel_values=pixels(1, 168), input_boxes=BOX)
    assert outputs.pred_masks.shape[-1] == 48


def test_processor_makes_what_the_tracker_takes(tracker, processor):
    tracker_processor = EfficientSam3TrackerProcessor(processor.image_processor)
    images = [np.full((60, 90, 3), 200, dtype=np.uint8), np.zeros((40, 20, 3), dtype=np.uint8)]

    inputs = tracker_processor(
        images,
        input_points=[[[[45, 30], [9, 6]]], [[[10, 20]]]],
        input_labels=[[[1, 0]], [[1]]],
    )
    with torch.no_grad():
        outputs = tracker(**inputs, multimask_output=False)
    masks = tracker_processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])

    torch.testing.assert_close(inputs["input_points"][0, 0, 0], torch.tensor([56.0, 56.0]))
    assert inputs["input_labels"].tolist() == [[[1, 0]], [[1, -10]]]
    assert [tuple(mask.shape) for mask in masks] == [(1, 1, 60, 90), (1, 1, 40, 20)]
    assert masks[0].dtype == torch.bool


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"input_points": [[[[1, 2]]]], "input_labels": [[[7]]]}, "Label 7 of a point is none of"),
        ({"input_points": [[[[float("nan"), 2]]]]}, "not finite"),
        ({"input_boxes": [[[5, 5, 5, 9]]]}, "has no area"),
        ({"input_boxes": [[[95, 0, 99, 9]]]}, "lies outside the image of 90 x 60 pixels"),
        ({"input_boxes": [[[1, 2, 3]]]}, "A box has 4 numbers"),
        ({"input_points": [[[[1, 70]]]]}, r"\[1.0, 70.0\] lies outside the image of 90 x 60"),
        ({"input_points": [[[1, 2]]]}, "points"),
        ({"input_points": [[[[1, 2]]]], "input_labels": [[[1, 1]]]}, "inconsistent dimensions"),
    ],
)
def test_prompts_that_make_no_sense_are_errors_that_say_why(processor, prompt, message):
    tracker_processor = EfficientSam3TrackerProcessor(processor.image_processor)

    with pytest.raises(ValueError, match=message):
        tracker_processor(np.zeros((60, 90, 3), dtype=np.uint8), **prompt)


def test_a_box_that_leaves_its_image_is_clipped(processor):
    tracker_processor = EfficientSam3TrackerProcessor(processor.image_processor)

    inputs = tracker_processor(np.zeros((60, 90, 3)), input_boxes=[[[-9, 15, 200, 45]]])

    torch.testing.assert_close(inputs["input_boxes"], torch.tensor([[[0.0, 28.0, 112.0, 84.0]]]))


def test_points_that_only_fill_up_may_lie_anywhere(processor):
    tracker_processor = EfficientSam3TrackerProcessor(processor.image_processor)

    inputs = tracker_processor(
        np.zeros((60, 90, 3)),
        input_points=[[[[9, 6], [-10, -10]]]],
        input_labels=[[[1, -10]]],
    )

    assert inputs["input_labels"].tolist() == [[[1, -10]]]


def test_mask_generation_pipeline_runs_from_a_folder(tmp_path):
    model, tracker = tiny_model(), tiny_tracker()
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    zoo.save(model.config, tmp_path, model, tracker)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))

    generator = pipeline("mask-generation", model=str(tmp_path))
    masks = generator(
        image, points_per_batch=8, points_per_crop=4, pred_iou_thresh=0, stability_score_thresh=0
    )["masks"]

    assert isinstance(generator.model, EfficientSam3TrackerModel)
    assert len(masks) > 0
    assert masks[0].shape == (60, 90)


def test_auto_class_for_mask_generation_loads_a_tracker_alone(tracker, tmp_path):
    tracker.save_pretrained(tmp_path)

    loaded = AutoModelForMaskGeneration.from_pretrained(tmp_path)

    assert isinstance(loaded, EfficientSam3TrackerModel)


def test_a_configuration_without_tracker_is_refused():
    config = tiny_model().config
    config.tracker_config = None

    with pytest.raises(ValueError, match="has no tracker_config"):
        EfficientSam3TrackerModel(config)
