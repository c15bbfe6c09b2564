"""Files of real size, without their values: named, completed, recognised and checked."""

import pytest
import torch
from torch import Tensor

from conversion.checking import refuse_misfits
from conversion.donors import Completed, complete, name_weights
from conversion.recognition import Variant, recognise
from tests.conversion.test_renaming import TEXT, VISION, released, sam3_file

GEOMETRY = "detector.geometry_encoder."
TRACKER = ("tracker.", f"{VISION}sam2_convs.")

Weights = dict[str, Tensor]


def check(source: Weights, donor: Weights | None = None) -> tuple[Variant, Completed]:
    """All that conversion does before it writes."""
    completed = complete(
        name_weights(source).weights,
        "file.pt",
        name_weights(donor).weights if donor else None,
        "sam3.pt" if donor else None,
    )
    variant = recognise(completed.weights)
    refuse_misfits(variant.config, completed.weights)
    return variant, completed


def pick(weights: Weights, *prefixes: str) -> Weights:
    return {key: value for key, value in weights.items() if key.startswith(prefixes)}


def lite_text(case: str) -> Weights:
    """SAM 3 with the text tower of another file."""
    teacher = {key: value for key, value in sam3_file().items() if not key.startswith(TEXT)}
    return teacher | pick(released(case), TEXT)


def as_sam31(weights: Weights) -> Weights:
    """The same model in SAM 3.1: three levels, a third neck, modules for clicks apart."""
    modules = ("sam_prompt_encoder.", "sam_mask_decoder.", "mask_downsample.", "obj_ptr_proj.")
    result = {}
    for key, value in weights.items():
        if "convs.3." in key:
            continue
        if key.startswith(f"{VISION}sam2_convs."):
            result[key.replace("sam2", "interactive")] = value
            result[key.replace("sam2", "propagation")] = value
        elif key == "tracker.no_mem_embed":
            result["tracker.model.interactivity_no_mem_embed"] = value
        elif key.startswith("tracker."):
            name = key.removeprefix("tracker.")
            result[f"tracker.model.{name}"] = value
            if name.startswith(modules):
                result[f"tracker.model.interactive_{name}"] = value
        else:
            result[key] = value
    return result


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("ev_s_s1_ctx32", "efficientsam3-efficientvit-s-mobileclip-s1-ctx32"),
        ("tv_s_teacher_inst", "efficientsam3-tinyvit-s-sam3text"),
    ],
)
def test_complete_files_need_no_donor(case, name):
    variant, completed = check(released(case))

    assert variant.name == name
    assert completed.donated == ()
    assert (variant.config.tracker_config is None) == (case == "ev_s_s1_ctx32")


def test_sam3_is_the_teacher():
    variant, _ = check(sam3_file())

    assert variant.name == "sam3"


@pytest.mark.parametrize(
    ("case", "name"),
    [("rv_m_s0_ctx16", "sam3-litetext-s0"), ("ev_s_s1_ctx32", "sam3-litetext-s1-ctx32")],
)
def test_litetext_is_sam3_with_a_small_tower(case, name):
    variant, _ = check(lite_text(case))

    assert variant.name == name


@pytest.mark.parametrize("manifest", ["manifest", "variant_trainer_noprefix"])
def test_fine_tuned_files_are_completed_by_sam3(manifest):
    variant, completed = check(released("rv_m_s0_ctx16", manifest=manifest), sam3_file())

    assert variant.name == "efficientsam3-repvit-m"
    assert variant.config.tracker_config is not None
    assert set(completed.donated) == {
        "point branch of the geometry encoder",
        "geometry encoder",
        "tracker neck",
        "tracker",
    }


def test_files_of_sam31_are_converted():
    student = released("tv_s_teacher_inst")

    variant, _ = check(as_sam31(student))
    assert variant.name == "efficientsam3-tinyvit-s-sam3text"
    assert variant.config.tracker_config.vision_config.scale_factors == [4.0, 2.0, 1.0]

    variant, _ = check(as_sam31(lite_text("rv_m_s0_ctx16")))
    assert variant.name == "sam3-litetext-s0"
    assert variant.config.vision_config.scale_factors == [4.0, 2.0, 1.0]


def test_text_files_of_december_get_their_image_side_from_sam3():
    table = "encoder.positional_embedding.pos_embed.pos_embed"
    text = pick(released("ev_s_s1_ctx32"), TEXT)
    text[TEXT + table] = torch.empty(1, 1, 77, 512, device="meta")

    variant, _ = check(text, sam3_file())

    assert variant.name == "sam3-litetext-s1-ctx32"
    assert variant.config.text_config.max_position_embeddings == 77
