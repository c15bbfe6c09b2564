"""The whole concept model against the reference implementation, on seeded random weights.

The case is EfficientViT-B0 with MobileCLIP-S1 at 32 tokens, at full size: text, long text, boxes,
mixed boxes, points. What its random trunk does to roundings is said in `test_trunks.py`; here too
nothing closer can be asked than the outputs move when every pixel moves by half a unit in the last
place.
"""

import pytest
import torch
from PIL import Image
from torch import Tensor

from conversion.renaming import rename
from efficientsam3_hf import EfficientSam3Model, EfficientSam3Processor, zoo
from efficientsam3_hf.models.checkpoint_layout import detector_weights
from tests.parity import materialise

CASE = "ev_s_s1_ctx32"
NAME = "efficientsam3-efficientvit-s-mobileclip-s1-ctx32"
META = materialise.read_meta(CASE)
TOLERANCE = 1e-3

pytestmark = pytest.mark.slow


def half_a_unit(pixel_values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, pixel_values.shape, generator=generator) * 2 - 1
    return pixel_values * (1 + sign * 6e-8)


def prompt_tensors(prompt: dict) -> dict[str, Tensor]:
    """Exemplars of a golden prompt, as the model takes them."""
    tensors = {}
    for kind, key in (("boxes", "box_cxcywh"), ("points", "point_xy")):
        if items := prompt.get(kind):
            tensors[f"input_{kind}"] = torch.tensor([[item[key] for item in items]])
            labels = [[int(item["positive"]) for item in items]]
            tensors[f"input_{kind}_labels"] = torch.tensor(labels)
    return tensors


def outputs_by_golden_name(outputs) -> dict[str, Tensor]:
    return {
        "pred_logits": outputs.pred_logits[..., None],
        "presence_logit_dec": outputs.presence_logits,
        "pred_boxes_xyxy": outputs.pred_boxes,
        "pred_masks": outputs.pred_masks,
        "semantic_seg": outputs.semantic_seg,
    }


@pytest.fixture(scope="module")
def model() -> EfficientSam3Model:
    weights = detector_weights(rename(materialise.build(CASE)).weights)
    with torch.device("meta"):
        model = EfficientSam3Model(zoo.config(NAME))
    loaded = EfficientSam3Model.from_pretrained(None, config=model.config, state_dict=weights)
    return loaded.eval()


@pytest.fixture(scope="module")
def processor() -> EfficientSam3Processor:
    return zoo.processor(NAME)


@pytest.fixture(scope="module")
def pixel_values() -> Tensor:
    inputs, _ = materialise.make_input(CASE)
    return inputs["pixel_values"]


@pytest.fixture(autouse=True)
def two_threads():
    """One full-size forward at a time: use both cores."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_token_ids_and_masks_are_those_of_the_reference(processor):
    inputs = processor(text=META["texts"])

    assert torch.equal(inputs["input_ids"], materialise.golden(CASE, "text.input_ids").long())
    padding = materialise.golden(CASE, "text.padding_mask").bool()
    assert torch.equal(inputs["attention_mask"] == 0, padding)


@torch.no_grad()
def test_text_features_are_those_of_the_reference(model, processor):
    features = model.get_text_features(**processor(text=META["texts"])).pooler_output

    difference, _ = materialise.compare(CASE, "text.features_LBC", features.transpose(0, 1))
    assert difference <= 1e-4


def test_pixels_of_a_photograph_are_those_of_the_reference(processor):
    with Image.open(materialise.ROOT / "image_640x427.png") as image:
        inputs = processor(images=image)

    difference, _ = materialise.compare(CASE, "proc.pixel_values", inputs["pixel_values"])
    assert difference < 2e-7  # one rounding: transformers scales and normalises in one step


@torch.no_grad()
def test_instances_are_those_of_the_reference(model, processor, pixel_values):
    vision = model.get_vision_features(pixel_values)
    disturbed = model.get_vision_features(half_a_unit(pixel_values))

    # One test for all prompts: they share the features, which are costly.
    movements: dict[str, float] = {}
    for tag, prompt in META["prompts"].items():
        inputs = {**processor(text=prompt["text"]), **prompt_tensors(prompt)}
        outputs = outputs_by_golden_name(model(vision_embeds=vision, **inputs))
        if not movements:  # by the first prompt, for all: they differ little
            moved = outputs_by_golden_name(model(vision_embeds=disturbed, **inputs))
            movements = {n: float((outputs[n] - moved[n]).abs().max()) for n in outputs}
        for name, tensor in outputs.items():
            difference, _ = materialise.compare(CASE, f"{tag}.{name}", tensor)
            allowed = max(TOLERANCE, movements[name])
            assert difference <= allowed, (tag, name, difference, movements[name])
