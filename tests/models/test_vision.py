"""Vision encoders of both necks: shapes, sizes, precisions, training."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import TRUNKS, WIDTH, stir, tiny_vision
from transformers import AutoModel, Sam3VisionConfig, Sam3VisionModel

from efficientsam3_hf import (
    EfficientSam3Backbone,
    EfficientSam3BackboneConfig,
    EfficientSam3VisionConfig,
    EfficientSam3VisionModel,
)

NECKS = ("sam3", "lateral")


def vision_model(neck: str = "sam3", trunk: str = "efficientvit_b0") -> EfficientSam3VisionModel:
    torch.manual_seed(0)
    return stir(EfficientSam3VisionModel(EfficientSam3VisionConfig(**tiny_vision(neck, trunk))))


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("neck", NECKS)
def test_pyramid_keeps_the_contract_of_sam3(neck: str, trunk: str):
    model = vision_model(neck, trunk)
    size = model.config.image_size

    output = model(torch.randn(2, 3, size, size))

    shapes = [(2, WIDTH, side, side) for side in (32, 16, 8, 4)]
    assert [tuple(level.shape) for level in output.fpn_hidden_states] == shapes
    assert [tuple(position.shape) for position in output.fpn_position_encoding] == shapes
    assert output.last_hidden_state.shape == (2, 64, WIDTH)
    assert model.config.backbone_feature_sizes == [[32, 32], [16, 16], [8, 8]]


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("neck", NECKS)
@pytest.mark.parametrize("size", [(32, 48), (64, 64), (96, 160), (504, 504)])
@torch.no_grad()
def test_other_sizes_work_at_call_time(neck: str, trunk: str, size: tuple[int, int]):
    if neck == "lateral" and size == (504, 504):
        size = (512, 480)
    model = vision_model(neck, trunk)

    output = model(torch.randn(1, 3, *size))

    patch = model.config.backbone_config.patch_size
    grid = (size[0] // patch, size[1] // patch)
    scaled = [(4 * grid[0], 4 * grid[1]), (2 * grid[0], 2 * grid[1]), grid]
    assert [tuple(level.shape[2:]) for level in output.fpn_hidden_states[:3]] == scaled
    assert all(level.isfinite().all() for level in output.fpn_hidden_states)


@pytest.mark.parametrize(
    ("neck", "size", "message"),
    [
        ("lateral", (120, 128), "multiples of 16 from 32 on, not an image of 120 x 128"),
        ("lateral", (16, 64), "multiples of 16 from 32 on"),
        ("sam3", (112, 20), "28 pixels and more, not an image of 112 x 20"),
    ],
)
def test_a_size_that_cannot_work_is_an_error_that_says_which_do(neck, size, message):
    with pytest.raises(ValueError, match=message):
        vision_model(neck)(torch.zeros(1, 3, *size))


def test_the_level_that_nothing_reads_is_not_computed_nor_trained():
    model = vision_model("sam3")
    called = []
    model.neck.fpn_layers[3].register_forward_hook(lambda *args: called.append(args))

    output = model(torch.randn(1, 3, 112, 112))

    assert not called
    assert not any(p.requires_grad for p in model.neck.fpn_layers[3].parameters())
    levels = output.fpn_hidden_states
    assert levels[3].data_ptr() == levels[2].data_ptr()  # a view


def test_lateral_neck_has_no_wide_head_and_no_transposed_convolution():
    model = vision_model("lateral")

    assert model.backbone.head is None
    assert not any(isinstance(m, torch.nn.ConvTranspose2d) for m in model.modules())


@pytest.mark.parametrize("trunk", TRUNKS)
def test_backbone_serves_transformers_own_vision_model(trunk: str):
    ours = vision_model("sam3", trunk)
    config = Sam3VisionConfig(
        backbone_config=ours.config.backbone_config.to_dict(), fpn_hidden_size=WIDTH
    )
    stock = Sam3VisionModel(config).eval()
    missing, unexpected = stock.load_state_dict(ours.state_dict(), strict=False)
    pixel_values = torch.randn(2, 3, 112, 112)

    expected = stock(pixel_values)

    assert (missing, unexpected) == ([], [])
    output = ours(pixel_values)
    for level, of_stock in zip(
        output.fpn_hidden_states[:3], expected.fpn_hidden_states[:3], strict=False
    ):
        torch.testing.assert_close(level, of_stock)
    for position, of_stock in zip(
        output.fpn_position_encoding[:3], expected.fpn_position_encoding[:3], strict=False
    ):
        torch.testing.assert_close(position, of_stock)


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("neck", NECKS)
def test_gradient_checkpointing_changes_no_gradient(neck: str, trunk: str):
    model = vision_model(neck, trunk).train()
    model.apply(freeze_statistics)
    size = model.config.image_size
    pixel_values = torch.randn(2, 3, size, size)

    convolutions = [m for m in model.backbone.trunk.modules() if isinstance(m, torch.nn.Conv2d)]
    calls = []
    for convolution in convolutions:
        convolution.register_forward_pre_hook(lambda *args: calls.append(args[0]))

    gradients, counts = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model._set_gradient_checkpointing(True)
        model.zero_grad()
        calls.clear()
        sum(level.square().mean() for level in model(pixel_values).fpn_hidden_states).backward()
        counts.append(len(calls))
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )

    assert counts[0] == len(convolutions)
    assert counts[1] > 1.5 * counts[0]  # most of the trunk runs again in the backward pass
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)


def freeze_statistics(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.BatchNorm2d):
        module.eval()  # checkpointing runs the forward twice, and would count each batch twice


@pytest.mark.parametrize("neck", NECKS)
def test_every_trained_weight_gets_a_gradient(neck: str):
    model = vision_model(neck).train()
    size = model.config.image_size

    sum(
        level.square().mean()
        for level in model(torch.randn(2, 3, size, size)).fpn_hidden_states[:3]
    ).backward()

    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("neck", NECKS)
@torch.no_grad()
def test_half_precision_stays_near_full_precision(neck: str, dtype: torch.dtype, trunk: str):
    model = vision_model(neck, trunk)
    size = model.config.image_size
    pixel_values = torch.rand(1, 3, size, size) * 2 - 1
    expected = model(pixel_values).fpn_hidden_states[2]

    level = model.to(dtype)(pixel_values).fpn_hidden_states[2]

    assert level.dtype == dtype
    error = (level.float() - expected).norm() / expected.norm()
    assert error < (0.02 if dtype == torch.float16 else 0.12)  # 3 and 8 bits less of mantissa


def test_positions_of_fine_levels_are_exact_in_half_precision():
    model = vision_model("sam3")
    level = torch.zeros(1, WIDTH, 300, 300)

    exact = model.encode_positions(level)

    half = model.encode_positions(level.bfloat16())
    torch.testing.assert_close(half.float(), exact, atol=4e-3, rtol=0)  # one bfloat16 rounding


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("neck", NECKS)
@torch.no_grad()
def test_channels_last_gives_the_same(neck: str, trunk: str):
    model = vision_model(neck, trunk)
    size = model.config.image_size
    pixel_values = torch.randn(1, 3, size, size)
    expected = model(pixel_values)

    model.to(memory_format=torch.channels_last)
    seen = []
    last = [m for m in model.backbone.trunk.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    last.register_forward_hook(lambda module, args, result: seen.append(result))
    output = model(pixel_values.to(memory_format=torch.channels_last))

    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    for level, other in zip(output.fpn_hidden_states, expected.fpn_hidden_states, strict=False):
        torch.testing.assert_close(level, other, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_compiled_vision_encoder_is_one_graph_and_gives_the_same():
    for neck, trunk in [("sam3", "repvit_m0_9"), ("lateral", "tiny_vit_5m_224")]:
        torch._dynamo.reset()
        model = vision_model(neck, trunk)
        size = model.config.image_size
        pixel_values = torch.randn(1, 3, size, size)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

        output = compiled(pixel_values)

        expected = model(pixel_values)
        for level, other in zip(output.fpn_hidden_states, expected.fpn_hidden_states, strict=False):
            torch.testing.assert_close(level, other, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_fused_repvit_is_saved_and_loaded_fused(tmp_path):
    model = vision_model("sam3", "repvit_m0_9")
    pixel_values = torch.randn(1, 3, 112, 112)
    expected = model(pixel_values).fpn_hidden_states[2]
    model.fuse().save_pretrained(tmp_path)

    loaded = EfficientSam3VisionModel.from_pretrained(tmp_path).eval()

    assert loaded.config.backbone_config.fused
    level = loaded(pixel_values).fpn_hidden_states[2]
    torch.testing.assert_close(level, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trunk", TRUNKS)
@torch.no_grad()
def test_model_built_without_memory_loads_equal_to_one_built_with_it(trunk: str, tmp_path):
    model = vision_model("lateral", trunk)
    model.save_pretrained(tmp_path)

    loaded = AutoModel.from_pretrained(tmp_path)  # built on the meta device

    # TinyViT's index tables are in no checkpoint.
    for (name, buffer), (_, expected) in zip(
        loaded.named_buffers(), model.named_buffers(), strict=False
    ):
        assert torch.equal(buffer, expected), name
    pixel_values = torch.randn(1, 3, 128, 128)
    aligned = copy.deepcopy(loaded.eval())  # a mapped file is not aligned as torch likes it
    assert torch.equal(
        aligned(pixel_values).fpn_hidden_states[0], model(pixel_values).fpn_hidden_states[0]
    )


def test_fresh_trunk_starts_as_timm_starts_it():
    torch.manual_seed(0)
    config = EfficientSam3BackboneConfig(trunk="repvit_m0_9", hidden_size=32)

    trunk = EfficientSam3Backbone(config).trunk

    convolution = trunk.stem.conv2.c.weight
    bound = (convolution[0].numel()) ** -0.5  # of torch's own initialisation
    assert 0.5 * bound < convolution.std() < bound
    block = trunk.stages[0].blocks[0]
    assert (block.channel_mixer.conv2.bn.weight == 0).all()  # a branch begins as the identity
    assert (block.token_mixer.bn.weight == 1).all()


def test_stage_maps_are_returned_as_hidden_states():
    output = vision_model("sam3")(torch.zeros(1, 3, 112, 112), output_hidden_states=True)

    assert [h.shape[1] for h in output.hidden_states] == [16, 32, 64, 128]


def test_lateral_neck_refuses_a_backbone_with_a_head():
    with pytest.raises(
        StrictDataclassError, match="hidden_size=None and patch_size=16, not hidden_size=64"
    ):
        EfficientSam3VisionConfig(neck="lateral", backbone_config={"hidden_size": 64})


def test_unknown_neck_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        StrictDataclassError, match=r"expected one of \('sam3', 'lateral'\), got fpn"
    ):
        EfficientSam3VisionConfig(neck="fpn")
