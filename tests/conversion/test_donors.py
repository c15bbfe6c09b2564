"""Parts that a file lacks: who gives them, and what is said when nobody does."""

import pytest
import torch
from released import (
    GEOMETRY,
    TRACKER,
    VISION,
    convert_tiny,
    only,
    our_weights,
    released,
    save,
    without,
)
from safetensors.torch import load_file, save_file
from tiny import TINY_CLIP, TINY_VIT, tiny_config
from transformers import Sam3Config, Sam3Model

from conversion.sources import find_donor
from efficientsam3_hf import EfficientSam3Model, EfficientSam3TrackerModel


@pytest.fixture(scope="module")
def whole():
    return released()


@pytest.fixture
def fine_tuned(whole, tmp_path):
    """As the fine-tuned files are: without geometry encoder, second neck and tracker."""
    return save({"model": without(whole, GEOMETRY, *TRACKER)}, tmp_path / "stage3.pt")


def parts_of(record) -> dict[str, str]:
    return {part["part"]: part["from"] for part in record["parts"]}


def test_a_file_without_geometry_encoder_is_refused_with_what_to_do(fine_tuned, tmp_path):
    with pytest.raises(ValueError, match=r"stage3\.pt lacks the geometry encoder") as error:
        convert_tiny(fine_tuned, tmp_path / "out")

    for hint in ("detector.geometry_encoder.*", "tracker.*", "--donor SAM3", "sam3.pt"):
        assert hint in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_whole_donor_gives_all_that_is_missing(whole, fine_tuned, tmp_path):
    donor = save({key: value + 1 for key, value in whole.items()}, tmp_path / "sam3.pt")

    record = convert_tiny(fine_tuned, tmp_path / "out", donor)

    assert {name for name, origin in parts_of(record).items() if origin == "donor"} == {
        "point branch of the geometry encoder",
        "geometry encoder",
        "tracker neck",
        "tracker",
    }
    weights, own = load_file(tmp_path / "out" / "model.safetensors"), our_weights()
    for name, tensor in weights.items():
        donated = name.startswith(("tracker", "detector_model.geometry_encoder."))
        assert torch.equal(tensor, own[name] + 1 if donated else own[name]), name
    assert record["donor"]["address"] == "sam3.pt"
    EfficientSam3TrackerModel.from_pretrained(tmp_path / "out")


def test_a_donor_without_tracker_gives_a_folder_for_concepts_only(whole, fine_tuned, tmp_path):
    donor = save(only(whole, GEOMETRY), tmp_path / "geometry.pt")

    record = convert_tiny(fine_tuned, tmp_path / "out", donor)

    assert any("concept model only" in note for note in record["notes"])
    model = EfficientSam3Model.from_pretrained(tmp_path / "out")
    assert model.config.tracker_config is None
    with pytest.raises(ValueError, match="serves the concept model only"):
        EfficientSam3TrackerModel.from_pretrained(tmp_path / "out")


def test_a_donor_that_lacks_it_too_is_named(whole, fine_tuned, tmp_path):
    donor = save(only(whole, *TRACKER), tmp_path / "tracker.pt")

    with pytest.raises(ValueError, match=r"Neither stage3\.pt nor its donor tracker\.pt holds"):
        convert_tiny(fine_tuned, tmp_path / "out", donor)


def test_what_the_source_has_stays_its_own(whole, tmp_path):
    source = save(whole, tmp_path / "source.pt")
    donor = save({key: value + 1 for key, value in whole.items()}, tmp_path / "donor.pt")

    record = convert_tiny(source, tmp_path / "out", donor)

    assert set(parts_of(record).values()) == {"source"}


def test_half_a_tracker_is_refused(whole, tmp_path):
    source = save(without(whole, "tracker."), tmp_path / "half.pt")

    with pytest.raises(ValueError, match=r"lacks the tracker \(tracker\.\*\)"):
        convert_tiny(source, tmp_path / "out")


def test_half_a_part_is_refused(whole, tmp_path):
    source = save(without(whole, f"{GEOMETRY}encode.0.norm1"), tmp_path / "half.pt")
    donor = save(whole, tmp_path / "donor.pt")

    with pytest.raises(ValueError, match=r"2 missing \(geometry_encoder\.layers\.0\.layer_norm1"):
        convert_tiny(source, tmp_path / "out", donor)


@pytest.mark.parametrize("form", ["folder", "prefixed", "file"])
def test_transformers_sam3_gives_all_but_exemplar_points(fine_tuned, tmp_path, form):
    config = tiny_config()
    shared = ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
    teacher = Sam3Model(
        Sam3Config(
            vision_config=TINY_VIT,
            text_config={key: value for key, value in TINY_CLIP.items() if key != "model_type"},
            **{f"{part}_config": getattr(config, f"{part}_config").to_dict() for part in shared},
        )
    )
    teacher.save_pretrained(tmp_path / "sam3")
    weights = tmp_path / "sam3" / "model.safetensors"
    if form != "folder":
        prefix = "detector_model." if form == "prefixed" else ""
        save_file({prefix + k: v.clone() for k, v in load_file(weights).items()}, weights)
    donor = find_donor(str(weights if form == "file" else tmp_path / "sam3"))

    record = convert_tiny(fine_tuned, tmp_path / "out", donor)

    assert any("refuses exemplar points" in note for note in record["notes"])
    model = EfficientSam3Model.from_pretrained(tmp_path / "out")
    for name, tensor in teacher.geometry_encoder.state_dict().items():
        assert torch.equal(tensor, model.geometry_encoder.state_dict()[name])
    inputs = {"pixel_values": torch.zeros(1, 3, 112, 112), "input_ids": torch.ones(1, 16).long()}
    assert model(**inputs, input_boxes=torch.full((1, 1, 4), 0.5)).pred_masks.isfinite().all()
    with pytest.raises(ValueError, match="takes no exemplar points"):
        model(**inputs, input_points=torch.full((1, 1, 2), 0.5))


def test_a_trunk_alone_is_completed_by_a_whole_donor(whole, tmp_path):
    trunk = only(whole, f"{VISION}trunk.model.")
    prefix = f"{VISION}trunk."
    source = save({key.removeprefix(prefix): v for key, v in trunk.items()}, tmp_path / "trunk.pt")
    donor = save(without(whole, prefix), tmp_path / "sam3.pt")

    record = convert_tiny(source, tmp_path / "out", donor)

    origins = parts_of(record)
    assert origins.pop("image trunk") == "source"
    assert set(origins.values()) == {"donor"}
