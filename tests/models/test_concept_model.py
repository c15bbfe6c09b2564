"""The concept model: prompts of every kind, reuse of features, parity with transformers."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY_CLIP, TINY_VIT, TRUNKS, WIDTH, tiny_config, tiny_model, tiny_vision
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Sam3Config, Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput

from efficientsam3_hf import EfficientSam3Model

FIELDS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
BOXES = torch.tensor([[[0.4, 0.5, 0.3, 0.2], [0.7, 0.2, 0.1, 0.3]]])
POINTS = torch.tensor([[[0.3, 0.6], [0.8, 0.1]]])
LABELS = torch.tensor([[1, 0]])


def pixels(count: int = 1, size: int = 112) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


def phrases(count: int = 1, length: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1000, 40000, (count, length), generator=generator)
    mask = torch.ones(count, length, dtype=torch.long)
    for row in range(count):
        end = 4 + row % 3
        ids[row, end] = 49407
        ids[row, end + 1 :] = 0
        mask[row, end + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def rows(outputs: Any, index: int | slice | list[int]) -> dict[str, Tensor]:
    index = [index] if isinstance(index, int) else index
    return {field: outputs[field][index] for field in FIELDS}


def assert_same(outputs: Any, expected: Any, atol: float = 1e-5) -> None:
    for field in FIELDS:
        torch.testing.assert_close(outputs[field], expected[field], atol=atol, rtol=1e-4)


@pytest.fixture(scope="module")
def stock_pair() -> tuple[Sam3Model, EfficientSam3Model]:
    """transformers' SAM 3, and ours with its weights."""
    ours = tiny_model(TINY_VIT, TINY_CLIP)
    parts = ours.config.to_dict()
    names = Sam3Config.sub_configs_defaults
    stock = Sam3Model(Sam3Config(**{name: parts[name] for name in names})).eval()
    missing, _ = stock.load_state_dict(ours.state_dict(), strict=False)
    assert missing == []
    return stock, ours


@torch.no_grad()
def test_box_prompts_equal_those_of_transformers(stock_pair):
    stock, ours = stock_pair
    inputs = {"pixel_values": pixels(), **phrases(), "input_boxes": BOXES}

    assert_same(
        ours(**inputs, input_boxes_labels=LABELS), stock(**inputs, input_boxes_labels=LABELS)
    )


@torch.no_grad()
def test_padded_boxes_equal_those_of_transformers(stock_pair):
    stock, ours = stock_pair
    inputs = {"pixel_values": pixels(2), **phrases(2), "input_boxes": BOXES.expand(2, -1, -1)}
    inputs["input_boxes_labels"] = torch.tensor([[1, 0], [1, -10]])

    assert_same(ours(**inputs), stock(**inputs))


@torch.no_grad()
def test_text_alone_equals_transformers_only_without_the_geometry_token(stock_pair):
    stock, ours = stock_pair
    inputs = {"pixel_values": pixels(2), **phrases(2)}
    as_in_transformers = copy.deepcopy(ours)
    as_in_transformers.config.always_encode_geometry = False

    expected = stock(**inputs)

    assert_same(as_in_transformers(**inputs), expected)
    assert (ours(**inputs).pred_logits - expected.pred_logits).abs().max() > 1e-3


@torch.no_grad()
def test_a_phrase_is_the_same_beside_exemplars_of_others(model):
    model = copy.deepcopy(model)
    model.config.always_encode_geometry = False
    both = {"pixel_values": pixels(2), **phrases(2)}
    boxes, labels = BOXES.expand(2, -1, -1), torch.tensor([[1, 0], [-10, -10]])

    together = model(**both, input_boxes=boxes, input_boxes_labels=labels)

    alone = model(**both)
    with_boxes = model(**both, input_boxes=boxes, input_boxes_labels=LABELS.expand(2, -1))
    assert_same(rows(together, 1), rows(alone, 1))
    assert_same(rows(together, 0), rows(with_boxes, 0))


@torch.no_grad()
def test_text_prompt_carries_the_class_token_of_the_geometry_encoder(model):
    inputs = {"pixel_values": pixels(), **phrases()}
    calls = []
    handle = model.detr_encoder.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs), with_kwargs=True
    )

    model(**inputs)

    handle.remove()
    assert calls[0]["text_features"].shape[1] == 16 + 1
    assert calls[0]["text_mask"][0].tolist() == [True] * 5 + [False] * 11 + [True]


@pytest.mark.parametrize("kinds", [(), ("boxes",), ("points",), ("boxes", "points")])
@torch.no_grad()
def test_every_prompt_kind_gives_finite_instances(model, kinds: tuple[str, ...]):
    exemplars: dict[str, Tensor] = {}
    if "boxes" in kinds:
        exemplars |= {"input_boxes": BOXES, "input_boxes_labels": LABELS}
    if "points" in kinds:
        exemplars |= {"input_points": POINTS, "input_points_labels": LABELS}

    outputs = model(pixel_values=pixels(), **phrases(), **exemplars)

    assert isinstance(outputs, Sam3ImageSegmentationOutput)
    assert outputs.pred_masks.shape == (1, 5, 32, 32)
    assert outputs.pred_boxes.shape == (1, 5, 4)
    assert outputs.pred_logits.shape == (1, 5)
    assert outputs.presence_logits.shape == (1, 1)
    assert outputs.semantic_seg.shape == (1, 1, 32, 32)
    assert all(outputs[field].isfinite().all() for field in FIELDS)


@pytest.mark.parametrize("kind", ["boxes", "points"])
@torch.no_grad()
def test_place_and_label_of_an_exemplar_matter(model, kind: str):
    inputs = {"pixel_values": pixels(), **phrases()}
    exemplars = BOXES[:, :1] if kind == "boxes" else POINTS[:, :1]
    positive, negative = LABELS[:, :1], LABELS[:, 1:]

    def run(where: Tensor, label: Tensor) -> Tensor:
        return model(
            **inputs, **{f"input_{kind}": where, f"input_{kind}_labels": label}
        ).pred_logits

    base = run(exemplars, positive)

    assert (run(exemplars, negative) - base).abs().max() > 1e-4
    assert (run(exemplars * 0.5, positive) - base).abs().max() > 1e-4


@torch.no_grad()
def test_padding_among_exemplars_changes_nothing(model):
    inputs = {"pixel_values": pixels(), **phrases()}
    filler = torch.full((1, 1, 4), 0.9)

    expected = model(**inputs, input_boxes=BOXES, input_boxes_labels=LABELS)

    padded = model(
        **inputs,
        input_boxes=torch.cat([BOXES[:, :1], filler, BOXES[:, 1:]], dim=1),
        input_boxes_labels=torch.tensor([[1, -10, 0]]),
    )
    assert_same(padded, expected)


@torch.no_grad()
def test_exemplars_without_labels_are_positive(model):
    inputs = {"pixel_values": pixels(), **phrases(), "input_points": POINTS}

    assert_same(model(**inputs), model(**inputs, input_points_labels=torch.ones_like(LABELS)))


@torch.no_grad()
def test_several_phrases_for_one_image_run_the_vision_encoder_once(model):
    calls = []
    handle = model.vision_encoder.register_forward_hook(lambda *args: calls.append(args))
    text = phrases(3)

    together = model(pixel_values=pixels(), **text)

    handle.remove()
    assert len(calls) == 1
    for index in range(3):
        alone = model(
            pixel_values=pixels(),
            **{name: value[index : index + 1] for name, value in text.items()},
        )
        assert_same(rows(together, index), alone)


@torch.no_grad()
def test_image_indices_say_which_image_a_prompt_is_about(model):
    images, text = pixels(2), phrases(3)
    boxes = BOXES.expand(3, -1, -1)
    where = torch.tensor([1, 0, 1])

    together = model(pixel_values=images, **text, input_boxes=boxes, image_indices=where)

    for index, image in enumerate(where.tolist()):
        one = {name: value[index : index + 1] for name, value in text.items()}
        alone = model(pixel_values=images[image : image + 1], **one, input_boxes=BOXES)
        assert_same(rows(together, index), alone)


@torch.no_grad()
def test_one_phrase_serves_many_images(model):
    images, text = pixels(3), phrases(1)

    together = model(pixel_values=images, **text)

    assert len(together.pred_logits) == 3
    assert_same(rows(together, 2), model(pixel_values=images[2:], **text))


@torch.no_grad()
def test_batch_equals_one_by_one(model):
    images, text = pixels(3), phrases(3)
    inputs = {
        "input_boxes": BOXES.expand(3, -1, -1),
        "input_boxes_labels": torch.tensor([[1, 0], [1, -10], [-10, -10]]),
    }

    together = model(pixel_values=images, **text, **inputs)

    for index in range(3):
        one = {name: value[index : index + 1] for name, value in {**text, **inputs}.items()}
        assert_same(rows(together, index), model(pixel_values=images[index : index + 1], **one))


@torch.no_grad()
def test_text_features_are_computed_once_saved_and_reused(model, tmp_path):
    text = phrases(2)
    expected = model(pixel_values=pixels(2), **text)
    features = model.get_text_features(**text)

    save_file(dict(features), tmp_path / "vocabulary.safetensors")
    stored = load_file(tmp_path / "vocabulary.safetensors")

    assert_same(model(pixel_values=pixels(2), text_embeds=features), expected)
    assert_same(model(pixel_values=pixels(2), text_embeds=stored), expected)
    tensor = {"text_embeds": features.pooler_output, "attention_mask": text["attention_mask"]}
    assert_same(model(pixel_values=pixels(2), **tensor), expected)


@torch.no_grad()
def test_vision_features_are_computed_once_and_reused(model):
    text = phrases(2)
    expected = model(pixel_values=pixels(2), **text)

    features = model.get_vision_features(pixels(2))

    assert_same(model(vision_embeds=features, **text), expected)
    assert_same(model(vision_embeds=features.fpn_hidden_states, **text), expected)
    assert_same(model(vision_embeds=features.fpn_hidden_states[:3], **text), expected)


@torch.no_grad()
def test_vision_features_are_saved_and_reused(model, tmp_path):
    text = phrases(2)
    expected = model(pixel_values=pixels(2), **text)
    levels = model.get_vision_features(pixels(2)).fpn_hidden_states[:3]

    # safetensors takes no tensor in channels-last order, in which maps of the `sam3` neck are.
    levels = {f"level_{i}": level.contiguous() for i, level in enumerate(levels)}
    save_file(levels, tmp_path / "image.safetensors")
    stored = load_file(tmp_path / "image.safetensors")

    levels = [stored[f"level_{i}"] for i in range(3)]
    assert_same(model(vision_embeds=levels, **text), expected)
    assert_same(model(vision_embeds={"fpn_hidden_states": levels}, **text), expected)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda x: {"vision_embeds": x.fpn_hidden_states[2::-1]}, "finest first, not of shapes"),
        (lambda x: {"vision_embeds": [y[0] for y in x.fpn_hidden_states]}, "finest first, not of"),
        (lambda x: {"vision_embeds": [y.half() for y in x.fpn_hidden_states]}, "torch.float16, bu"),
        (lambda x: {"vision_embeds": {"last_hidden_state": x.last_hidden_state}}, "but no fpn_hid"),
        (
            lambda x: {"vision_embeds": x, "text_embeds": {"last_hidden_state": torch.zeros(1)}},
            r"holds \['last_hidden_state'\], but no pooler_output",
        ),
        (
            lambda x: {"vision_embeds": x, "text_embeds": torch.zeros(1, 16, WIDTH).bfloat16()},
            r"text_embeds are torch.bfloat16, but the model is torch.float32: convert them with",
        ),
    ],
)
def test_features_that_do_not_fit_are_errors_that_say_why(model, features, message):
    given = features(model.get_vision_features(pixels()))
    text = {} if "text_embeds" in given else phrases()

    with pytest.raises(ValueError, match=message):
        model(**given, **text)


@torch.no_grad()
def test_features_of_lower_precision_go_with_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        features = [x.bfloat16() for x in model.get_vision_features(pixels()).fpn_hidden_states]
        outputs = model(vision_embeds=features, **phrases())

    assert outputs.pred_masks.isfinite().all()


@torch.no_grad()
def test_what_a_trainer_says_of_a_batch_is_taken(model):
    outputs = model(pixel_values=pixels(), **phrases(), num_items_in_batch=torch.tensor(1))

    assert_same(outputs, model(pixel_values=pixels(), **phrases()))


def test_too_few_maps_are_no_pyramid(model):
    levels = model.get_vision_features(pixels()).fpn_hidden_states

    with pytest.raises(ValueError, match="holds 1 maps, not the three"):
        model(vision_embeds=levels[:1], **phrases())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": torch.zeros(1, 32, 32)}, ValueError, "one dictionary for each prompt"),
        ({"input_box": BOXES}, TypeError, "has no argument 'input_box'"),
    ],
)
def test_arguments_that_nothing_would_read_are_errors(model, options, error, message):
    with pytest.raises(error, match=message):
        model(pixel_values=pixels(), **phrases(), **options)


@torch.no_grad()
def test_features_are_left_as_they_were(model):
    features = model.get_vision_features(pixels())
    before = [level.clone() for level in features.fpn_hidden_states]

    model(vision_embeds=features, **phrases())

    assert all(torch.equal(a, b) for a, b in zip(before, features.fpn_hidden_states, strict=True))


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("neck", ["sam3", "lateral"])
@torch.no_grad()
def test_every_trunk_and_neck_takes_other_sizes(neck: str, trunk: str):
    model = tiny_model(tiny_vision(neck, trunk))

    for size in (96, 160):
        outputs = model(pixel_values=pixels(1, size), **phrases())
        grid = size // model.config.vision_config.backbone_config.patch_size
        assert outputs.pred_masks.shape[-2:] == (4 * grid, 4 * grid)


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("neck", ["sam3", "lateral"])
@torch.no_grad()
def test_tiny_models_see_the_image(neck: str, trunk: str):
    model = tiny_model(tiny_vision(neck, trunk))
    size = model.config.image_size

    noise = model(pixel_values=pixels(1, size), **phrases())
    grey = model(pixel_values=torch.zeros(1, 3, size, size), **phrases())

    # Else no other test of these models would see a mistake in an image's way through them.
    for field in ("pred_logits", "pred_masks", "semantic_seg", "pred_boxes"):
        assert (noise[field] - grey[field]).abs().max() > 0.01, field


@torch.no_grad()
def test_the_vit_takes_its_configured_size_only():
    model = tiny_model(TINY_VIT, TINY_CLIP)

    with pytest.raises(ValueError, match="takes 112 x 112, not 96 x 96"):
        model(pixel_values=pixels(1, 96), **phrases())

    config = tiny_config(TINY_VIT, TINY_CLIP)
    config.image_size = 168
    bigger = EfficientSam3Model(config).eval()
    assert bigger(pixel_values=pixels(1, 168), **phrases()).pred_masks.shape[-1] == 48
    model.config.image_size = 168  # changes no model that is built
    with pytest.raises(ValueError, match="takes 112 x 112, not 168 x 168"):
        model(pixel_values=pixels(1, 168), **phrases())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_runs_every_prompt_kind(dtype: torch.dtype):
    model = tiny_model(tiny_vision("lateral", "repvit_m0_9"))
    inputs = {**phrases(), "input_boxes": BOXES, "input_points": POINTS}
    expected = model(pixel_values=pixels(1, 128), **inputs)

    outputs = model.to(dtype)(pixel_values=pixels(1, 128), **inputs)

    assert outputs.pred_masks.dtype == dtype
    error = (outputs.pred_masks.float() - expected.pred_masks).norm() / expected.pred_masks.norm()
    assert error < 0.15


@torch.no_grad()
def test_eager_attention_equals_sdpa(model, tmp_path):
    model.save_pretrained(tmp_path)
    eager = EfficientSam3Model.from_pretrained(tmp_path, attn_implementation="eager").eval()
    inputs = {"pixel_values": pixels(), **phrases(), "input_boxes": BOXES}

    assert eager.geometry_encoder.config._attn_implementation == "eager"
    assert_same(eager(**inputs), model(**inputs), atol=1e-4)


@torch.no_grad()
def test_compiled_model_gives_the_same(model):
    torch._dynamo.reset()
    inputs = {"pixel_values": pixels(), **phrases(), "input_boxes": BOXES}

    compiled = torch.compile(model, backend="aot_eager")(**inputs)

    assert_same(compiled, model(**inputs), atol=1e-4)


def test_training_reaches_every_weight_that_can_be_trained():
    model = tiny_model().train()

    outputs = model(pixel_values=pixels(2), **phrases(2), input_boxes=BOXES, input_points=POINTS)
    sum(outputs[field].square().mean() for field in FIELDS).backward()

    without = {
        name.rsplit(".", 1)[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    }
    assert without == {
        "text_encoder.projection",  # pooled features, for other uses
        "mask_decoder.pixel_decoder.conv_layers.2",  # SAM 3 builds three stages and runs two
        "mask_decoder.pixel_decoder.norms.2",
    }


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny_model()  # in evaluation mode: no dropout, no statistics
    calls = []
    convolution = [m for m in model.vision_encoder.modules() if isinstance(m, torch.nn.Conv2d)][20]
    convolution.register_forward_pre_hook(lambda *args: calls.append(args))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Dropout):
                    module.eval()
        model.zero_grad()
        model(pixel_values=pixels(), **phrases()).pred_masks.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        gradients[-1] = {name: gradient.clone() for name, gradient in gradients[-1].items()}

    assert len(calls) == 1 + 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_hidden_states_and_attentions_of_the_parts_are_returned(model):
    outputs = model(pixel_values=pixels(), **phrases(), output_hidden_states=True, return_dict=True)

    assert len(outputs.vision_hidden_states) == 4
    assert outputs.encoder_hidden_states[-1].shape == (1, 64, WIDTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "exactly one of pixel_values or vision_embeds"),
        ({"input_ids": None}, "exactly one of input_ids or text_embeds"),
        ({"vision_embeds": torch.zeros(1)}, "exactly one of pixel_values or vision_embeds"),
        ({"input_boxes": torch.zeros(1, 2, 3)}, r"must be \(prompts, count, 4\), not \(1, 2, 3\)"),
        ({"input_points": torch.zeros(2, 2)}, r"must be \(prompts, count, 2\), not \(2, 2\)"),
        (
            {"input_boxes": BOXES, "input_boxes_labels": torch.ones(1, 3)},
            r"box labels \(1, 3\) do not fit \(1, 2\)",
        ),
        ({"input_boxes": BOXES.expand(3, -1, -1)}, "3 prompts do not fit 2 images"),
        (
            {"attention_mask": torch.ones(2, 9)},
            r"attention_mask \(2, 9\) does not fit input_ids \(2, 16\)",
        ),
        ({"image_indices": torch.tensor([0])}, "names 1 images for 2 prompts"),
        ({"image_indices": torch.tensor([0, -1])}, "names image -1 of 2"),
        ({"image_indices": torch.tensor([5, 0])}, "names image 5 of 2"),
        ({"image_indices": torch.tensor([0.0, 1.0])}, "whole numbers, one for each prompt, not"),
        ({"image_indices": torch.tensor([[0, 1]])}, r"not torch.int64 of shape \(1, 2\)"),
        ({"input_boxes": BOXES * torch.nan}, "'box' hold numbers that are not finite"),
        ({"input_points": POINTS / 0}, "'point' hold numbers that are not finite"),
        (
            {"input_boxes": BOXES, "input_boxes_labels": torch.tensor([[5, 1]])},
            r"'box' are 1, 0, or -10 for padding, not \[5\]",
        ),
        ({"input_boxes_labels": LABELS}, "labels of kind 'box', but none"),
        ({"input_points_labels": LABELS}, "labels of kind 'point', but none"),
        ({"pixel_values": torch.zeros(3, 112, 112)}, r"3, height, width\).*not \(3, 112, 112\)"),
        ({"pixel_values": torch.zeros(1, 4, 112, 112)}, "must be .images, 3, height, width"),
    ],
)
def test_inputs_that_do_not_fit_are_errors_that_say_why(model, change, message):
    inputs = {"pixel_values": pixels(2), **phrases(2), **change}

    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_a_single_tensor_is_no_pyramid(model):
    with pytest.raises(TypeError, match="not a single tensor"):
        model(vision_embeds=torch.zeros(1, 64, WIDTH), **phrases())


def test_a_mask_that_does_not_fit_text_features_is_an_error(model):
    with pytest.raises(ValueError, match="does not fit text features"):
        model(
            pixel_values=pixels(),
            text_embeds=torch.zeros(1, 16, WIDTH),
            attention_mask=torch.ones(1, 9),
        )


def test_text_features_of_another_width_are_an_error(model):
    with pytest.raises(ValueError, match=r"must be \(prompts, length, 32\)"):
        model(pixel_values=pixels(), text_embeds=torch.zeros(1, 16, 31))
