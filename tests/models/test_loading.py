"""Weights in and out: exact reloading, strictness, starting from a teacher."""

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    TINY_CLIP,
    TINY_TEXT,
    TINY_VIT,
    TRUNKS,
    stir,
    tiny_config,
    tiny_model,
    tiny_tracker,
    tiny_vision,
)
from transformers import (
    Sam3Config,
    Sam3Model,
    Sam3TrackerVideoConfig,
    Sam3VideoConfig,
    Sam3VideoModel,
)

from efficientsam3_hf import (
    EfficientSam3Backbone,
    EfficientSam3Model,
    EfficientSam3TextModel,
    EfficientSam3TrackerModel,
    EfficientSam3VisionModel,
    zoo,
)
from efficientsam3_hf.models import trunks

PIXELS = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([[49406, 320, 1615, 49407, *[0] * 12]])
BOX = torch.tensor([[[10.0, 20.0, 80.0, 90.0]]])


def parts(trunk: str = "efficientvit_b0") -> dict:
    """Every model class, with inputs for it."""
    model = tiny_model(tiny_vision("sam3", trunk))
    return {
        EfficientSam3Model: (model, {"pixel_values": PIXELS, "input_ids": IDS}),
        EfficientSam3TrackerModel: (
            tiny_tracker(tiny_vision("sam3", trunk)),
            {"pixel_values": PIXELS, "input_boxes": BOX},
        ),
        EfficientSam3VisionModel: (model.vision_encoder, {"pixel_values": PIXELS}),
        EfficientSam3Backbone: (model.vision_encoder.backbone, {"pixel_values": PIXELS}),
        EfficientSam3TextModel: (model.text_encoder, {"input_ids": IDS}),
    }


@pytest.mark.parametrize("trunk", TRUNKS)
@torch.no_grad()
def test_every_class_reloads_with_identical_weights_and_outputs(trunk: str, tmp_path):
    for model_class, (model, inputs) in parts(trunk).items():
        model.save_pretrained(tmp_path / model_class.__name__)

        # A copy, since a mapped file is not aligned as torch likes it, and BLAS then rounds apart.
        loaded = copy.deepcopy(model_class.from_pretrained(tmp_path / model_class.__name__)).eval()

        state, reloaded = model.state_dict(), loaded.state_dict()
        assert state.keys() == reloaded.keys()
        assert all(torch.equal(state[name], reloaded[name]) for name in state)
        for output, expected in zip(
            loaded(**inputs).to_tuple(), model(**inputs).to_tuple(), strict=True
        ):
            if isinstance(output, torch.Tensor):
                assert torch.equal(output, expected), model_class


@pytest.mark.parametrize("model_class", [EfficientSam3Model, EfficientSam3TrackerModel])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "1 missing in the checkpoint (mask_decoder"),
        ("extra", "1 not part of the model (surplus"),
        ("misshaped", "weight: (3,) stored, ("),
    ],
)
def test_a_weight_that_does_not_fit_is_an_error_that_names_it(
    model_class, change: str, message: str, tmp_path
):
    model = tiny_model() if model_class is EfficientSam3Model else tiny_tracker()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "mask_decoder" in name and name.endswith("weight"))
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights["surplus.weight"] = torch.zeros(3)
    else:
        weights[name] = torch.zeros(3)
    save_file(weights, path, metadata={"format": "pt"})

    with pytest.raises(ValueError, match="The weights do not fit") as error:
        model_class.from_pretrained(tmp_path)

    assert message in str(error.value)


def test_whoever_asks_for_the_lists_of_misfits_gets_them(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded, info = EfficientSam3Model.from_pretrained(tmp_path, output_loading_info=True)

    assert isinstance(loaded, EfficientSam3Model)
    assert set(info["missing_keys"]) == {"text_projection.bias"}


@pytest.fixture(scope="module")
def video_teacher() -> Sam3VideoModel:
    """transformers' SAM 3 for video, which holds detector, tracker and both necks."""
    config = tiny_config(TINY_VIT, TINY_CLIP).to_dict()
    detector = {name: config[name] for name in Sam3Config.sub_configs_defaults}
    tracker = config["tracker_config"]
    memory = {"memory_attention_hidden_size": 32, "memory_encoder_hidden_size": 32}
    memory |= {"mask_downsampler_embed_dim": 32, "memory_fuser_embed_dim": 32}
    memory |= {"memory_attention_feed_forward_hidden_size": 64, "memory_attention_num_layers": 1}
    memory |= {"memory_fuser_intermediate_dim": 64, "memory_encoder_output_channels": 64}
    tracker_config = Sam3TrackerVideoConfig(
        vision_config=tracker["vision_config"],
        prompt_encoder_config=tracker["prompt_encoder_config"],
        mask_decoder_config=tracker["mask_decoder_config"],
        memory_attention_rope_feat_sizes=[8, 8],
        **memory,
    )
    torch.manual_seed(0)
    video_config = Sam3VideoConfig(
        detector_config=detector, tracker_config=tracker_config.to_dict(), low_res_mask_size=32
    )
    return stir(Sam3VideoModel(video_config))


def test_concept_student_has_every_weight_of_the_teacher_that_it_keeps(video_teacher):
    teacher = video_teacher.detector_model.state_dict()

    student = EfficientSam3Model.from_teacher(video_teacher, tiny_config())

    weights = student.state_dict()
    kept = [
        "vision_encoder.neck.",
        "geometry_encoder.",
        "detr_encoder.",
        "detr_decoder.",
        "mask_decoder.",
        "dot_product_scoring.",
    ]
    for prefix in kept:
        names = [name for name in weights if name.startswith(prefix) and "points_" not in name]
        assert names
        assert all(torch.equal(weights[name], teacher[name]) for name in names), prefix
    assert set(student.fresh_parts) == {
        "vision_encoder.backbone",
        "text_encoder",
        "text_projection",
        "geometry_encoder.points_direct_project",  # transformers' SAM 3 has no point branch
        "geometry_encoder.points_pool_project",
        "geometry_encoder.points_pos_enc_project",
    }


def test_tracker_student_has_neck_and_heads_of_the_teachers_tracker(video_teacher):
    student = EfficientSam3TrackerModel.from_teacher(video_teacher, tiny_config())

    weights, teacher = student.state_dict(), video_teacher.state_dict()
    necks = [name for name in weights if name.startswith("vision_encoder.neck.")]
    heads = [name for name in weights if not name.startswith("vision_encoder.")]
    for name in necks:
        teachers = teacher[name.replace("vision_encoder.neck.", "tracker_neck.")]
        assert torch.equal(weights[name], teachers)
    assert all(torch.equal(weights[name], teacher[f"tracker_model.{name}"]) for name in heads)
    assert student.fresh_parts == ("vision_encoder.backbone",)


def test_a_student_that_keeps_the_text_tower_gets_it(video_teacher):
    student = EfficientSam3Model.from_teacher(video_teacher, tiny_config(text=TINY_CLIP))

    weights, teacher = student.state_dict(), video_teacher.detector_model.state_dict()
    assert all(torch.equal(weights[n], teacher[n]) for n in weights if n.startswith("text_"))


def test_a_lateral_student_gets_all_but_the_neck(video_teacher):
    config = tiny_config(tiny_vision("lateral"))

    student = EfficientSam3Model.from_teacher(video_teacher, config)

    assert {"vision_encoder.backbone", "vision_encoder.neck"} < set(student.fresh_parts)
    assert "detr_encoder.layers" not in student.fresh_parts


@torch.no_grad()
def test_sam3_of_the_family_computes_what_the_teacher_computes(video_teacher):
    ours = EfficientSam3Model.from_teacher(video_teacher, tiny_config(TINY_VIT, TINY_CLIP)).eval()
    boxes = torch.tensor([[[0.4, 0.5, 0.3, 0.2]]])

    masks = ours(pixel_values=PIXELS, input_ids=IDS, input_boxes=boxes).pred_masks

    expected = video_teacher.detector_model(
        pixel_values=PIXELS, input_ids=IDS, input_boxes=boxes
    ).pred_masks
    torch.testing.assert_close(masks, expected, atol=1e-4, rtol=1e-4)


def test_teacher_may_be_a_folder(video_teacher, tmp_path):
    video_teacher.save_pretrained(tmp_path)

    for model_class in (EfficientSam3Model, EfficientSam3TrackerModel):
        config = tiny_config()
        from_folder = model_class.from_teacher(str(tmp_path), config)
        from_model = model_class.from_teacher(video_teacher, config)
        kept = [name for name in from_model.state_dict() if name.startswith("mask_decoder.")]
        assert from_folder.fresh_parts == from_model.fresh_parts
        assert all(
            torch.equal(from_folder.state_dict()[n], from_model.state_dict()[n]) for n in kept
        )


def test_teacher_may_be_one_of_the_family_or_a_plain_sam3(video_teacher, tmp_path):
    family = tiny_model(TINY_VIT, TINY_CLIP)
    plain: Sam3Model = video_teacher.detector_model

    student = EfficientSam3Model.from_teacher(family, tiny_config())
    assert "geometry_encoder.points_pool_project" not in student.fresh_parts
    student = EfficientSam3Model.from_teacher(plain, tiny_config())
    assert torch.equal(
        student.detr_decoder.query_embed.weight, plain.detr_decoder.query_embed.weight
    )


def test_teacher_may_be_a_folder_of_the_family(tmp_path):
    model, tracker = tiny_model(TINY_VIT, TINY_CLIP), tiny_tracker(TINY_VIT)
    backbone = model.vision_encoder.backbone.state_dict()
    tracker.vision_encoder.backbone.load_state_dict(backbone)
    zoo.save(model.config, tmp_path, model, tracker)

    student = EfficientSam3TrackerModel.from_teacher(tmp_path, tiny_config())

    assert student.fresh_parts == ("vision_encoder.backbone",)
    assert torch.equal(student.no_memory_embedding, tracker.no_memory_embedding)


def test_what_starts_fresh_is_said(video_teacher, caplog, package_log):
    with caplog.at_level(logging.WARNING):
        EfficientSam3Model.from_teacher(video_teacher, tiny_config())

    assert "Starting fresh: vision_encoder.backbone" in caplog.text


def test_a_teacher_of_other_sizes_is_an_error_that_names_a_weight(video_teacher):
    config = tiny_config()
    config.detr_decoder_config.num_queries = 6

    with pytest.raises(ValueError, match=r"detr_decoder.query_embed.weight: \(5, 32\) there"):
        EfficientSam3Model.from_teacher(video_teacher, config)


@pytest.fixture
def asked_of_timm(monkeypatch) -> list[tuple[str, bool]]:
    """What was asked of timm, which gives seeded weights instead of fetching any."""
    asked = []
    original = trunks.timm.create_model

    def create_model(name: str, pretrained: bool, **options):
        asked.append((name, pretrained))
        torch.manual_seed(7)
        return original(name, pretrained=False, **options)

    monkeypatch.setattr(trunks.timm, "create_model", create_model)
    return asked


@pytest.mark.parametrize("trunk", ["efficientvit_b0", "repvit_m0_9"])
def test_trunk_may_start_from_timms_weights(video_teacher, asked_of_timm, trunk: str):
    config = tiny_config(tiny_vision("sam3", trunk))
    config.vision_config.backbone_config.fused = trunk == "repvit_m0_9"

    student = EfficientSam3Model.from_teacher(video_teacher, config, pretrained_trunk=True)

    assert asked_of_timm[-1] == (trunk, True)
    expected = trunks.build_trunk(trunk)
    if config.vision_config.backbone_config.fused:
        trunks.fuse_trunk(expected)
    weights = student.vision_encoder.backbone.trunk.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[name], x) for name, x in expected.state_dict().items())
    assert "vision_encoder.backbone.head" in student.fresh_parts
    assert not {"vision_encoder.backbone", "vision_encoder.backbone.trunk"} & set(
        student.fresh_parts
    )


def test_only_a_fresh_trunk_of_timms_starts_from_timms_weights(video_teacher):
    with pytest.raises(ValueError, match=r"a trunk of timm's\. This one has none"):
        EfficientSam3Model.from_teacher(video_teacher, tiny_config(TINY_VIT), pretrained_trunk=True)
    with pytest.raises(ValueError, match="hands on its trunk"):
        EfficientSam3Model.from_teacher(tiny_model(), tiny_config(), pretrained_trunk=True)


def test_zoo_names_stand_for_students(video_teacher, monkeypatch):
    from efficientsam3_hf.models import from_teacher

    monkeypatch.setattr(from_teacher, "zoo_config", lambda name: {"tiny": tiny_config()}[name])

    assert isinstance(EfficientSam3Model.from_teacher(video_teacher, "tiny"), EfficientSam3Model)


def test_an_unknown_text_tower_is_an_error_that_lists_the_known_ones():
    config = tiny_config(text={"model_type": "bert", "hidden_size": 32})

    with pytest.raises(ValueError, match=r"no text tower of type 'bert'.*'clip_text_model'"):
        EfficientSam3Model(config)


def test_a_teacher_of_the_same_text_tower_hands_it_on():
    teacher = tiny_model(TINY_VIT)  # SAM3-LiteText: the ViT with a MobileCLIP tower

    student = EfficientSam3Model.from_teacher(teacher, tiny_config())

    weights, teachers = student.state_dict(), teacher.state_dict()
    names = [name for name in weights if name.startswith("text_")]
    assert all(torch.equal(weights[name], teachers[name]) for name in names)
    assert student.fresh_parts == ("vision_encoder.backbone",)


def test_a_teacher_of_the_same_trunk_hands_it_on():
    teacher = tiny_model(tiny_vision("lateral"))

    student = EfficientSam3Model.from_teacher(teacher, tiny_config(tiny_vision("lateral")))

    weights, teachers = student.state_dict(), teacher.state_dict()
    assert student.fresh_parts == ()
    assert all(torch.equal(weights[name], teachers[name]) for name in weights)


def test_a_tower_of_another_context_is_handed_on_but_for_its_position_table():
    teacher = tiny_model(TINY_VIT, {**TINY_TEXT, "max_position_embeddings": 32})

    student = EfficientSam3Model.from_teacher(teacher, tiny_config())

    weights, teachers = student.state_dict(), teacher.state_dict()
    table = "text_encoder.embeddings.position_embedding"
    names = [n for n in weights if n.startswith("text_") and not n.startswith(table)]
    assert all(torch.equal(weights[name], teachers[name]) for name in names)
    assert student.fresh_parts == ("vision_encoder.backbone", table)


def test_a_lateral_neck_is_handed_on_only_with_its_trunk(monkeypatch):
    channels = trunks.TRUNK_CHANNELS["efficientvit_b0"]
    teacher = tiny_model(tiny_vision("lateral"))
    monkeypatch.setitem(trunks.TRUNK_CHANNELS, "repvit_m0_9", channels)  # as in larger ones
    config = tiny_config(tiny_vision("lateral", "repvit_m0_9"))

    student = EfficientSam3Model.from_teacher(teacher, config)

    assert student.fresh_parts == ("vision_encoder.backbone", "vision_encoder.neck")


def test_a_lateral_teacher_has_no_neck_for_another_student():
    with pytest.raises(ValueError, match=r"has no weights for vision_encoder\.neck, which"):
        EfficientSam3Model.from_teacher(tiny_model(tiny_vision("lateral")), tiny_config())


def test_a_teacher_without_the_parts_that_are_kept_is_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"TrackerModel, has no weights for detr_decoder, detr_en"):
        EfficientSam3Model.from_teacher(tiny_tracker(TINY_VIT), tiny_config())
    with pytest.raises(
        ValueError, match=r"EfficientSam3Model, has no weights for .*prompt_encoder"
    ):
        EfficientSam3TrackerModel.from_teacher(tiny_model(TINY_VIT), tiny_config())


@pytest.mark.parametrize("whole", [True, False])
def test_parts_load_from_the_folder_of_a_whole_model(whole: bool, tmp_path):
    model, tracker = tiny_model(), tiny_tracker()
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    zoo.save(model.config, tmp_path, model, tracker if whole else None)

    for part in (model.vision_encoder, model.vision_encoder.backbone, model.text_encoder):
        loaded = type(part).from_pretrained(tmp_path)
        weights, state = loaded.state_dict(), part.state_dict()
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[name], state[name]) for name in state)


PARTS = {
    EfficientSam3VisionModel: ("vision_encoder", {"initializer_range": 0.5}),
    EfficientSam3Backbone: ("vision_encoder.backbone", {"drop_path_rate": 0.3}),
    EfficientSam3TextModel: ("text_encoder", {"attend_to_padding": False}),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_whole_take_a_configuration_or_fields_of_theirs(part, tmp_path):
    place, fields = PARTS[part]
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(model.get_submodule(place).config)
    for name, value in fields.items():
        setattr(config, name, value)

    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    with_fields = part.from_pretrained(tmp_path, **fields, **options)
    with_config, info = part.from_pretrained(tmp_path, config=config, output_loading_info=True)

    weights = model.get_submodule(place).state_dict()
    for loaded in (with_fields, with_config):
        assert {name: getattr(loaded.config, name) for name in fields} == fields
        assert all(torch.equal(loaded.state_dict()[name], weights[name]) for name in weights)
    assert with_fields.dtype == torch.float64
    assert with_fields.config._attn_implementation == "eager"
    assert not info["missing_keys"]


def test_a_backbone_is_part_of_a_vision_encoder(tmp_path):
    encoder = tiny_model().vision_encoder
    encoder.save_pretrained(tmp_path)

    weights = EfficientSam3Backbone.from_pretrained(tmp_path).state_dict()

    stored = encoder.backbone.state_dict()
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("part", "whole", "message"),
    [
        (EfficientSam3VisionModel, "vit", "its vision_config is a Sam3VisionConfig"),
        (EfficientSam3Backbone, "vit", "its backbone_config is a Sam3ViTConfig"),
        (EfficientSam3TextModel, "vit", "its text_config is a CLIPTextConfig"),
        (EfficientSam3TextModel, "tracker", "it has no text_config"),
        (EfficientSam3TextModel, "vision", "it has no text_config"),
    ],
)
def test_a_part_that_a_checkpoint_does_not_have_is_an_error(part, whole, message, tmp_path):
    models = {
        "vit": lambda: tiny_config(TINY_VIT, TINY_CLIP),
        "tracker": lambda: tiny_config().tracker_config,
        "vision": lambda: tiny_config().vision_config,
    }
    models[whole]().save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=f"holds no {part.__name__}: {message}"):
        part.from_pretrained(tmp_path)


def test_a_configuration_of_another_part_is_an_error(tmp_path):
    config = tiny_config()
    config.save_pretrained(tmp_path)

    with pytest.raises(TypeError, match="must be a EfficientSam3VisionConfig, not a EfficientSam3"):
        EfficientSam3VisionModel.from_pretrained(tmp_path, config=config.text_config)


def test_a_part_with_a_weight_missing_is_an_error(tmp_path):
    backbone = tiny_model().vision_encoder.backbone
    backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["head.0.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match=r"1 missing in the checkpoint \(head.0.weight\)"):
        EfficientSam3Backbone.from_pretrained(tmp_path)


def test_whoever_ignores_other_shapes_still_hears_of_missing_weights(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_projection.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    EfficientSam3Model.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    del weights["text_projection.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match=r"1 missing in the checkpoint \(text_projection.bias\)"):
        EfficientSam3Model.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
