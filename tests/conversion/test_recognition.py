"""Variants told from weights alone. Only shapes matter, so all is on the meta device."""

from functools import cache

import pytest
import torch
from torch import Tensor

from conversion.recognition import recognise
from efficientsam3_hf import zoo
from efficientsam3_hf.models.modeling_efficientsam3 import build_text_encoder, build_vision_encoder
from efficientsam3_hf.models.variants import TEXT_TOWERS, TRUNKS

POSITIONS = "detector_model.text_encoder.embeddings.position_embedding.position_embedding"


@cache
def vision(name: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        encoder = build_vision_encoder(zoo.config(name).vision_config)
    return {f"detector_model.vision_encoder.{k}": v for k, v in encoder.state_dict().items()}


@cache
def text(name: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        tower = build_text_encoder(zoo.config(name).text_config)
    return {f"detector_model.text_encoder.{k}": v for k, v in tower.state_dict().items()}


def weights_of(name: str) -> dict[str, Tensor]:
    """As much of a variant as recognition looks at."""
    trunk = name.split("-mobileclip")[0].split("-sam3text")[0].split("-ctx")[0]
    tower = name.replace(trunk, "efficientsam3-efficientvit-s") if "efficientsam3" in name else name
    point = {"detector_model.geometry_encoder.points_x_project.bias": torch.empty(1, device="meta")}
    return vision(trunk) | text(tower) | point


def with_positions(weights: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    return weights | {POSITIONS: torch.empty(1, 1, rows, 512, device="meta")}


@pytest.mark.parametrize(
    "name",
    [
        *(f"efficientsam3-{trunk}" for trunk in TRUNKS),
        *(f"efficientsam3-efficientvit-s-{tower}" for tower in TEXT_TOWERS if tower[-2:] != "s0"),
        "efficientsam3-tinyvit-l-mobileclip-s1-ctx32",
        "efficientsam3-repvit-m-ctx32",
    ],
)
def test_students_are_recognised(name):
    variant = recognise(weights_of(name))

    assert variant.name == name
    assert variant.config.context_length == zoo.config(name).context_length
    assert variant.config.tracker_config is None
    assert variant.notes == ()


@pytest.mark.parametrize("name", ["sam3-litetext-s0", "sam3-litetext-s1-ctx32", "sam3-litetext-l"])
def test_litetext_is_recognised(name):
    variant = recognise(weights_of(name))

    assert variant.name == name


def test_the_vit_has_the_norms_of_metas_code():
    variant = recognise(weights_of("sam3"))

    assert variant.name == "sam3"
    assert variant.config.vision_config.backbone_config.layer_norm_eps == 1e-5
    assert any("eps 1e-05" in note for note in variant.notes)


def test_a_table_of_77_rows_is_interpolated_to_32_as_released():
    weights = with_positions(weights_of("efficientsam3-repvit-s"), 77)

    variant = recognise(weights)

    assert variant.name == "efficientsam3-repvit-s-ctx32"
    assert variant.config.text_config.max_position_embeddings == 77
    assert variant.config.context_length == 32
    assert any("interpolated" in note for note in variant.notes)


@pytest.mark.parametrize("wish", [{"context_length": 77}, {"name": "efficientsam3-repvit-s-ctx77"}])
def test_a_table_of_77_rows_is_read_whole_on_request(wish):
    weights = with_positions(weights_of("efficientsam3-repvit-s"), 77)

    variant = recognise(weights, **wish)

    assert variant.name == "efficientsam3-repvit-s-ctx77"
    assert variant.config.context_length == 77
    assert variant.notes == ()


def test_other_tables_leave_no_choice():
    with pytest.raises(ValueError, match="has 16 rows, so phrases have 16 tokens, not 32"):
        recognise(weights_of("efficientsam3-repvit-s"), context_length=32)


@pytest.mark.parametrize(
    "name",
    [
        "efficientsam3-tinyvit-m",
        "efficientsam3-repvit-l",
        "efficientsam3-repvit-m-mobileclip-s1",
        "sam3-litetext-s0",
    ],
)
def test_a_conflict_with_the_name_is_an_error(name):
    with pytest.raises(ValueError, match=f"weights of 'efficientsam3-repvit-m'.*not of '{name}'"):
        recognise(weights_of("efficientsam3-repvit-m"), name)


def test_a_name_may_say_what_is_so_anyway():
    name = "efficientsam3-repvit-m-ctx16"

    assert recognise(weights_of("efficientsam3-repvit-m"), name).name == "efficientsam3-repvit-m"


def test_names_that_the_zoo_lacks_are_refused():
    with pytest.raises(ValueError, match="no variant 'efficientsam3-repvit-xl'"):
        recognise(weights_of("efficientsam3-repvit-m"), "efficientsam3-repvit-xl")


def test_necks_of_three_levels_are_recognised():
    name = "efficientsam3-tinyvit-s"
    weights = {k: v for k, v in weights_of(name).items() if "fpn_layers.3." not in k}

    variant = recognise(weights)

    assert variant.config.vision_config.scale_factors == [4.0, 2.0, 1.0]
    assert any("three levels" in note for note in variant.notes)


def test_precision_is_that_of_the_file():
    weights = {k: v.to(torch.bfloat16) for k, v in weights_of("efficientsam3-tinyvit-s").items()}

    assert recognise(weights).config.dtype == torch.bfloat16


def test_mixed_precisions_load_in_the_widest():
    weights = weights_of("efficientsam3-tinyvit-s")
    mixed = {
        k: v.to(torch.bfloat16) if v.is_floating_point() and "text_encoder" in k else v
        for k, v in weights.items()
    }
    half = {k: v.half() if "vision_encoder" in k else v for k, v in mixed.items()}

    variant = recognise(mixed)

    assert variant.config.dtype == torch.float32
    (note,) = variant.notes
    assert "bfloat16: text tower" in note
    assert "load as float32" in note
    assert recognise(half).config.dtype == torch.float32  # neither half holds the other


@pytest.mark.parametrize("length", [-5, 0, 2, 78])
def test_contexts_that_cannot_be_are_refused(length):
    weights = with_positions(weights_of("efficientsam3-repvit-s"), 77)

    with pytest.raises(ValueError, match=f"cannot have {length} tokens"):
        recognise(weights, context_length=length)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("detector_model.vision_encoder.backbone.head.0.weight", ()),
        ("detector_model.text_encoder.embeddings.token_embedding.weight", (8,)),
        (POSITIONS, (16, 512)),
    ],
)
def test_weights_of_odd_shape_are_named(key, shape):
    weights = weights_of("efficientsam3-tinyvit-s") | {key: torch.empty(shape, device="meta")}

    with pytest.raises(ValueError, match=f"{key} has shape .*, but needs"):
        recognise(weights)


def test_unknown_trunks_and_towers_are_described():
    weights = weights_of("efficientsam3-tinyvit-s")
    head = "detector_model.vision_encoder.backbone.head.0.weight"

    with pytest.raises(ValueError, match="No tinyvit of the zoo ends in 999 channels"):
        recognise(weights | {head: torch.empty(1024, 999, 1, 1, device="meta")})
    with pytest.raises(ValueError, match="of no known family"):
        recognise({k: v for k, v in weights.items() if "patch_embed" not in k})
    with pytest.raises(ValueError, match="width 512, 5 layers and RepMixer"):
        recognise({k: v for k, v in weights.items() if ".layers.5." not in k})
