"""The zoo: names, sizes, folders."""

import doctest
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import TINY_VIT, tiny_config, tiny_model, tiny_tracker, tiny_vision
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

from efficientsam3_hf import (
    EfficientSam3BackboneConfig,
    EfficientSam3Config,
    EfficientSam3ImageProcessor,
    EfficientSam3Model,
    EfficientSam3Processor,
    EfficientSam3TextConfig,
    EfficientSam3TrackerConfig,
    EfficientSam3TrackerModel,
    EfficientSam3TrackerProcessor,
    EfficientSam3VisionConfig,
    zoo,
)
from efficientsam3_hf.models import from_teacher, image_processing_efficientsam3, prompts, variants

# Parameters of the reference implementation: backbone, projection head.
VISION_PARAMETERS = {
    "efficientvit-s": (682_608, 9_571_328),
    "efficientvit-m": (4_643_936, 9_702_400),
    "efficientvit-l": (14_977_008, 9_833_472),
    "repvit-s": (4_717_792, 9_833_472),
    "repvit-m": (7_774_864, 9_964_544),
    "repvit-l": (22_404_232, 10_095_616),
    "tinyvit-s": (5_071_124, 9_767_936),
    "tinyvit-m": (10_547_076, 9_899_008),
    "tinyvit-l": (20_620_416, 10_030_080),
}
NECK_PARAMETERS = 7_802_112
HEAD_PARAMETERS = {
    "geometry_encoder": 8_215_808,
    "detr_encoder": 9_472_512,
    "detr_decoder": 11_575_093,
    "mask_decoder": 2_298_881,
    "dot_product_scoring": 1_182_976,
}
# Tower with a position table of 77 rows (SAM 3's has 32), width, projection.
TEXT_PARAMETERS = {
    "mobileclip-s0": (42_441_216, 512, 131_328),
    "mobileclip-s1": (63_428_096, 512, 131_328),
    "mobileclip2-l": (123_650_304, 768, 196_864),
    "sam3text": (353_462_272, 1024, 262_400),
}
VIT_PARAMETERS = 446_236_672  # 446.24 M


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def expected_text_parameters(tower: str, context_length: int) -> tuple[int, int]:
    parameters, width, projection = TEXT_PARAMETERS[tower]
    rows = 32 if tower == "sam3text" else 77
    return parameters - (rows - context_length) * width, projection


def test_the_zoo_has_every_pairing():
    names = zoo.names()

    assert len(names) == len(set(names)) == 9 * 4 + 3 + 1
    assert {"efficientsam3-tinyvit-s", "efficientsam3-repvit-m-mobileclip2-l"} < set(names)
    assert {"efficientsam3-efficientvit-l-sam3text", "sam3-litetext-s1", "sam3"} < set(names)


@pytest.mark.parametrize("name", zoo.names())
def test_parameters_equal_those_of_the_reference(name: str):
    with torch.device("meta"):
        model = EfficientSam3Model(zoo.config(name))

    for part, parameters in HEAD_PARAMETERS.items():
        assert count(getattr(model, part)) == parameters, part
    vision = model.vision_encoder
    assert count(vision.neck) == NECK_PARAMETERS
    if name.startswith("efficientsam3-"):
        trunk, head = VISION_PARAMETERS["-".join(name.split("-")[1:3])]
        assert count(vision.backbone.trunk) == trunk
        assert count(vision.backbone.head) == head
        tower = "-".join(name.split("-")[3:]) or "mobileclip-s0"
    else:
        assert count(vision.backbone) == VIT_PARAMETERS
        short = name.removeprefix("sam3-litetext-")
        tower = {"sam3": "sam3text", "l": "mobileclip2-l"}.get(short, f"mobileclip-{short}")
    text, projection = expected_text_parameters(tower, model.config.context_length)
    assert count(model.text_encoder) == text
    assert count(model.text_projection) == projection


@pytest.mark.parametrize("context_length", [16, 32, 77])
@pytest.mark.parametrize("tower", ["mobileclip-s0", "mobileclip-s1", "mobileclip2-l"])
def test_context_lengths_have_names_of_their_own(tower: str, context_length: int):
    suffix = "" if tower == "mobileclip-s0" else f"-{tower}"
    config = zoo.config(f"efficientsam3-repvit-s{suffix}-ctx{context_length}")

    assert config.context_length == config.text_config.max_position_embeddings == context_length
    assert zoo.processor(config).tokenizer.model_max_length == context_length


def test_lateral_variants_have_the_same_heads_and_no_wide_ones():
    with torch.device("meta"):
        model = EfficientSam3Model(zoo.config("efficientsam3-tinyvit-s-lateral"))

    assert count(model.vision_encoder.backbone) == VISION_PARAMETERS["tinyvit-s"][0]
    assert count(model.vision_encoder.neck) < 0.03 * NECK_PARAMETERS
    assert model.config.image_size == 1024


def test_every_variant_has_a_tracker_that_shares_its_trunk():
    config = zoo.config("efficientsam3-efficientvit-s")

    with torch.device("meta"):
        tracker = EfficientSam3TrackerModel(config)

    assert count(tracker.vision_encoder) == sum(VISION_PARAMETERS["efficientvit-s"]) + (
        NECK_PARAMETERS
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("efficientsam3-tinyvit-xs", "efficientsam3-tinyvit-s"),
        ("tinyvit-s", "efficientsam3-tinyvit-s"),
        ("efficientsam3-repvit-m-mobileclip-s2", "efficientsam3-repvit-m-mobileclip-s"),
        ("SAM3", "sam3"),
        ("EfficientSAM3-TinyViT-S", "mean 'efficientsam3-tinyvit-s'[?]"),
        ("SAM3-LiteText-S0-ctx32", "mean 'sam3-litetext-s0-ctx32'[?]"),
        ("efficientsam3-repvit-m-ctx32-lateral", "mean 'efficientsam3-repvit-m-lateral-ctx32'[?]"),
        ("", "efficientsam3_hf.zoo.names"),
        ("zzzzzz", "efficientsam3_hf.zoo.names"),
    ],
)
def test_an_unknown_name_is_an_error_that_suggests_the_nearest(name: str, nearest: str):
    with pytest.raises(ValueError, match=f"There is no variant '{name}'.*{nearest}"):
        zoo.config(name)


def test_an_unknown_context_length_is_an_error():
    with pytest.raises(ValueError, match=r"Context length 24 is none of \(16, 32, 77\)"):
        zoo.config("sam3-litetext-s0-ctx24")


def test_overrides_reach_both_models():
    config = zoo.config("efficientsam3-repvit-s", image_size=504)

    assert config.image_size == config.tracker_config.image_size == 504
    assert config.tracker_config.prompt_encoder_config.image_size == 504
    assert zoo.processor(config).image_processor.size["height"] == 504
    with pytest.raises(TypeError, match="no field 'image_sise'"):
        zoo.config("efficientsam3-repvit-s", image_sise=504)


def test_overrides_of_nested_fields_leave_the_others_as_they_are():
    vision = {"fpn_hidden_size": 256, "backbone_config": {"drop_path_rate": 0.1}}
    config = zoo.config(
        "efficientsam3-tinyvit-s-mobileclip-s1",
        vision_config=vision,
        text_config={"attend_to_padding": False},
        detr_decoder_config={"num_queries": 50},
        context_length=20,
    )

    for vision_config in (config.vision_config, config.tracker_config.vision_config):
        assert vision_config.backbone_config.drop_path_rate == 0.1
        assert vision_config.backbone_config.trunk == "tiny_vit_5m_224"
    assert config.text_config.num_hidden_layers == 12
    assert not config.text_config.attend_to_padding
    assert config.context_length == config.text_config.max_position_embeddings == 20
    assert config.detr_decoder_config.num_queries == 50
    assert zoo.config("sam3").detr_decoder_config.num_queries == 200


def test_an_override_may_be_a_configuration_or_leave_a_part_out():
    vision = zoo.config("efficientsam3-repvit-s").vision_config

    config = zoo.config("efficientsam3-tinyvit-s", vision_config=vision, tracker_config=None)

    assert config.vision_config.backbone_config.trunk == "repvit_m0_9"
    assert config.tracker_config is None


def test_an_override_that_names_its_own_kind_changes_only_what_it_names():
    vision = {
        "model_type": "efficientsam3_vision",
        "initializer_range": 0.1,
        "backbone_config": {"model_type": "efficientsam3_backbone", "drop_path_rate": 0.2},
    }
    text = {"model_type": "efficientsam3_text", "attend_to_padding": False}

    config = zoo.config(
        "efficientsam3-tinyvit-l-mobileclip-s1", vision_config=vision, text_config=text
    )

    assert config.vision_config.backbone_config.trunk == "tiny_vit_21m_224"
    assert config.vision_config.backbone_config.drop_path_rate == 0.2
    assert config.vision_config.initializer_range == 0.1
    assert config.text_config.num_hidden_layers == 12
    vit = zoo.config("sam3", vision_config={"backbone_config": {"num_hidden_layers": 3}})
    assert vit.vision_config.backbone_config.num_hidden_layers == 3


def test_a_dictionary_changes_a_configuration_too():
    vision = zoo.config("efficientsam3-repvit-s").vision_config
    tracker = {"vision_config": {"initializer_range": 0.3}}

    config = zoo.config("efficientsam3-tinyvit-s", vision_config=vision, tracker_config=tracker)

    assert config.tracker_config.vision_config.backbone_config.trunk == "repvit_m0_9"
    assert config.tracker_config.vision_config.initializer_range == 0.3
    assert config.vision_config.initializer_range == 0.02


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            {"vision_config": {"backbone_config": {"trunkk": "repvit_m0_9"}}},
            TypeError,
            "EfficientSam3BackboneConfig has no field 'trunkk'. Did you mean 'trunk'",
        ),
        ({"detr_decoder_config": {"querys": 5}}, TypeError, "Config has no field 'querys'"),
        ({"from_pretrained": 3}, TypeError, "has no field 'from_pretrained'"),
        ({"model_type": "foo"}, ValueError, "model_type is 'efficientsam3' in the zoo"),
        ({"vision_config": {"model_type": "foo"}}, ValueError, "knows no vision_config of type"),
        ({"vision_config": None}, ValueError, "vision_config cannot be None"),
        ({"vision_config": {"backbone_config": None}}, ValueError, "backbone_config cannot be"),
        ({"detr_encoder_config": None}, ValueError, "detr_encoder_config cannot be None"),
        (
            {"text_config": {"max_position_embeddings": 77}, "context_length": 32},
            ValueError,
            "A context length of 32, .* and text_config both say",
        ),
        (
            {"text_config": EfficientSam3TextConfig(), "context_length": 77},
            ValueError,
            "both say how long",
        ),
    ],
)
def test_overrides_that_nothing_would_read_are_errors(overrides, error, message):
    with pytest.raises(error, match=message):
        zoo.config("efficientsam3-tinyvit-l", **overrides)


@pytest.mark.parametrize("size", [0, -5, 27])
@pytest.mark.parametrize("name", ["efficientsam3-tinyvit-l", "sam3"])
def test_an_image_size_that_cannot_work_is_an_error(name: str, size: int):
    with pytest.raises(ValueError, match=f"image_size={size} is none: sides are of 28 pixels"):
        zoo.config(name, image_size=size)


def test_the_lateral_neck_is_configured_for_multiples_of_16_only():
    with pytest.raises(ValueError, match="multiples of 16 from 32 on, not an image of 1000 x 1000"):
        zoo.config("efficientsam3-tinyvit-s-lateral", image_size=1000)
    with pytest.raises(StrictDataclassError, match="multiples of 16 from 32 on"):
        EfficientSam3VisionConfig(neck="lateral", backbone_config={"image_size": 1000})


def test_a_configuration_of_no_tokens_is_an_error():
    with pytest.raises(StrictDataclassError, match="image_size=0 and patch_size=14 make no token"):
        EfficientSam3BackboneConfig(image_size=0)


@pytest.mark.parametrize("length", [-1, 0, 2])
@pytest.mark.parametrize("name", ["efficientsam3-tinyvit-s", "sam3"])
def test_a_context_that_holds_no_phrase_is_an_error(name: str, length: int):
    with pytest.raises(StrictDataclassError, match=f"context of {length} tokens holds no phrase"):
        zoo.config(name, context_length=length)


def test_a_backbone_of_another_family_is_an_error():
    with pytest.raises(ValueError, match="type 'sam3_vit_model' does not go into"):
        EfficientSam3VisionConfig(backbone_config={"model_type": "sam3_vit_model"})


def test_parts_of_different_widths_are_an_error():
    with pytest.raises(StrictDataclassError, match=r"must be equal: .*fpn_hidden_size=64, geom"):
        EfficientSam3Config(vision_config={"fpn_hidden_size": 64})
    with pytest.raises(StrictDataclassError, match=r"must be equal: .*fpn_hidden_size=64, prompt"):
        EfficientSam3TrackerConfig(vision_config={"fpn_hidden_size": 64})


@pytest.mark.parametrize("name", zoo.names())
def test_every_name_is_written_as_a_folder_that_auto_classes_read(name: str, tmp_path):
    zoo.save(name, tmp_path)

    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, EfficientSam3Config)
    del config.auto_map  # which the folder adds
    assert config.to_diff_dict() == zoo.config(name).to_diff_dict()
    tracker_config = EfficientSam3TrackerConfig.from_pretrained(tmp_path)
    assert tracker_config.to_diff_dict() == config.tracker_config.to_diff_dict()
    image_processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(image_processor, EfficientSam3ImageProcessor)
    assert image_processor.size["height"] == 1008
    assert image_processor.mask_size["height"] == 288


def test_processor_of_a_folder_equals_that_of_the_zoo(tmp_path):
    expected = zoo.processor("efficientsam3-repvit-s")
    zoo.save("efficientsam3-repvit-s", tmp_path)

    processor = AutoProcessor.from_pretrained(tmp_path)

    assert isinstance(processor, EfficientSam3Processor)
    text = ["a red car", "don't  STOP!", "12 cats & dogs"]
    assert torch.equal(processor(text=text)["input_ids"], expected(text=text)["input_ids"])
    tracker_processor = EfficientSam3TrackerProcessor.from_pretrained(tmp_path)
    assert isinstance(tracker_processor.image_processor, EfficientSam3ImageProcessor)


@torch.no_grad()
def test_one_folder_serves_concept_model_and_tracker(tmp_path):
    model, tracker = tiny_model(), tiny_tracker()
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    zoo.save(model.config, tmp_path, model, tracker)
    pixel_values = torch.randn(1, 3, 112, 112)
    ids, box = torch.randint(1, 100, (1, 16)), torch.tensor([[[1.0, 2.0, 30.0, 40.0]]])

    as_auto = AutoModel.from_pretrained(tmp_path).eval()
    as_concepts = EfficientSam3Model.from_pretrained(tmp_path).eval()
    as_tracker = EfficientSam3TrackerModel.from_pretrained(tmp_path).eval()

    assert isinstance(as_auto, EfficientSam3Model)
    expected = model(pixel_values=pixel_values, input_ids=ids).pred_masks
    for loaded in (as_auto, as_concepts):
        masks = loaded(pixel_values=pixel_values, input_ids=ids).pred_masks
        torch.testing.assert_close(masks, expected, atol=1e-4, rtol=1e-4)
    masks = as_tracker(pixel_values=pixel_values, input_boxes=box).pred_masks
    expected = tracker(pixel_values=pixel_values, input_boxes=box).pred_masks
    torch.testing.assert_close(masks, expected, atol=1e-4, rtol=1e-4)
    trunk = count(model.vision_encoder.backbone)
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert stored < 4.1 * (count(model) + count(tracker) - trunk) + 200_000  # names and buffers


def test_models_with_different_trunks_cannot_share_a_folder(tmp_path):
    model, tracker = tiny_model(), tiny_tracker()
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    with torch.no_grad():
        tracker.vision_encoder.backbone.head[3].bias.add_(1)

    with pytest.raises(ValueError, match=r"different trunks, e.g. in vision_encoder.backbone.head"):
        zoo.save(model.config, tmp_path, model, tracker)


@torch.no_grad()
def test_fused_models_share_a_folder_too(tmp_path):
    vision = tiny_vision("sam3", "repvit_m0_9")
    model, tracker = tiny_model(vision), tiny_tracker(vision)
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())

    zoo.save(model.config, tmp_path, model.fuse(), tracker.fuse())

    assert EfficientSam3Model.from_pretrained(tmp_path).config.vision_config.backbone_config.fused
    loaded = EfficientSam3TrackerModel.from_pretrained(tmp_path)
    assert loaded.config.vision_config.backbone_config.fused


@pytest.mark.parametrize("vision", [TINY_VIT, tiny_vision("sam3", "efficientvit_b0")])
def test_only_repvit_can_be_fused(vision):
    for model in (tiny_model(vision), tiny_tracker(vision)):
        with pytest.raises(ValueError, match="Only RepViT trunks can be fused"):
            model.fuse()


def test_a_tracker_is_not_saved_without_its_concept_model(tmp_path):
    with pytest.raises(ValueError, match="shares its trunk with the concept model"):
        zoo.save(tiny_config(), tmp_path, tracker=tiny_tracker())


def test_a_configuration_is_not_written_over_weights(tmp_path):
    model = tiny_model()
    zoo.save(model.config, tmp_path, model)

    with pytest.raises(ValueError, match=r"holds weights \(model.safetensors\)"):
        zoo.save(model.config, tmp_path)

    zoo.save(model.config, tmp_path, model)  # over its own weights it is


def test_models_in_the_wrong_place_are_an_error(tmp_path):
    model, tracker = tiny_model(), tiny_tracker()

    for wrong in [(tracker,), (tracker, model), (model, model)]:
        with pytest.raises(TypeError, match="and a tracker beside it, in this order, not a"):
            zoo.save(model.config, tmp_path, *wrong)


def test_a_tracker_of_another_image_size_cannot_share_a_folder(tmp_path):
    model, config = tiny_model(), tiny_config()
    config.image_size = 168
    tracker = EfficientSam3TrackerModel(config)
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())

    with pytest.raises(ValueError, match="images of 168 pixels, the concept model for 112"):
        zoo.save(model.config, tmp_path, model, tracker)


def test_saving_leaves_the_configuration_as_it_was(tmp_path):
    config = tiny_config()
    before = config.to_dict()

    zoo.save(config, tmp_path)

    assert config.to_dict() == before


def test_a_folder_without_a_tracker_says_so(tmp_path):
    model = tiny_model()
    zoo.save("efficientsam3-tinyvit-l", tmp_path, model)  # the model's configuration is what counts

    assert model.config.tracker_config is not None
    assert EfficientSam3Model.from_pretrained(tmp_path).config.tracker_config is None
    size = AutoImageProcessor.from_pretrained(tmp_path).size["height"]
    assert size == model.config.image_size
    with pytest.raises(ValueError, match="no tracker_config"):
        EfficientSam3TrackerModel.from_pretrained(tmp_path)


def test_a_folder_remembers_no_path_and_no_old_precision(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    model, tracker = tiny_model(), tiny_tracker()
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    zoo.save(model.config, first, model.to(torch.bfloat16), tracker.to(torch.bfloat16))
    model = EfficientSam3Model.from_pretrained(first)
    tracker = EfficientSam3TrackerModel.from_pretrained(first)
    assert model.dtype == tracker.dtype == torch.bfloat16

    zoo.save(model.config, second, model.float(), tracker.float())

    text = (second / "config.json").read_text()
    assert json.loads(text)["dtype"] == "float32"
    assert "bfloat16" not in text
    assert str(tmp_path) not in text
    assert EfficientSam3Model.from_pretrained(second).dtype == torch.float32


def test_folders_of_lateral_and_long_context_variants_are_read(tmp_path):
    name = "efficientsam3-tinyvit-s-lateral-ctx77"
    zoo.save(name, tmp_path)

    config = AutoConfig.from_pretrained(tmp_path)

    del config.auto_map  # which the folder adds
    assert config.to_diff_dict() == zoo.config(name).to_diff_dict()
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.image_processor.size["height"] == 1024
    assert processor.image_processor.mask_size["height"] == 256
    assert processor(text="a cat")["input_ids"].shape == (1, 77)


def test_configurations_hold_no_value_that_json_cannot(tmp_path):
    zoo.save("sam3", tmp_path)

    text = (tmp_path / "config.json").read_text()

    assert json.loads(text)["model_type"] == "efficientsam3"


@pytest.mark.parametrize(
    "module", [variants, prompts, from_teacher, image_processing_efficientsam3]
)
def test_examples_in_docstrings_are_true(module):
    result = doctest.testmod(module)

    assert result.attempted > 0
    assert result.failed == 0
