"""Perceiver memory and memory attention, against plain loops and transformers' own."""

import doctest

import pytest
import torch
from tiny import MEMORY_WIDTH, WIDTH, stir, tiny_tracker_video, tiny_video_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import EdgeTamVideoConfig, Sam3TrackerVideoConfig
from transformers.models.edgetam_video.modeling_edgetam_video import (
    EdgeTamVideoPerceiverResampler,
)
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
    Sam3TrackerVideoMemoryAttention,
)

from efficientsam3_hf import EfficientSam3TrackerVideoConfig, EfficientSam3TrackerVideoModel
from efficientsam3_hf.models import object_memory, perceiver_memory
from efficientsam3_hf.models.memory_attention import EfficientSam3MemoryAttention, Rotation
from efficientsam3_hf.models.perceiver_memory import (
    EfficientSam3PerceiverMemory,
    split_windows,
    window_bounds,
)


def perceiver(**fields) -> EfficientSam3PerceiverMemory:
    torch.manual_seed(0)
    config = tiny_video_config("perceiver", **fields)
    config._attn_implementation = "sdpa"
    return stir(EfficientSam3PerceiverMemory(config))


def maps(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(batch, MEMORY_WIDTH, height, width, generator=generator),
        torch.randn(1, MEMORY_WIDTH, height, width, generator=generator),
    )


def looped_attention(attention, latent: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """One latent (channels,) that looks at tokens (tokens, channels), head by head."""
    keys = attention.k_proj(tokens) + positions
    values = attention.v_proj(tokens) + positions
    query = attention.q_proj(latent)
    width = len(query) // attention.num_heads
    heads = []
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = (keys[:, part] @ query[part] / width**0.5).softmax(0)
        heads.append((weights[:, None] * values[:, part]).sum(0))
    return attention.o_proj(torch.cat(heads))


def looped_layers(module, latents: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """Latents (latents, channels) of one map or window."""
    for layer in module.layers:
        normed, seen = layer.layer_norm_latents(latents), layer.layer_norm_input(tokens)
        latents = latents + torch.stack(
            [looped_attention(layer.cross_attention, one, seen, positions) for one in normed]
        )
        latents = latents + layer.mlp(latents)
        normed = layer.layer_norm_self(latents)
        nowhere = torch.zeros_like(normed)
        latents = latents + torch.stack(
            [looped_attention(layer.self_attention, one, normed, nowhere) for one in normed]
        )
        latents = latents + layer.self_mlp(latents)
    return module.layer_norm(latents)


def looped_perceiver(module, memory_map: Tensor, position_map: Tensor) -> Tensor:
    """The whole Perceiver, image by image and window by window."""
    batch = []
    for image in memory_map:
        tokens, positions = image.flatten(1).T, position_map[0].flatten(1).T
        latents = [looped_layers(module, module.latents_1d, tokens, positions)]
        rows, columns = (window_bounds(side, module.side) for side in image.shape[1:])
        for index, latent in enumerate(module.latents_2d):
            top, bottom = rows[index // module.side]
            left, right = columns[index % module.side]
            window = image[:, top:bottom, left:right].flatten(1).T
            latents.append(looped_layers(module, latent[None], window, torch.zeros_like(window)))
        batch.append(torch.cat(latents))
    return torch.stack(batch)


@pytest.mark.parametrize("size", [(9, 9), (8, 8), (7, 11)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_perceiver_equals_plain_loops(heads: int, batch: int, size: tuple[int, int]):
    module = perceiver(perceiver_resampler_num_attention_heads=heads)
    memory_map, position_map = maps(batch, *size)

    latents = module(memory_map, position_map)

    assert latents.shape == (batch, 4 + 9, MEMORY_WIDTH)
    expected = looped_perceiver(module, memory_map, position_map)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_perceiver_equals_that_of_edgetam_where_that_one_works():
    config = EdgeTamVideoConfig(
        perceiver_resampler_num_latents=4,
        perceiver_resampler_num_latents_2d=9,
        perceiver_resampler_hidden_size=MEMORY_WIDTH,
        perceiver_resampler_mlp_intermediate_size=32,
        perceiver_resampler_attention_head_dim=MEMORY_WIDTH,
    )
    config._attn_implementation = "eager"
    module, theirs = perceiver(), EdgeTamVideoPerceiverResampler(config).eval()
    theirs.load_state_dict(module.state_dict())
    memory_map, position_map = maps(1, 9, 9)

    expected, expected_positions = theirs(memory_map, position_map)

    torch.testing.assert_close(module(memory_map, position_map), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.positions(), expected_positions[0])


@pytest.mark.parametrize("length", [72, 64, 36, 63])
@pytest.mark.parametrize("count", [1, 12, 16])
def test_windows_hold_every_pixel_once_and_differ_by_one_at_most(length: int, count: int):
    bounds = window_bounds(length, count)

    assert [pixel for start, end in bounds for pixel in range(start, end)] == list(range(length))
    sizes = {end - start for start, end in bounds}
    assert max(sizes) - min(sizes) <= 1
    pixels = torch.arange(float(length * length)).view(1, 1, length, length)
    tokens, inside = split_windows(pixels, count)
    kept = tokens.flatten() if inside is None else tokens[inside]
    assert torch.equal(kept.flatten().sort().values, torch.arange(float(length * length)))


@torch.no_grad()
def test_a_2d_latent_sees_its_window_only():
    module = perceiver()
    memory_map, position_map = maps(1, 8, 8)
    before = module(memory_map, position_map)[0, 4:].clone()

    memory_map[:, :, 7, 7] *= -3.0  # in the last window

    after = module(memory_map, position_map)[0, 4:]
    torch.testing.assert_close(after[:-1], before[:-1])
    assert not torch.allclose(after[-1], before[-1], atol=1e-3)


@pytest.mark.parametrize("fields", [{"num_latents": 0}, {"num_latents_2d": 0}])
@torch.no_grad()
def test_either_kind_of_latents_may_be_left_out(fields: dict):
    module = perceiver(**{f"perceiver_resampler_{name}": value for name, value in fields.items()})

    latents = module(*maps(2, 8, 8))

    assert latents.shape[1] == len(module.positions()) == (9 if "num_latents" in fields else 4)


def test_gradients_reach_every_weight_of_the_perceiver():
    module = perceiver(perceiver_resampler_num_attention_heads=4)

    module(*maps(2, 8, 8)).square().sum().backward()

    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def memory_attention(memory: str, **fields) -> EfficientSam3MemoryAttention:
    torch.manual_seed(0)
    config = tiny_video_config(memory, **fields)
    config._attn_implementation = "sdpa"
    return stir(EfficientSam3MemoryAttention(config))


def remembered(module, rows: int, frames: int, pointers: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens = frames * module.config.tokens_per_memory + pointers
    return {
        "features": torch.randn(rows, 64, WIDTH, generator=generator),
        "positions": torch.randn(1, 64, WIDTH, generator=generator),
        "memory": torch.randn(rows, tokens, MEMORY_WIDTH, generator=generator),
        "memory_positions": torch.randn(rows, tokens, MEMORY_WIDTH, generator=generator),
    }


@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_dense_memory_attention_equals_that_of_transformers(heads: int):
    sizes = tiny_video_config(memory_attention_num_attention_heads=heads).to_dict()
    config = Sam3TrackerVideoConfig(
        **{name: sizes[name] for name in sizes if name.startswith("memory_attention_")},
        image_size=112,
    )
    config._attn_implementation = "eager"
    ours = memory_attention("dense", memory_attention_num_attention_heads=heads)
    theirs = Sam3TrackerVideoMemoryAttention(config).eval()
    for layer in theirs.layers:  # transformers has a constant of 64 there
        layer.cross_attn_image.k_proj = nn.Linear(MEMORY_WIDTH, WIDTH)
        layer.cross_attn_image.v_proj = nn.Linear(MEMORY_WIDTH, WIDTH)
    theirs.load_state_dict(ours.state_dict())
    inputs = remembered(ours, rows=3, frames=2, pointers=5)

    outputs = ours(**inputs, num_object_pointer_tokens=5)

    expected = theirs(
        inputs["features"].transpose(0, 1),
        inputs["memory"].transpose(0, 1),
        inputs["positions"].expand(3, -1, -1).transpose(0, 1),
        inputs["memory_positions"].transpose(0, 1),
        num_object_pointer_tokens=5,
    )
    torch.testing.assert_close(outputs, expected[0], atol=1e-5, rtol=1e-4)


def looped_rotation(vector: Tensor, across: float, down: float, theta: float = 10000.0) -> Tensor:
    """One vector turned pair by pair: the first half by its column, the second by its row."""
    turned = vector.clone()
    pairs = len(vector) // 2
    for pair in range(pairs):
        place = across if pair < pairs // 2 else down
        step = (pair % (pairs // 2)) * 2 / pairs
        angle = torch.tensor(place / theta**step)
        first, second = vector[2 * pair], vector[2 * pair + 1]
        turned[2 * pair] = first * angle.cos() - second * angle.sin()
        turned[2 * pair + 1] = second * angle.cos() + first * angle.sin()
    return turned


def test_latents_are_turned_by_the_middle_of_their_windows_and_others_not_at_all():
    config = tiny_video_config("perceiver")
    rotation = Rotation.of_memory(config, torch.device("cpu")).repeat(2)
    keys = torch.randn(2 * 13 + 3, WIDTH)

    turned = rotation.turn(keys[None, None])[0, 0]

    middles = [0.5, 3.0, 6.0]  # of pixels 0-1, 2-4, 5-7
    for frame in range(2):
        start = frame * 13
        torch.testing.assert_close(turned[start : start + 4], keys[start : start + 4])
        for latent in range(9):
            place = start + 4 + latent
            expected = looped_rotation(keys[place], middles[latent % 3], middles[latent // 3])
            torch.testing.assert_close(turned[place], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned[26:], keys[26:])  # object pointers


@torch.no_grad()
def test_as_many_windows_as_pixels_make_positions_those_of_dense_memory():
    dense = tiny_video_config("dense")
    latents = tiny_video_config(
        "perceiver", perceiver_resampler_num_latents=0, perceiver_resampler_num_latents_2d=64
    )

    expected, rotation = (Rotation.of_memory(c, torch.device("cpu")) for c in (dense, latents))

    assert torch.equal(rotation.cosine, expected.cosine)
    assert torch.equal(rotation.sine, expected.sine)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("memory", ["dense", "perceiver"])
@torch.no_grad()
def test_padding_of_shorter_memories_changes_nothing(memory: str, implementation: str):
    module = memory_attention(memory)
    module.config._attn_implementation = implementation
    tokens = module.config.tokens_per_memory
    inputs = remembered(module, rows=2, frames=3, pointers=4)
    valid = torch.ones(2, 3 * tokens + 4, dtype=torch.bool)
    valid[1, tokens : 3 * tokens] = False  # the second row has one frame
    valid[1, -2:] = False  # and two pointers

    together = module(**inputs, num_object_pointer_tokens=4, valid=valid)

    alone = module(
        features=inputs["features"][1:],
        positions=inputs["positions"],
        memory=inputs["memory"][1:][:, valid[1]],
        memory_positions=inputs["memory_positions"][1:][:, valid[1]],
        num_object_pointer_tokens=2,
    )
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


def test_a_memory_of_broken_length_is_an_error():
    module = memory_attention("perceiver")
    inputs = remembered(module, rows=1, frames=2, pointers=4)

    with pytest.raises(ValueError, match="30 tokens are no multiple of the 13"):
        module(**inputs)


@pytest.mark.parametrize("memory", ["dense", "perceiver"])
@torch.no_grad()
def test_a_model_built_without_memory_remembers_the_same(memory: str, tmp_path):
    model = tiny_tracker_video(memory)
    model.save_pretrained(tmp_path)

    loaded = EfficientSam3TrackerVideoModel.from_pretrained(tmp_path).eval()

    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
    assert dict(loaded.named_buffers()).keys() <= state.keys()  # nothing that no checkpoint holds
    coarse, masks = torch.randn(2, WIDTH, 8, 8), torch.rand(2, 1, 128, 128)
    tokens = [each.encode_memories(coarse, masks, torch.ones(2, 1)) for each in (model, loaded)]
    assert torch.equal(*tokens)
    assert tokens[0].shape == (2, 64 if memory == "dense" else 13, MEMORY_WIDTH)
    assert torch.equal(model.memory_positions(), loaded.memory_positions())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"perceiver_resampler_num_latents_2d": 8}, "must be a square number of at most 8 x 8"),
        ({"perceiver_resampler_num_latents_2d": 81}, "must be a square number of at most 8 x 8"),
        ({"perceiver_resampler_num_attention_heads": 3}, "a number of heads that divides it"),
        ({"perceiver_resampler_hidden_size": 32}, "must equal memory_encoder_output_channels=16"),
        (
            {"perceiver_resampler_num_latents": 0, "perceiver_resampler_num_latents_2d": 0},
            "without latents remembers nothing",
        ),
        ({"memory_encoder_output_channels": 24}, "must be a multiple of"),
        ({"num_maskmem": 0}, "at least 1 memory"),
        ({"memory": "sparse"}, "expected one of"),
    ],
)
def test_sizes_that_do_not_fit_are_errors_that_say_why(fields: dict, message: str):
    with pytest.raises(Exception, match=message):
        tiny_video_config(**{"memory": "perceiver", **fields})


@pytest.mark.parametrize("module", [perceiver_memory, object_memory])
def test_examples_in_docstrings_are_true(module):
    result = doctest.testmod(module)

    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(("memory", "expected"), [("dense", 951.3), ("perceiver", 115.7)])
@torch.no_grad()
def test_the_cost_at_full_size_is_that_of_the_arithmetic(memory: str, expected: float):
    config = EfficientSam3TrackerVideoConfig(memory=memory)
    config._attn_implementation = "eager"
    tokens = 7 * config.tokens_per_memory + 16 * 4
    with torch.device("meta"):
        module = EfficientSam3MemoryAttention(config).eval()
        frame, memories = torch.empty(1, 72 * 72, 256), torch.empty(1, tokens, 64)

    with FlopCounterMode(display=False) as counter:
        module(frame, frame, memories, memories, num_object_pointer_tokens=16 * 4)

    assert round(counter.get_total_flops() / 1e9, 1) == expected
