"""The concept model given labels: its loss, its second group of queries, what stays as it is."""

import copy
import socket
from typing import Any

import pytest
import torch
from objective_cases import random_boxes
from tiny import tiny_config, tiny_model
from torch import Tensor, multiprocessing, nn
from transformers.models.sam3.modeling_sam3 import Sam3DetrDecoder

from efficientsam3_hf import EfficientSam3Model
from efficientsam3_hf.models.concept_targets import count_labels
from efficientsam3_hf.models.objective_config import ObjectiveConfig

OBJECTIVE = {"mask_points": None, "class_queries": 5}
OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
COUNTS = (2, 0, 1, 3)  # instances of each prompt, two prompts an image


def batch(seed: int = 0) -> dict[str, Any]:
    """Two images with two phrases each, and labels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(2, 3, 112, 112, generator=generator),
        "input_ids": torch.randint(1000, 40000, (4, 16), generator=generator),
        "image_indices": torch.tensor([0, 0, 1, 1]),
        "labels": [
            {
                "boxes": random_boxes(count, generator=generator),
                "masks": torch.rand(count, 32, 32, generator=generator) > 0.5,
            }
            for count in COUNTS
        ],
    }


def without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "labels"}


def learning(model: EfficientSam3Model) -> EfficientSam3Model:
    """The model in training, but for dropout and batch statistics: what it says can be compared."""
    model.eval()
    model.training = True
    return model


@pytest.fixture
def trained() -> EfficientSam3Model:
    return learning(tiny_model(objective=OBJECTIVE))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def assert_same_outputs(outputs: Any, expected: Any, **tolerance: float) -> None:
    for name in OUTPUTS:
        torch.testing.assert_close(outputs[name], expected[name], **tolerance)


@torch.no_grad()
def test_without_labels_there_is_no_loss(trained):
    outputs = trained(**without_labels(batch()))

    assert "loss" not in outputs
    assert "loss_dict" not in outputs
    assert outputs.to_tuple()[0] is outputs.pred_masks


@torch.no_grad()
def test_labels_change_no_output_be_it_in_training_or_not(trained):
    inputs = batch()
    expected = trained(**without_labels(inputs))

    in_training, outside = trained(**inputs), trained.eval()(**inputs)

    # The second group joins matrix products of the first, whose sums are then ordered differently.
    assert_same_outputs(in_training, expected, atol=1e-5, rtol=1e-4)
    assert_same_outputs(outside, expected, atol=1e-5, rtol=1e-4)
    assert in_training.decoder_reference_boxes.shape == expected.decoder_reference_boxes.shape
    assert any("one_to_many" in name for name in in_training.loss_dict)
    assert not any("one_to_many" in name for name in outside.loss_dict)
    assert in_training.to_tuple()[0] is in_training.loss


@torch.no_grad()
def test_the_second_group_is_the_first_without_self_attention(trained):
    decoder = trained.detr_decoder
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "vision_features": torch.randn(2, 64, 32, generator=generator),
        "text_features": torch.randn(2, 5, 32, generator=generator),
        "vision_pos_encoding": torch.randn(2, 64, 32, generator=generator),
        "text_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        "spatial_shapes": torch.tensor([[8, 8]]),
    }
    alone = decoder(**inputs)

    together = decoder.decode_twice(**inputs)

    silent = copy.deepcopy(decoder)
    for layer in silent.layers:
        layer.self_attn = Silence()
    apart = silent(**inputs)
    for name in ("intermediate_hidden_states", "reference_boxes"):
        first, second = together[name].chunk(2, dim=2)
        torch.testing.assert_close(first, alone[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(second, apart[name], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(together.presence_logits, alone.presence_logits)


class Silence(nn.Module):
    """Attention that says nothing."""

    def forward(self, query: Tensor, **kwargs) -> tuple[Tensor, None]:
        return torch.zeros_like(query), None


HEADS = {
    "box": "detr_decoder.box_head.",
    "score": "dot_product_scoring.",
    "presence": "detr_decoder.presence_head.",
    "mask": "mask_decoder.mask_embedder.",
    "semantic": "mask_decoder.semantic_projection.",
    "self-attention": "detr_decoder.layers.0.self_attn.",
    "queries": "detr_decoder.query_embed.",
    "trunk": "vision_encoder.backbone.",
}
SHARED = {"self-attention", "queries", "trunk"}


@pytest.mark.parametrize(
    ("terms", "taught"),
    [
        (("presence", "auxiliary_presence"), {"presence", *SHARED}),
        (("class", "auxiliary_class"), {"score", *SHARED}),
        (("l1",), {"box", *SHARED}),
        (("auxiliary_giou",), {"box", *SHARED}),
        (("mask", "dice"), {"mask", *SHARED}),
        (("semantic", "semantic_dice"), {"semantic", "trunk"}),
        (
            ("one_to_many_class", "auxiliary_one_to_many_class", "auxiliary_one_to_many_l1"),
            {"score", "box", "queries", "trunk"},
        ),
    ],
)
def test_each_term_reaches_the_heads_that_it_is_about(trained, terms, taught):
    losses = trained(**batch()).loss_dict

    sum(losses[name] for name in terms).backward()

    reached = {
        head
        for head, prefix in HEADS.items()
        for name, parameter in trained.named_parameters()
        if name.startswith(prefix) and parameter.grad is not None and parameter.grad.any()
    }
    assert reached == taught


def test_two_micro_batches_with_the_counts_of_the_whole_give_its_gradients(trained):
    inputs = batch()
    counts = count_labels(inputs["labels"])
    trained(**inputs).loss.backward()
    whole = gradients(trained)

    loss = 0
    for image in range(2):
        prompts = slice(2 * image, 2 * image + 2)
        part = trained(
            pixel_values=inputs["pixel_values"][[image]],
            input_ids=inputs["input_ids"][prompts],
            labels=inputs["labels"][prompts],
            loss_counts=counts,
        ).loss
        part.backward()
        loss += part.item()

    assert loss == pytest.approx(trained(**inputs).loss.item(), rel=1e-6)
    parts = gradients(trained)
    largest = max(gradient.norm() for gradient in whole.values())
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        # float32 through a deep network, whose sums over images are ordered differently. Some
        # gradients are nothing else, such as those of a bias that softmax takes away again.
        error = (parts[name] - gradient).norm()
        assert error < 1e-4 * gradient.norm() + 1e-6 * largest, name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those that have piled up, which are then forgotten."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_queries_without_a_mask_teach_boxes_and_scores(trained):
    inputs = batch()
    for label in inputs["labels"]:
        del label["masks"]

    outputs = trained(**inputs)

    assert outputs.loss.isfinite()
    assert not {"mask", "dice", "semantic", "semantic_dice"} & outputs.loss_dict.keys()


def test_a_batch_of_negatives_trains(trained):
    inputs = batch()
    for label in inputs["labels"]:
        label["boxes"], label["masks"] = label["boxes"][:0], label["masks"][:0]

    outputs = trained(**inputs)
    outputs.loss.backward()

    assert outputs.loss_dict["l1"] == outputs.loss_dict["class"] == outputs.loss_dict["mask"] == 0
    assert all(p.grad.isfinite().all() for p in trained.parameters() if p.grad is not None)


def test_bf16_autocast_comes_close_to_float32(trained):
    inputs = batch()
    expected = trained(**inputs).loss

    with torch.autocast("cpu", torch.bfloat16):
        loss = trained(**inputs).loss

    assert loss.dtype == torch.float32
    # Matches may change with scores and boxes rounded to three digits.
    assert loss.item() == pytest.approx(expected.item(), rel=0.1)


# transformers 5.23 has another name for it, which 5.20 lacks. Can go with the support for 5.20.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing(trained):
    trained.train()  # layers are checkpointed in training only
    inputs = batch()
    torch.manual_seed(0)  # of dropout
    trained(**inputs).loss.backward()
    expected = gradients(trained)

    trained.gradient_checkpointing_enable()
    torch.manual_seed(0)
    trained(**inputs).loss.backward()

    for name, gradient in gradients(trained).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3)


@pytest.mark.slow
# Dynamo looks whether what it is handed over after a break has a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_loss_goes_through_torch_compile(trained):
    inputs = batch()
    features = {
        "vision_embeds": trained.get_vision_features(inputs["pixel_values"]),
        "text_embeds": trained.get_text_features(inputs["input_ids"]),
    }
    inputs = {
        "image_indices": inputs["image_indices"],
        "labels": inputs["labels"],
        "vision_embeds": [
            level.detach() for level in features["vision_embeds"].fpn_hidden_states[:3]
        ],
        "text_embeds": features["text_embeds"].pooler_output.detach(),
    }
    expected = trained(**inputs)
    expected.loss.backward()
    wanted = gradients(trained)

    torch._dynamo.reset()
    outputs = torch.compile(trained, backend="eager")(**inputs)
    outputs.loss.backward()

    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=0)
    for name, gradient in gradients(trained).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-3)


def test_the_objective_is_saved_with_the_model(tmp_path):
    model = tiny_model(objective={"class_target": "one", "l1_weight": 7})
    model.save_pretrained(tmp_path)

    again = learning(EfficientSam3Model.from_pretrained(tmp_path))

    assert again.config.objective == {"class_target": "one", "l1_weight": 7}
    weighted = ObjectiveConfig(class_target="one", l1_weight=7).weights()
    terms = again(**batch())
    total = sum(weighted[name] * value for name, value in terms.loss_dict.items())
    torch.testing.assert_close(terms.loss, total)


def test_an_objective_given_to_from_pretrained_is_checked(tmp_path):
    tiny_model().save_pretrained(tmp_path)

    model = EfficientSam3Model.from_pretrained(tmp_path, objective={"l1_weight": 7})

    assert model.config.objective == {"l1_weight": 7}
    with pytest.raises(ValueError, match="no field 'l1_wight'"):
        EfficientSam3Model.from_pretrained(tmp_path, objective={"l1_wight": 7})


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"class_wieght": 1}, "no field 'class_wieght'"),
        ({"mask_points": 0}, "mask_points=0: it must be 1 or more"),
        ({"l1_weight": -1}, "l1_weight=-1: it must be 0 or more"),
        ({"class_target": "two"}, "class_target"),
        ({"giou_weight": "much"}, "giou_weight"),
    ],
)
def test_an_objective_that_cannot_be_meant_is_an_error(objective, message):
    with pytest.raises(Exception, match=message):
        tiny_config(objective=objective)


def test_local_box_bias_turns_queries_to_their_boxes():
    torch.manual_seed(0)
    decoder = EfficientSam3Model(tiny_config(init_local_box_bias=True)).detr_decoder
    box = torch.tensor([[[0.25, 0.75, 0.25, 0.25]]])  # columns 2 and 3 of 16, rows 10 to 13

    bias = decoder._get_rpb_matrix(box, (16, 16))[0, :, 0].unflatten(-1, (16, 16))

    inside = bias[:, 10:14, 2:6]
    assert (inside.flatten(1).min(1).values > -1).all()
    for far in (bias[:, :, 15], bias[:, 0]):
        assert (far < inside.flatten(1).min(1).values[:, None] - 3).all()
    assert (bias[: len(bias) // 2, 0, 15] < bias[len(bias) // 2 :, 0, 15]).all()


def test_local_box_bias_leaves_loaded_weights_alone(tmp_path):
    model = tiny_model(init_local_box_bias=True)
    model.save_pretrained(tmp_path)

    again = EfficientSam3Model.from_pretrained(tmp_path)

    for name in ("box_rpb_embed_x", "box_rpb_embed_y"):
        ours, theirs = (getattr(each.detr_decoder, name) for each in (model, again))
        for weight, expected in zip(theirs.parameters(), ours.parameters(), strict=True):
            assert torch.equal(weight, expected)


def test_weights_keep_transformers_names():
    ours = EfficientSam3Model(tiny_config()).detr_decoder

    stock = Sam3DetrDecoder(ours.config)

    assert ours.state_dict().keys() == stock.state_dict().keys()


def gradients_of_one_process(rank: int, port: int, folder: str) -> None:
    """Gradients of one image of the batch, averaged over two processes, on disk."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    model, inputs = learning(tiny_model(objective=OBJECTIVE)), batch()
    prompts = slice(2 * rank, 2 * rank + 2)
    model(
        pixel_values=inputs["pixel_values"][[rank]],
        input_ids=inputs["input_ids"][prompts],
        labels=inputs["labels"][prompts],
    ).loss.backward()
    found = gradients(model)
    for gradient in found.values():
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path, free_port):
    model = learning(tiny_model(objective=OBJECTIVE))
    model(**batch()).loss.backward()
    expected = gradients(model)

    multiprocessing.spawn(gradients_of_one_process, (free_port, str(tmp_path)), nprocs=2)

    found = torch.load(tmp_path / "gradients.pt")
    largest = max(gradient.norm() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error < 1e-4 * gradient.norm() + 1e-6 * largest, name  # as of micro-batches
