"""Key names and shapes of released files against those of the classes that will read them.

Almost everything is on the meta device, after the manifests of `tests/parity`. That the renamed
weights give the outputs of the reference too is for the parity tests to say.
"""

from functools import cache

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Sam3Config,
    Sam3LiteTextConfig,
    Sam3LiteTextModel,
    Sam3Model,
    Sam3VideoConfig,
    Sam3VideoModel,
)

from conversion.renaming import rename
from tests.parity.materialise import find_case, list_cases, read_manifest

Shapes = dict[str, tuple[int, ...]]

VISION = "detector.backbone.vision_backbone."
TEXT = "detector.backbone.language_backbone."
OUR_BACKBONE = "detector_model.vision_encoder.backbone."
FOURIER_TABLE = "shared_image_embedding.positional_embedding"  # stands twice in transformers

MODELS = {  # case: timm's name of the trunk, text tower
    "ev_s_s1_ctx32": ("efficientvit_b0", "mobileclip_s1"),
    "rv_m_s0_ctx16": ("repvit_m1_1", "mobileclip_s0"),
    "tv_s_teacher_inst": ("tiny_vit_5m_224", "sam3"),
}
TRUNKS = {
    "efficientvit_b0": "efficientvit_b0",
    "efficientvit_b1": "efficientvit_b1",
    "efficientvit_b2": "efficientvit_b2",
    "repvit_m0_9": "repvit_m0_9",
    "repvit_m1_1": "repvit_m1_1",
    "repvit_m2_3": "repvit_m2_3",
    "tinyvit_5m": "tiny_vit_5m_224",
    "tinyvit_11m": "tiny_vit_11m_224",
    "tinyvit_21m": "tiny_vit_21m_224",
}
TEXT_CONFIGS = {
    "mobileclip_s0": {"num_hidden_layers": 6, "use_repmixer_blocks": True, "context_length": 16},
    "mobileclip_s1": {"num_hidden_layers": 12, "use_repmixer_blocks": False, "context_length": 32},
}
FILES = [
    (case, manifest.name.removesuffix(".json.gz"), part)
    for case in list_cases()
    for manifest in sorted(find_case(case).glob("*.json.gz"))
    for part in read_manifest(case, manifest.name.removesuffix(".json.gz"))
]


def released(case: str, part: str = "checkpoint", manifest: str = "manifest") -> dict[str, Tensor]:
    """A file of `tests/parity` without its values."""
    entries = read_manifest(case, manifest)[part]["tensors"]
    return {
        key: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for key, entry in entries.items()
    }


def sam3_file() -> dict[str, Tensor]:
    """Meta's `sam3.pt` without its values: a complete file with the ViT in place of a student."""
    source = released("tv_s_teacher_inst")
    source = {key: value for key, value in source.items() if "trunk.model." not in key}
    shapes = {"pos_embed": (1, 577, 1024), "patch_embed.proj.weight": (1024, 3, 14, 14)}
    layers = {"attn.qkv": (3072, 1024), "attn.proj": (1024, 1024)}
    layers |= {"mlp.fc1": (4736, 1024), "mlp.fc2": (1024, 4736)}
    norms = ["ln_pre", *(f"blocks.{i}.norm{n}" for i in range(32) for n in (1, 2))]
    shapes |= {f"{norm}.{leaf}": (1024,) for norm in norms for leaf in ("weight", "bias")}
    for i in range(32):
        shapes[f"blocks.{i}.attn.freqs_cis"] = (576, 32)
        for layer, shape in layers.items():
            shapes[f"blocks.{i}.{layer}.weight"] = shape
            shapes[f"blocks.{i}.{layer}.bias"] = shape[:1]
    vit = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return source | {f"{VISION}trunk.{key}": value for key, value in vit.items()}


def shapes_of(weights: dict[str, Tensor], prefix: str = "") -> Shapes:
    return {
        name.removeprefix(prefix): tuple(value.shape)
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


@cache
def detector_shapes(text: str) -> Shapes:
    """What transformers' concept model holds beside its backbone, and our point branch."""
    vision = {"model_type": "sam3_vision_model", "backbone_config": {"num_hidden_layers": 0}}
    vision["backbone_config"]["model_type"] = "sam3_vit_model"
    with torch.device("meta"):
        if text == "sam3":
            model = Sam3Model(Sam3Config(vision_config=vision))
        else:
            tower = {"hidden_size": 512, "projection_dim": 512, "intermediate_size": 2048}
            tower |= {"num_attention_heads": 8, **TEXT_CONFIGS[text]}
            tower["max_position_embeddings"] = tower.pop("context_length")
            config = Sam3LiteTextConfig(vision_config=vision, text_config=tower)
            model = Sam3LiteTextModel(config)
    shapes = shapes_of(model.state_dict())
    shapes = {
        name: s for name, s in shapes.items() if not name.startswith("vision_encoder.backbone")
    }
    return prefixed("detector_model.", shapes | point_branch_shapes())


def point_branch_shapes() -> Shapes:
    shapes = {}
    for name, inputs in (("direct", 2), ("pool", 256), ("pos_enc", 256)):
        shapes[f"geometry_encoder.points_{name}_project.weight"] = (256, inputs)
        shapes[f"geometry_encoder.points_{name}_project.bias"] = (256,)
    return shapes


@cache
def student_shapes(trunk: str) -> Shapes:
    """timm's trunk without its classifier, and the head that widens its last map."""
    with torch.device("meta"):
        net = timm.create_model(trunk, num_classes=0)
        head = nn.Sequential(
            nn.Conv2d(net.num_features, 1024, kernel_size=1, bias=False),
            nn.BatchNorm2d(1024),
            nn.GELU(),
            nn.Conv2d(1024, 1024, kernel_size=3, padding=1),
        )
    net.head = nn.Identity()
    shapes = prefixed("trunk.", shapes_of(net.state_dict()))
    return prefixed(OUR_BACKBONE, shapes | prefixed("head.", shapes_of(head.state_dict())))


@cache
def sam3_video_shapes() -> Shapes:
    with torch.device("meta"):
        return shapes_of(Sam3VideoModel(Sam3VideoConfig()).state_dict())


def tracker_shapes() -> Shapes:
    return {name: s for name, s in sam3_video_shapes().items() if name.startswith("tracker")}


@pytest.mark.parametrize(("case", "manifest", "part"), FILES)
def test_no_number_of_a_file_is_lost(case: str, manifest: str, part: str):
    source = released(case, part, manifest)

    renamed = rename(source)

    kept = [value for key, value in source.items() if key not in renamed.dropped]
    copies = [value for name, value in renamed.weights.items() if name.endswith(FOURIER_TABLE)]
    count = sum(value.numel() for value in renamed.weights.values())
    assert count == sum(value.numel() for value in kept + copies)
    assert renamed.dropped.keys() <= source.keys()


@pytest.mark.parametrize("case", MODELS)
def test_released_models_have_the_names_and_shapes_of_transformers(case: str):
    source = {}
    for part in read_manifest(case):
        source |= released(case, part)

    renamed = rename(source)

    trunk, text = MODELS[case]
    expected = detector_shapes(text) | student_shapes(trunk)
    if case == "tv_s_teacher_inst":
        expected |= tracker_shapes()
    assert shapes_of(renamed.weights) == expected
    assert not renamed.dropped


@pytest.mark.parametrize(("case", "trunk"), TRUNKS.items())
def test_trunks_have_the_names_and_shapes_of_timm(case: str, trunk: str):
    source = released(f"trunks/{case}")

    assert shapes_of(rename(source).weights) == student_shapes(trunk)


def test_sam3_itself_has_the_names_and_shapes_of_transformers():
    source = sam3_file()
    assert len(source) == 1465  # as many as the real file holds

    renamed = rename(source)

    point_branch = prefixed("detector_model.", point_branch_shapes())
    assert shapes_of(renamed.weights) == sam3_video_shapes() | point_branch
    assert all(key.endswith("freqs_cis") for key in renamed.dropped)
    assert len(renamed.dropped) == 32


def test_litetext_keeps_the_vit_beside_a_mobileclip_tower():
    source = {key: value for key, value in sam3_file().items() if not key.startswith(TEXT)}
    lite = released("ev_s_s1_ctx32")
    source |= {key: value for key, value in lite.items() if key.startswith(TEXT)}

    weights = rename(source).weights

    vit = {name: s for name, s in sam3_video_shapes().items() if name.startswith(OUR_BACKBONE)}
    assert shapes_of(weights) == detector_shapes("mobileclip_s1") | vit | tracker_shapes()


def test_trainer_checkpoints_are_read_without_prefix():
    plain = rename(released("rv_m_s0_ctx16"))
    trainer = rename(released("rv_m_s0_ctx16", manifest="variant_trainer_noprefix"))

    assert shapes_of(trainer.weights) == shapes_of(plain.weights)
    assert not trainer.dropped


def test_legacy_files_lose_the_infix_and_the_vit_they_still_carry():
    plain = rename(released("rv_m_s0_ctx16") | released("rv_m_s0_ctx16", "donor"))
    legacy = rename(released("rv_m_s0_ctx16", manifest="variant_legacy_student_trunk"))

    assert shapes_of(legacy.weights) == shapes_of(plain.weights)
    assert legacy.dropped.keys() == {
        f"{VISION}trunk.pos_embed",
        f"{VISION}trunk.patch_embed.proj.weight",
        f"{VISION}trunk.blocks.0.attn.freqs_cis",
    }
    assert {reason.split(",")[0] for reason in legacy.dropped.values()} == {
        "left over from the teacher's ViT"
    }


def test_the_image_model_as_built_from_code_holds_the_tracker_in_its_predictor():
    source = released("tv_s_teacher_inst")
    built = {
        key.removeprefix("detector.").replace(
            "tracker.", "inst_interactive_predictor.model."
        ): value
        for key, value in source.items()
    }

    assert shapes_of(rename(built).weights) == shapes_of(rename(source).weights)


def test_of_sam31_the_modules_for_points_and_boxes_serve_as_tracker():
    prompts = ("sam_prompt_encoder.", "sam_mask_decoder.", "mask_downsample.", "obj_ptr_proj.")
    source, expected = {}, {}
    for key, value in released("tv_s_teacher_inst").items():
        if "convs.3." in key:
            continue  # SAM 3.1 has three levels
        if key.startswith(f"{VISION}sam2_convs."):
            source[key.replace("sam2", "propagation")] = value
            source[key.replace("sam2", "interactive")] = expected[key] = value
        elif not key.startswith("tracker."):
            source[key] = expected[key] = value
        else:
            name = key.removeprefix("tracker.")
            source[f"tracker.model.{name}"] = value
            if name.startswith(prompts):
                source[f"tracker.model.interactive_{name}"] = expected[key] = value
    no_memory = released("tv_s_teacher_inst")["tracker.no_mem_embed"]
    source["tracker.model.interactivity_no_mem_embed"] = no_memory
    expected["tracker.no_mem_embed"] = no_memory

    renamed = rename(source)

    assert shapes_of(renamed.weights) == shapes_of(rename(expected).weights)
    assert len(renamed.dropped) == len(source) - len(expected)
    assert all("SAM 3.1's multiplex video tracker" in why for why in renamed.dropped.values())


@pytest.mark.parametrize(
    ("source", "target"),
    [
        # equal shapes: a mistake here would load without complaint
        ("transformer.decoder.layers.0.norm1.weight", "vision_cross_attn_layer_norm.weight"),
        ("transformer.decoder.layers.0.norm2.weight", "self_attn_layer_norm.weight"),
        ("transformer.decoder.layers.0.norm3.weight", "mlp_layer_norm.weight"),
        ("transformer.decoder.layers.0.catext_norm.weight", "text_cross_attn_layer_norm.weight"),
        ("transformer.decoder.layers.0.ca_text.out_proj.weight", "text_cross_attn.o_proj.weight"),
        ("transformer.decoder.layers.0.cross_attn.out_proj.bias", "vision_cross_attn.o_proj.bias"),
        ("transformer.decoder.norm.bias", "detr_decoder.output_layer_norm.bias"),
        (
            "transformer.decoder.presence_token_out_norm.bias",
            "detr_decoder.presence_layer_norm.bias",
        ),
        ("transformer.decoder.boxRPB_embed_y.layers.1.bias", "box_rpb_embed_y.layer2.bias"),
        ("transformer.decoder.bbox_embed.layers.1.bias", "detr_decoder.box_head.layer2.bias"),
        ("geometry_encoder.norm.weight", "geometry_encoder.prompt_layer_norm.weight"),
        ("geometry_encoder.encode_norm.weight", "geometry_encoder.output_layer_norm.weight"),
        ("geometry_encoder.img_pre_norm.weight", "geometry_encoder.vision_layer_norm.weight"),
        ("dot_prod_scoring.hs_proj.weight", "dot_product_scoring.query_proj.weight"),
        ("tracker.no_mem_pos_enc", "tracker_model.no_memory_positional_encoding"),
        ("tracker.obj_ptr_proj.layers.1.weight", "object_pointer_proj.layers.0.weight"),
        ("tracker.obj_ptr_proj.layers.2.weight", "object_pointer_proj.proj_out.weight"),
    ],
)
def test_weights_of_one_shape_go_where_they_are_used(source: str, target: str):
    (name,) = rename({source: torch.empty(4, device="meta")}).weights

    assert name.endswith(target)


def test_fused_projections_are_cut_into_queries_keys_and_values():
    fused = torch.randn(768, 256)
    key = "detector.transformer.encoder.layers.2.self_attn.in_proj_weight"

    weights = rename({key: fused}).weights

    prefix = "detector_model.detr_encoder.layers.2.self_attn."
    assert list(weights) == [f"{prefix}{letter}_proj.weight" for letter in "qkv"]
    torch.testing.assert_close(torch.cat(list(weights.values())), fused, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("encoder.text_projection", "text_encoder.text_projection.weight"),
        ("encoder.projection_layer", "text_encoder.projection.weight"),
    ],
)
def test_matrices_that_multiply_from_the_right_are_transposed(key: str, name: str):
    matrix = torch.randn(4, 3)

    weights = rename({TEXT + key: matrix}).weights

    torch.testing.assert_close(weights[f"detector_model.{name}"], matrix.T, rtol=0, atol=0)


def test_point_embeddings_are_joined_in_order_whatever_the_order_of_the_file():
    rows = torch.randn(4, 1, 256)
    keys = [f"tracker.sam_prompt_encoder.point_embeddings.{i}.weight" for i in range(4)]

    weights = rename({keys[i]: rows[i] for i in (2, 0, 3, 1)}).weights

    name = "tracker_model.prompt_encoder.point_embed.weight"
    torch.testing.assert_close(weights[name], rows[:, 0], rtol=0, atol=0)


def test_position_table_of_the_vit_loses_its_class_token():
    table = torch.randn(1, 1 + 4 * 4, 8)

    weights = rename({f"{VISION}trunk.pos_embed": table}).weights

    positions = weights[f"{OUR_BACKBONE}embeddings.position_embeddings"]
    torch.testing.assert_close(positions, table[:, 1:], rtol=0, atol=0)


def test_position_table_without_class_token_is_refused():
    with pytest.raises(ValueError, match=r"trunk\.pos_embed has 16 positions"):
        rename({f"{VISION}trunk.pos_embed": torch.randn(1, 4 * 4, 8)})


@pytest.mark.parametrize("rows", [16, 32, 77])
def test_position_tables_of_mobileclip_keep_their_length(rows: int):
    table = torch.randn(1, 1, rows, 8)

    weights = rename({f"{TEXT}encoder.positional_embedding.pos_embed.pos_embed": table}).weights

    assert next(iter(weights.values())) is table


def test_renamed_weights_can_be_saved_as_they_are(tmp_path):
    source = {
        "tracker.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.randn(
            2, 4
        ),
        "segmentation_head.cross_attend_prompt.in_proj_bias": torch.randn(12),
        f"{TEXT}encoder.text_projection": torch.randn(4, 3),
    }
    weights = rename(source).weights

    save_file(weights, tmp_path / "model.safetensors")

    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), weights)


@pytest.mark.parametrize(
    "key",
    [
        "detector.mystery.weight",
        "detector.transformer.encoder.layers.0.norm4.weight",
        f"{VISION}trunk.model.head.2.weight",
        f"{VISION}trunk.model.backbone.model.classifier.weight",
        "tracker.sam_mask_decoder.output_upscaling.2.weight",
        "geometry_encoder.norm.weight_scale",
        "epoch",
    ],
)
def test_unknown_keys_are_named(key: str):
    source = released("ev_s_s1_ctx32") | {key: torch.empty(1, device="meta")}

    with pytest.raises(ValueError, match="match no pattern") as error:
        rename(source)

    assert key in str(error.value)


def test_a_weight_that_stands_twice_in_a_file_is_refused():
    key = "dot_prod_scoring.hs_proj.bias"
    source = {name: torch.empty(4, device="meta") for name in (key, f"detector.{key}")}

    with pytest.raises(ValueError, match="two forms of one weight"):
        rename(source)
