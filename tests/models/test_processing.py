"""The processor of the concept model: prompts in every shape, odd images, errors, results."""

import copy
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import Sam3ImageProcessor
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput

from efficientsam3_hf import EfficientSam3ImageProcessor
from efficientsam3_hf.models.image_processing_efficientsam3 import MASKS_AT_ONCE, resize_masks
from efficientsam3_hf.models.prompts import check_box, clean_phrase

WIDE = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
TALL = np.random.default_rng(1).integers(0, 255, (40, 20, 3), dtype=np.uint8)
CAT, DOG = [49406, 2368, 49407], [49406, 1929, 49407]


def valid_ids(inputs, row: int = 0) -> list[int]:
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


def test_pixels_are_those_of_the_reference(processor):
    inputs = processor(images=WIDE)

    resize = v2.Resize((112, 112))  # bilinear with antialiasing, on 8-bit values
    expected = (resize(torch.from_numpy(WIDE).permute(2, 0, 1)).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(inputs["pixel_values"][0], expected)
    assert inputs["original_sizes"].tolist() == [[60, 90]]


def test_one_phrase_for_one_image(processor):
    inputs = processor(images=WIDE, text="Cat")

    assert inputs["input_ids"].shape == (1, 16)
    assert valid_ids(inputs) == CAT
    assert (inputs["input_ids"][0, 3:] == 0).all()
    assert "image_indices" not in inputs


def test_one_phrase_for_each_image(processor):
    inputs = processor(images=[WIDE, TALL], text=["cat", "dog"])

    assert [valid_ids(inputs, row) for row in range(2)] == [CAT, DOG]
    assert inputs["original_sizes"].tolist() == [[60, 90], [40, 20]]


def test_one_phrase_for_all_images(processor, model):
    inputs = processor(images=[WIDE, TALL], text="cat")

    with torch.no_grad():
        outputs = model(**inputs)
    results = processor.post_process_instance_segmentation(
        outputs, threshold=0, target_sizes=inputs["original_sizes"]
    )

    assert inputs["input_ids"].shape == (1, 16)
    assert [tuple(result["masks"].shape) for result in results] == [(5, 60, 90), (5, 40, 20)]


def test_several_phrases_for_one_image(processor, model):
    inputs = processor(images=WIDE, text=["cat", "dog", "a red car"])

    with torch.no_grad():
        outputs = model(**inputs)

    assert len(outputs.pred_logits) == 3
    assert inputs["original_sizes"].tolist() == [[60, 90]] * 3


def test_a_list_of_phrases_for_each_image(processor, model):
    inputs = processor(
        images=[WIDE, TALL],
        text=[["cat", "dog"], [None]],
        input_boxes=[[None, [[9, 6, 45, 30], [0, 0, 90, 60]]], [[[5, 10, 15, 30]]]],
        input_boxes_labels=[[None, [1, 0]], [[1]]],
    )

    assert inputs["image_indices"].tolist() == [0, 0, 1]
    assert inputs["original_sizes"].tolist() == [[60, 90], [60, 90], [40, 20]]
    assert valid_ids(inputs, 2) == [49406, 7195, 49407]  # "visual"
    assert inputs["input_boxes_labels"].tolist() == [[-10, -10], [1, 0], [1, -10]]
    torch.testing.assert_close(inputs["input_boxes"][1, 0], torch.tensor([0.3, 0.3, 0.4, 0.4]))
    torch.testing.assert_close(inputs["input_boxes"][2, 0], torch.tensor([0.5, 0.5, 0.5, 0.5]))
    with torch.no_grad():
        assert len(model(**inputs).pred_logits) == 3


def test_boxes_alone_go_with_the_phrase_visual(processor):
    inputs = processor(images=WIDE, input_boxes=[[[9, 6, 45, 30]]])

    assert valid_ids(inputs) == [49406, 7195, 49407]
    assert inputs["input_boxes_labels"].tolist() == [[1]]


def test_points_are_shares_of_their_image(processor):
    inputs = processor(
        images=[WIDE, TALL],
        text="cat",
        input_points=[[[45, 30], [0, 60]], [[10, 10]]],
        input_points_labels=[[1, 0], [0]],
    )

    torch.testing.assert_close(
        inputs["input_points"], torch.tensor([[[0.5, 0.5], [0, 1]], [[0.5, 0.25], [0.5, 0.5]]])
    )
    assert inputs["input_points_labels"].tolist() == [[1, 0], [0, -10]]


def test_tensors_and_arrays_are_as_good_as_lists(processor):
    boxes = [[[9.0, 6.0, 45.0, 30.0]]]
    expected = processor(images=WIDE, input_boxes=boxes, input_boxes_labels=[[0]])

    for convert in (torch.tensor, np.array):
        inputs = processor(
            images=WIDE, input_boxes=convert(boxes), input_boxes_labels=convert([[0]])
        )
        assert torch.equal(inputs["input_boxes"], expected["input_boxes"])
        assert torch.equal(inputs["input_boxes_labels"], expected["input_boxes_labels"])


def test_prompts_for_vision_features_at_hand(processor):
    inputs = processor(text="cat", input_boxes=[[[9, 6, 45, 30]]], original_sizes=[(60, 90)])

    assert "pixel_values" not in inputs
    torch.testing.assert_close(inputs["input_boxes"][0, 0], torch.tensor([0.3, 0.3, 0.4, 0.4]))


def test_a_box_that_leaves_its_image_is_clipped():
    assert check_box([-5, 10, 200, 30], (60, 90)) == [0, 10, 90, 30]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"text": "  "}, "phrase is empty"),
        ({"text": ["cat", ""]}, "phrase is empty"),
        ({"text": [None]}, "Prompt 0 has no phrase, no boxes and no points"),
        ({"input_boxes": [[[5, 5, 5, 9]]]}, r"\[5.0, 5.0, 5.0, 9.0\] has no area"),
        ({"input_boxes": [[[9, 9, 5, 5]]]}, "has no area"),
        ({"input_boxes": [[[100, 0, 120, 9]]]}, "outside the image of 90 x 60 pixels"),
        ({"input_boxes": [[[1, 2, 3]]]}, r"4 numbers \(x1, y1, x2, y2\), not 3"),
        ({"input_boxes": [[[1, 2, 3, float("inf")]]]}, "not finite"),
        ({"input_points": [[[91, 2]]]}, "outside the image of 90 x 60 pixels"),
        (
            {"input_boxes": [[[1, 2, 3, 4]]], "input_boxes_labels": [[2]]},
            r"Label 2 of a box is none of \[0, 1, -10\]",
        ),
        (
            {"input_boxes": [[[1, 2, 3, 4]]], "input_boxes_labels": [[1, 0]]},
            "2 labels do not fit 1",
        ),
        (
            {"input_points": [[[1, 2]]], "input_points_labels": [[1], [1]]},
            "labels for 2 prompts do not fit 1",
        ),
        (
            {"text": ["a", "b", "c"], "input_boxes": [[[1, 2, 3, 4]], [[1, 2, 3, 4]]]},
            "for 2 prompts do not fit 3 prompts",
        ),
        ({"text": [["cat"], ["dog"]]}, "2 lists of phrases do not fit 1 images"),
        ({"text": [["cat"], "dog"]}, "list of phrases for every image, or for none"),
        (
            {"text": [["cat", "dog"]], "input_boxes": [[None]]},
            r"\[1\] .* do not fit text for \[2\]",
        ),
        ({"text": "cat", "return_tensors": "np"}, "must be 'pt'"),
        ({"text": []}, "text is empty"),
        ({"text": [[]]}, "no phrase for any image"),
        ({"input_boxes": []}, "input_boxes is empty"),
        ({"input_points": []}, "input_points is empty"),
        ({"input_boxes": [[]]}, "Prompt 0 has no phrase, no boxes and no points"),
        ({"input_boxes": [[1, 2, 3, 4]]}, r"A box must be a list of numbers .*, not 1"),
        ({"input_boxes": [[[[1, 2, 3, 4]]]]}, r"lists of lists .* so has text: \[\[None\], \[None"),
        ({"text": "cat", "input_boxes": [5]}, "Prompt 0 has 5 in place of a list"),
        (
            {"text": [["cat"]], "input_boxes": [[[[[1, 2, 3, 4]]]]]},
            "Prompt 0 has lists of lists of kind 'box'",
        ),
        (
            {"text": ["a", "b"], "input_boxes": [[[1, 2, 3, 4]], None, None]},
            "text for 2 prompts do not fit 3 prompts",
        ),
        ({"input_boxes": [[[5, 5, None, 20]]]}, r"list of numbers .*, not \[5, 5, None, 20\]"),
        ({"input_boxes": [[["x", 5, 9, 20]]]}, "A box must be a list of numbers"),
        ({"input_boxes": [[[5, "5", 9, 20]]]}, "A box must be a list of numbers"),
        ({"text": "cat", "input_boxes": [[]], "input_boxes_labels": [[1]]}, "1 labels do not fit"),
        ({"text": "cat", "input_boxes_labels": [[1]]}, "there are no input_boxes"),
        ({"text": "cat", "input_points_labels": [[1]]}, "there are no input_points"),
        (
            {"input_boxes": [[[1, 2, 3, 4]]], "input_boxes_labels": [1]},
            "must be a list for each prompt, not 1",
        ),
        ({"text": "cat", "original_sizes": [(60, 90)]}, "images or original_sizes, not both"),
    ],
)
def test_prompts_that_make_no_sense_are_errors_that_say_why(processor, prompt, message):
    with pytest.raises(ValueError, match=message):
        processor(images=WIDE, **prompt)


BOX = [[[1, 2, 3, 4]]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": "a", "input_box": BOX}, TypeError, "has no argument 'input_box'"),
        ({"images": WIDE, "input_box": BOX}, TypeError, "has no argument 'input_box'"),
        ({"text": "a", "max_length": 4}, TypeError, "has no argument 'max_length'"),
        ({"text": "a", "do_rescale": False}, TypeError, "has no argument 'do_rescale'.*are images"),
        ({"text": "a", "segmentation_maps": TALL}, ValueError, "segmentation_maps go with images"),
        ({"text": 3}, TypeError, "text must be a phrase or a list of them, not int: 3"),
        ({"text": {"a": 1}}, TypeError, "text must be a phrase or a list of them, not dict"),
        ({"images": WIDE, "input_boxes": 5}, TypeError, "input_boxes must be nested lists"),
        (
            {"images": WIDE, "input_boxes": BOX, "input_boxes_labels": 1},
            TypeError,
            "input_boxes_labels must be nested lists or a tensor, not int: 1",
        ),
        *(
            ({"text": "a", "original_sizes": sizes}, ValueError, r"be a list of \(height, width\)")
            for sizes in [(40, 60), [], [[3, 40, 60]], [(0, 60)], 40, ["ab"]]
        ),
    ],
)
def test_arguments_of_the_wrong_kind_are_errors_that_say_why(processor, arguments, error, message):
    with pytest.raises(error, match=message):
        processor(**arguments)


def test_arrays_of_phrases_are_lists(processor):
    inputs = processor(images=WIDE, text=[np.array(["cat", "dog"])])

    assert [valid_ids(inputs, row) for row in range(2)] == [CAT, DOG]
    assert inputs["image_indices"].tolist() == [0, 0]


@torch.no_grad()
def test_lists_without_exemplars_are_no_prompts(processor, model):
    inputs = processor(images=WIDE, text="cat", input_boxes=[[], []], input_points=[None, None])

    assert not {"input_boxes", "input_boxes_labels", "input_points"} & set(inputs)
    assert len(model(**inputs).pred_logits) == len(inputs["original_sizes"]) == 1


def test_one_list_of_exemplars_and_of_labels_goes_with_all_prompts(processor):
    inputs = processor(
        images=[WIDE, TALL],
        text=["cat", "dog"],
        input_boxes=[[[9, 6, 18, 30]]],
        input_boxes_labels=[[0]],
        input_points=[[[9, 6]], [[10, 10]]],
        input_points_labels=[[0]],
    )

    assert inputs["input_boxes_labels"].tolist() == [[0], [0]]
    assert inputs["input_points_labels"].tolist() == [[0], [0]]
    torch.testing.assert_close(inputs["input_boxes"][:, 0, 0], torch.tensor([0.15, 0.675]))


def test_no_images_at_all_are_an_error(processor):
    with pytest.raises(ValueError, match="images is empty"):
        processor(images=[], text="cat")


def test_a_box_that_is_labelled_as_padding_may_lie_anywhere(processor):
    inputs = processor(
        images=WIDE,
        input_boxes=[[[9, 6, 45, 30], [-10, -10, -10, -10]]],
        input_boxes_labels=[[0, -10]],
    )

    assert inputs["input_boxes_labels"].tolist() == [[0, -10]]
    assert inputs["input_boxes"].isfinite().all()


def test_an_image_of_several_may_have_no_phrase(processor):
    inputs = processor(images=[WIDE, TALL], text=[["cat", "dog"], []])

    assert inputs["image_indices"].tolist() == [0, 0]


def test_inputs_move_to_a_device_and_a_precision(processor, model):
    inputs = processor(images=WIDE, text="cat", input_boxes=[[[9, 6, 45, 30]]])

    inputs = inputs.to("cpu", torch.bfloat16)

    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64
    with torch.no_grad():
        outputs = copy.deepcopy(model).to(torch.bfloat16)(**inputs)
    assert outputs.pred_boxes.isfinite().all()


def test_prompts_that_fit_no_number_of_images_are_an_error(processor):
    with pytest.raises(ValueError, match="3 prompts do not fit 2 images"):
        processor(images=[WIDE, TALL], text=["a", "b", "c"])


def test_boxes_without_an_image_are_an_error(processor):
    with pytest.raises(ValueError, match="need images, or original_sizes"):
        processor(text="cat", input_boxes=[[[1, 2, 3, 4]]])


def test_a_phrase_must_be_a_string(processor):
    with pytest.raises(TypeError, match="must be a string, not int: 7"):
        processor(text=[7])


def test_a_phrase_too_long_keeps_its_end_token_and_warns_once(processor, caplog, package_log):
    phrase = "the small striped cat sitting on top of the old wooden kitchen table near the window"

    with caplog.at_level(logging.WARNING, logger=package_log.name):
        inputs = processor(text=phrase)
        processor(text=f"another and {phrase}")

    assert inputs["input_ids"].shape == (1, 16)
    assert inputs["input_ids"][0, -1] == 49407
    assert inputs["attention_mask"].all()
    assert caplog.text.count("longer than the context of 16 tokens") == 1


@pytest.mark.parametrize(
    ("phrase", "cleaned"),
    [
        ("  Two\n\tSpaces ", "two spaces"),
        ("Tom &amp;amp; Jerry", "tom & jerry"),
        ("schÃ¶n", "schön"),  # UTF-8 read as Latin-1
        ("“smart” quotes", '"smart" quotes'),
        ("ﬁsh", "fish"),
    ],
)
def test_phrases_are_cleaned_as_in_the_reference(phrase: str, cleaned: str):
    assert clean_phrase(phrase) == cleaned


def test_the_pad_token_of_clip_is_still_an_exclamation_mark(processor):
    inputs = processor(text="stop!")

    assert valid_ids(inputs) == [49406, 1691, 256, 49407]


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16", "I"])
def test_images_of_every_kind_show_the_same(processor, mode: str):
    grey = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    if mode == "1":
        grey = (grey > 127).astype(np.uint8) * 255
    expected = processor(images=np.stack([grey] * 3, axis=-1))["pixel_values"]
    if mode.startswith("I"):
        image = Image.fromarray(grey.astype(np.uint16) * 257).convert(mode)
    else:
        image = Image.fromarray(grey).convert(mode)

    pixels = processor(images=image)["pixel_values"]

    assert image.mode == mode
    torch.testing.assert_close(pixels, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 1), (1, 48, 64), (3, 48, 64), (48, 64, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("as_list", [False, True])
def test_arrays_of_every_shape_and_type_show_the_same(processor, shape, dtype, as_list):
    value = {np.uint8: 51, np.uint16: 51 * 257, np.float32: 51.0}[dtype]
    array = np.full(shape, value, dtype=dtype)
    if shape[-1] == 4:
        array[..., 3] = 255 if dtype == np.float32 else np.iinfo(dtype).max

    pixels = processor(images=[array] if as_list else array)["pixel_values"]

    assert pixels.shape == (1, 3, 112, 112)
    torch.testing.assert_close(pixels, torch.full_like(pixels, -0.6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.int8])
def test_wide_integers_count_from_0_to_255(processor, dtype):
    pixels = processor(images=np.full((48, 64, 3), 51, dtype=dtype))["pixel_values"]

    torch.testing.assert_close(pixels, torch.full_like(pixels, -0.6), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "value"), [(np.int32, 700), (np.int64, -1), (np.int8, -5)])
def test_integers_out_of_range_are_an_error(processor, dtype, value: int):
    with pytest.raises(ValueError, match=f"holds values from {value} to {value}"):
        processor(images=np.full((48, 64, 3), value, dtype=dtype))


def test_a_dark_picture_of_16_bits_stays_dark(processor):
    pixels = processor(images=np.full((48, 64), 200, dtype=np.uint16))["pixel_values"]

    torch.testing.assert_close(pixels, torch.full_like(pixels, -1))


def test_floats_between_0_and_1_are_warned_of(processor, caplog, package_log):
    image = np.full((48, 64, 3), 0.5, dtype=np.float32)
    with caplog.at_level(logging.WARNING, logger=package_log.name):
        pixels = processor(images=image, do_rescale=False)["pixel_values"]
        assert not caplog.text
        processor(images=image)

    torch.testing.assert_close(pixels, torch.zeros_like(pixels))
    assert "Multiply it by 255, or pass do_rescale=False" in caplog.text


def test_pixels_are_checked_also_where_nothing_is_converted(processor):
    image = np.full((48, 64, 3), np.nan, dtype=np.float32)

    with pytest.raises(ValueError, match="NaN or infinite pixels"):
        processor(images=image, do_convert_rgb=False)


def test_transparent_pixels_are_white(processor):
    image = Image.new("RGBA", (64, 48), (255, 0, 0, 0))

    pixels = processor(images=image)["pixel_values"]

    torch.testing.assert_close(pixels, torch.ones_like(pixels))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_an_error(processor, value: float):
    image = np.full((48, 64, 3), 100.0, dtype=np.float32)
    image[3, 5, 1] = value

    with pytest.raises(ValueError, match="NaN or infinite pixels"):
        processor(images=image)


def red(alpha: float, full: float = 1.0, dtype: type = np.float32) -> np.ndarray:
    return np.full((48, 64, 4), [full, 0, 0, alpha * full], dtype=dtype)


def test_transparent_floats_are_laid_over_the_white_of_their_scale(processor):
    as_shares = processor(images=red(0.3), do_rescale=False)["pixel_values"]
    as_bytes = processor(images=red(0.3, full=255))["pixel_values"]

    expected = torch.tensor([1.0, 0.4, 0.4])[:, None, None].expand(3, 112, 112)
    torch.testing.assert_close(as_shares[0], expected)
    torch.testing.assert_close(as_bytes[0], expected)
    unrounded = processor(images=red(0.301, full=255))["pixel_values"]
    torch.testing.assert_close(unrounded[0, 1], torch.full((112, 112), 0.398))


def test_a_file_is_read_with_its_transparency_and_upright(processor, tmp_path):
    path = tmp_path / "picture.png"
    image = Image.fromarray(red(0.3, 255, np.uint8), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(path, exif=exif)

    for source in (path, str(path), [str(path)]):
        inputs = processor(images=source)
        assert inputs["original_sizes"].tolist() == [[64, 48]]
        expected = processor(images=image)["pixel_values"]
        torch.testing.assert_close(inputs["pixel_values"], expected)


def test_nested_lists_and_batches_of_images_are_taken(processor):
    batch = np.stack([WIDE, WIDE])
    expected = processor(images=[WIDE, WIDE])["pixel_values"]

    for images in ([[WIDE], [WIDE]], batch, [batch], torch.from_numpy(batch), ([WIDE], WIDE)):
        assert torch.equal(processor(images=images)["pixel_values"], expected)


def test_a_grey_array_has_no_channels_to_be_last(processor):
    grey = WIDE[..., 0]

    pixels = processor(images=grey, input_data_format="channels_last")["pixel_values"]

    assert torch.equal(pixels, processor(images=grey)["pixel_values"])


NAN = np.full((48, 64, 3), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([[NAN]], ValueError, "NaN or infinite"),
        (np.stack([NAN]), ValueError, "NaN or infinite"),
        ([np.zeros((0, 64, 3), dtype=np.float32)], ValueError, r"shape \(0, 64, 3\) is empty"),
        (np.zeros((0, 64, 3), dtype=np.uint8), ValueError, r"shape \(0, 64, 3\) is empty"),
        (np.zeros((64, 0), dtype=np.int32), ValueError, r"shape \(64, 0\) is empty"),
        (np.zeros((0, 4, 4, 3)), ValueError, "images is empty"),
        ([[]], ValueError, "images is empty"),
        (np.zeros((1, 1, 4, 4, 3)), ValueError, r"besides, not \(1, 1, 4, 4, 3\)"),
        (7, TypeError, "a path, a URL, a PIL image, an array or a tensor, not int"),
        (Image.new("I", (9, 9), 70000), ValueError, "'I' holds values from 70000 to 70000"),
        (Image.new("I", (9, 9), -5), ValueError, "'I' holds values from -5 to -5"),
    ],
)
def test_images_that_make_no_sense_are_errors_that_say_why(processor, images, error, message):
    with pytest.raises(error, match=message):
        processor(images=images)


def test_floats_between_0_and_1_are_warned_of_in_nested_lists_too(processor, caplog, package_log):
    image = np.full((48, 64, 3), 0.4, dtype=np.float32)

    with caplog.at_level(logging.WARNING, logger=package_log.name):
        processor(images=[[image]])

    assert "Multiply it by 255" in caplog.text


def test_every_image_has_a_segmentation_map_or_none_has(processor):
    with pytest.raises(ValueError, match="1 segmentation maps do not fit 2 images"):
        processor(images=[WIDE, WIDE], segmentation_maps=[WIDE[..., 0]])


def test_segmentation_maps_keep_their_labels(processor):
    labels = np.zeros((60, 90), dtype=np.int32)
    labels[:30] = 700

    inputs = processor(images=WIDE, segmentation_maps=labels)

    assert inputs["labels"].shape == (1, 32, 32)
    assert inputs["labels"].unique().tolist() == [0, 700]


def predictions(count: int = 2) -> Sam3ImageSegmentationOutput:
    generator = torch.Generator().manual_seed(3)
    return Sam3ImageSegmentationOutput(
        pred_masks=torch.randn(count, 7, 12, 12, generator=generator) * 3,
        pred_boxes=torch.rand(count, 7, 4, generator=generator),
        pred_logits=torch.randn(count, 7, generator=generator),
        presence_logits=torch.randn(count, 1, generator=generator),
        semantic_seg=torch.randn(count, 1, 12, 12, generator=generator),
    )


def test_results_are_those_of_transformers_where_nothing_is_resized(processor):
    outputs = predictions()

    results = processor.post_process_instance_segmentation(outputs, threshold=0.2)

    expected = Sam3ImageProcessor().post_process_instance_segmentation(outputs, threshold=0.2)
    for result, of_stock in zip(results, expected, strict=True):
        assert torch.equal(result["scores"], of_stock["scores"])
        assert torch.equal(result["boxes"], of_stock["boxes"])
        assert torch.equal(result["masks"], of_stock["masks"].bool())


def test_masks_are_resized_as_logits(processor):
    outputs = predictions(1)

    (result,) = processor.post_process_instance_segmentation(
        outputs, threshold=0, target_sizes=[(37, 50)]
    )

    resized = F.interpolate(outputs.pred_masks, (37, 50), mode="bilinear", align_corners=False)
    assert torch.equal(result["masks"], resized[0] > 0)
    assert result["masks"].dtype == torch.bool
    torch.testing.assert_close(
        result["boxes"], outputs.pred_boxes[0] * torch.tensor([50, 37, 50, 37])
    )


def test_presence_lowers_every_score(processor):
    outputs = predictions(1)
    outputs.presence_logits[:] = -20

    (result,) = processor.post_process_instance_segmentation(outputs, threshold=0.01)

    assert len(result["scores"]) == len(result["masks"]) == 0


def test_many_masks_are_resized_a_few_at_a_time():
    logits = torch.randn(2 * MASKS_AT_ONCE + 3, 8, 8)

    masks = resize_masks(logits, (20, 30), 0.5)

    assert torch.equal(masks, F.interpolate(logits[None], (20, 30), mode="bilinear")[0] > 0)


def test_target_sizes_that_do_not_fit_are_an_error(processor):
    with pytest.raises(ValueError, match="1 target sizes do not fit 2 predictions"):
        processor.post_process_instance_segmentation(predictions(), target_sizes=[(5, 5)])


def test_semantic_map_takes_sizes_as_the_processor_returns_them(processor):
    maps = processor.post_process_semantic_segmentation(
        predictions(), target_sizes=torch.tensor([[20, 30], [10, 8]])
    )

    assert [tuple(one.shape) for one in maps] == [(20, 30), (10, 8)]


def test_object_detection_gives_boxes_and_scores(processor):
    outputs, sizes = predictions(), [(20, 30), (10, 8)]
    outputs.presence_logits[:] = 0

    results = processor.post_process_object_detection(outputs, threshold=0.2, target_sizes=sizes)

    scores = outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid()
    for index, (height, width) in enumerate(sizes):
        keep = scores[index] > 0.2
        assert 0 < keep.sum() < len(keep)
        pixels = outputs.pred_boxes[index][keep] * torch.tensor([width, height, width, height])
        torch.testing.assert_close(results[index]["scores"], scores[index][keep])
        torch.testing.assert_close(results[index]["boxes"], pixels)


def test_image_processor_is_saved_and_loaded(tmp_path):
    processor = EfficientSam3ImageProcessor(size={"height": 504, "width": 504})
    processor.save_pretrained(tmp_path)

    loaded = EfficientSam3ImageProcessor.from_pretrained(tmp_path)

    assert loaded.to_dict() == processor.to_dict()


def test_tensors_give_the_pixels_of_arrays(processor):
    image = torch.from_numpy(WIDE).permute(2, 0, 1)

    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]

    assert isinstance(pixels, Tensor)
    assert torch.equal(pixels, processor(images=WIDE)["pixel_values"])
