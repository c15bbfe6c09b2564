"""The teacher: whatever SAM 3 it comes from, faithful, frozen, and in nothing that is saved."""

import copy
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from ranks import run_ranks
from sam3_teachers import tiny_sam3, tiny_sam3_video
from tiny import TINY_CLIP, TINY_VIT, tiny_model, tiny_tracker_video
from torch import nn
from transformers import AutoModel
from transformers.integrations import deepspeed as deepspeed_integration

from efficientsam3_hf import zoo
from efficientsam3_hf.distillation.teacher import (
    KINDS,
    Teacher,
    clip_frames,
    load_teacher,
    loading_whole,
    to_map,
)

PIXELS = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([[49406, 320, 1615, 49407]])


@pytest.fixture(scope="module")
def sam3():
    return tiny_sam3()


@pytest.fixture(scope="module")
def sam3_video():
    return tiny_sam3_video()


@pytest.fixture(scope="module")
def both(sam3_video) -> Teacher:
    """Concept model and tracker, in float32."""
    return load_teacher(sam3_video, "float32", with_tracker=True)


@torch.no_grad()
def test_features_are_those_of_transformers_own_model(sam3):
    teacher = load_teacher(sam3, "float32")

    trunk, levels = (teacher.features(kind, PIXELS) for kind in ("trunk", "levels"))

    expected = sam3.vision_encoder(PIXELS)
    torch.testing.assert_close(trunk["trunk"], expected.last_hidden_state)
    assert list(levels) == ["level_0", "level_1", "level_2"]
    for number, level in enumerate(levels.values()):
        # Convolutions in another memory order round apart.
        torch.testing.assert_close(to_map(level), expected.fpn_hidden_states[number])


@torch.no_grad()
def test_features_for_the_tracker_are_those_of_transformers_own_model(sam3_video, both):
    frames = both.features("clip", PIXELS)

    outputs = sam3_video.detector_model.vision_encoder(PIXELS)
    expected, _ = sam3_video.get_vision_features_for_tracker(outputs)
    for feature, theirs in zip(frames.values(), expected, strict=True):
        torch.testing.assert_close(feature, theirs.transpose(0, 1))


@torch.no_grad()
def test_features_of_clips_stand_for_their_pixels(both):
    clips = PIXELS[:, None].expand(-1, 3, -1, -1, -1) + 0.1 * torch.arange(3)[:, None, None, None]
    boxes = torch.tensor([[[10.0, 20.0, 80.0, 90.0]]]).expand(2, -1, -1)
    features = both.features("clip", clips.flatten(0, 1))

    outputs = both(
        lambda models: models.tracker(frames=clip_frames(features, clips=2), input_boxes=boxes)
    )

    expected = both(lambda models: models.tracker(pixel_values=clips, input_boxes=boxes))
    torch.testing.assert_close(outputs.pred_masks, expected.pred_masks)


@torch.no_grad()
def test_concepts_are_found_as_by_transformers_own_model(sam3_video, both):
    boxes = torch.tensor([[[0.4, 0.5, 0.3, 0.2]]])  # with which theirs encodes geometry, too
    inputs = {"pixel_values": PIXELS[:1], "input_ids": IDS, "input_boxes": boxes}

    masks = both(lambda models: models.detector(**inputs).pred_masks)

    expected = sam3_video.detector_model(**inputs).pred_masks
    torch.testing.assert_close(masks, expected, atol=1e-4, rtol=1e-4)


def test_it_may_come_from_folders_and_models_of_both_families(sam3, sam3_video, tmp_path):
    sam3_video.save_pretrained(tmp_path / "theirs")
    whole = load_teacher(sam3_video, "float32", with_tracker=True)
    zoo.save("", tmp_path / "ours", whole.detector, whole.tracker)

    for folder in ("theirs", "ours"):
        teacher = load_teacher(tmp_path / folder, "float32", with_tracker=True)

        assert teacher.name.endswith(folder)
        for kind in KINDS:
            assert teacher.fingerprint(kind) == whole.fingerprint(kind)
            found, expected = teacher.features(kind, PIXELS), whole.features(kind, PIXELS)
            # A mapped file is not aligned as torch likes it, and BLAS then rounds apart.
            torch.testing.assert_close(found, expected)
    tracker_alone = load_teacher(tiny_tracker_video(vision=TINY_VIT), "float32")
    assert tracker_alone.features("clip", PIXELS).keys() == {"fine", "middle", "coarse"}
    assert load_teacher(tiny_model(TINY_VIT, TINY_CLIP)).dtype == torch.bfloat16


def test_the_trunk_is_there_once(both):
    assert both.detector.vision_encoder.backbone is both.tracker.vision_encoder.backbone
    assert len({id(each) for each in both.models.parameters()}) == len(
        list(both.models.parameters())
    )


def test_what_lacks_a_part_says_so(sam3):
    with pytest.raises(ValueError, match="a Sam3Model, has no tracker in video"):
        load_teacher(sam3, with_tracker=True)
    teacher = load_teacher(sam3)
    with pytest.raises(ValueError, match="come from the tracker, which this teacher, Sam3Model"):
        teacher.features("clip", PIXELS)
    with pytest.raises(ValueError, match="no features of kind 'neck'; kinds are trunk, levels"):
        teacher.features("neck", PIXELS)
    with pytest.raises(ValueError, match="dtype is one of float32, bfloat16, float16, not 'int8'"):
        load_teacher(sam3, "int8")
    with pytest.raises(TypeError, match="not a Sam3VisionModel"):
        load_teacher(sam3.vision_encoder)


def test_it_is_frozen_and_in_nothing_that_is_saved(sam3):
    class Holder(nn.Module):
        def __init__(self, teacher: Teacher):
            super().__init__()
            self.head = nn.Linear(32, 32)
            self.teacher = teacher

    teacher = load_teacher(sam3, "float32")
    before = {name: each.clone() for name, each in teacher.models.state_dict().items()}
    holder = Holder(teacher).train()

    features = holder.teacher.features("trunk", PIXELS)["trunk"]
    loss = (holder.head(features) - features).square().mean()
    loss.backward()

    assert not features.requires_grad
    assert not features.is_inference()
    assert all(each.grad is None for each in teacher.models.parameters())
    assert not any(each.requires_grad for each in teacher.models.parameters())
    assert not any(each.training for each in teacher.models.modules())
    assert set(holder.state_dict()) == {"head.weight", "head.bias"}
    assert len(list(holder.modules())) == 2
    assert all(torch.equal(before[name], x) for name, x in teacher.models.state_dict().items())


def test_the_model_it_comes_from_stays_as_it_is(both):
    family = tiny_model(TINY_VIT, TINY_CLIP).train()

    teacher = load_teacher(family, "bfloat16")

    assert family.training
    assert family.dtype == torch.float32
    assert all(each.requires_grad for each in family.text_encoder.parameters())
    assert teacher.detector is not family


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_and_keeps_the_rotary_frequencies(sam3, dtype: str):
    full, half = load_teacher(sam3, "float32"), load_teacher(sam3, dtype)

    features = half.features("levels", PIXELS)

    assert {each.dtype for each in features.values()} == {getattr(torch, dtype)}
    for name, expected in full.features("levels", PIXELS).items():
        error = (features[name].float() - expected).norm() / expected.norm()
        assert error < 0.02  # 8 bits of mantissa through two layers
    frequencies = [
        (x, y)
        for (name, x), (_, y) in zip(
            half.models.named_buffers(), full.models.named_buffers(), strict=True
        )
        if name.endswith("inv_freq")
    ]
    assert frequencies
    assert all(torch.equal(x, y) for x, y in frequencies)
    outputs = half(lambda models: models.detector(PIXELS[:1].to(half.dtype), input_ids=IDS))
    assert outputs.pred_masks.dtype == getattr(torch, dtype)


def test_it_keeps_its_precision_where_the_student_has_another(both):
    def answer(models, pixels):
        return models.detector(pixel_values=pixels, input_ids=IDS).pred_masks

    alone = both(answer, PIXELS[:1])

    with torch.autocast("cpu", torch.bfloat16):
        asked_within = both(answer, PIXELS[:1])

    assert torch.equal(asked_within, alone)


def test_the_fingerprint_is_of_weights_and_configuration_alone(sam3):
    expected = load_teacher(sam3, "float32").fingerprint("trunk")

    assert load_teacher(sam3, "bfloat16").fingerprint("trunk") == expected
    assert load_teacher(sam3, "float16").fingerprint("trunk") == expected
    stored_in_half = copy.deepcopy(sam3).to(torch.bfloat16)
    assert load_teacher(stored_in_half, "float32").fingerprint("trunk") == expected
    other_name = copy.deepcopy(sam3)
    other_name.config.vision_config.backbone_config._name_or_path = "elsewhere"
    assert load_teacher(other_name).fingerprint("trunk") == expected

    assert load_teacher(sam3).fingerprint("levels") != expected
    for change in ("weight", "neck", "window"):
        other = copy.deepcopy(sam3)
        with torch.no_grad():
            if change == "weight":
                other.vision_encoder.backbone.layers[0].mlp.fc1.bias[0] += 0.1
            elif change == "neck":
                other.vision_encoder.neck.fpn_layers[0].proj1.bias[0] += 0.1
            else:
                other.config.vision_config.backbone_config.layer_norm_eps = 0.1
        is_same = load_teacher(other).fingerprint("trunk") == expected
        assert is_same == (change == "neck")
        assert load_teacher(other).fingerprint("levels") != load_teacher(sam3).fingerprint("levels")


def test_a_compiled_trunk_computes_the_same(sam3):
    teacher = load_teacher(sam3, "float32")
    names = list(teacher.models.state_dict())
    expected = teacher.features("trunk", PIXELS)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    teacher.detector.vision_encoder.backbone.compile(backend=backend)
    features = teacher.features("trunk", PIXELS)

    assert compiled
    torch.testing.assert_close(features, expected)
    assert list(teacher.models.state_dict()) == names
    assert load_teacher(sam3, "float32").compile().name == "Sam3Model"


def test_loading_is_whole_while_the_student_loads_in_shards(monkeypatch):
    marker = object()
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(deepspeed_integration, "_hf_deepspeed_config_weak_ref", marker)

    with loading_whole():
        assert "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ
        assert not deepspeed_integration.is_deepspeed_zero3_enabled()

    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    assert deepspeed_integration._hf_deepspeed_config_weak_ref is marker


def test_one_process_or_ddp_only_moves_it(sam3):
    teacher = load_teacher(sam3, "float32")

    prepared = teacher.prepare(Accelerator(cpu=True))

    assert prepared.module is teacher.models
    assert prepared.device.type == "cpu"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_shards_it_only_under_zero_3(sam3, monkeypatch, stage: int):
    asked = []

    class Engine(nn.ModuleDict):
        def eval(self) -> None:  # DeepSpeed's gives nothing
            super().eval()

    def initialize(model, config):
        asked.append(config)
        return Engine({"module": model}).train(), None, None, None

    fake = SimpleNamespace(initialize=initialize)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    zero = {"stage": stage, "offload_param": {"device": "cpu"}, "offload_optimizer": {}}
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(
            deepspeed_plugin=SimpleNamespace(deepspeed_config={"zero_optimization": zero})
        ),
    )
    teacher = load_teacher(sam3, "bfloat16")

    teacher.prepare(accelerator)

    assert not teacher.module.training
    if stage == 2:
        assert not asked
        assert teacher.module is teacher.models
    else:
        (config,) = asked
        assert config["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}}
        assert config["bf16"] == {"enabled": True}
        assert config["fp16"] == {"enabled": False}


RANK = """
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from sam3_teachers import tiny_sam3_video
from torch.distributed.tensor import DTensor
from efficientsam3_hf.distillation.teacher import load_teacher

state = Accelerator(cpu=True)  # which itself shards on accelerators only
accelerator = SimpleNamespace(
    device=state.device, num_processes=2, distributed_type=DistributedType.FSDP
)
teacher = load_teacher(tiny_sam3_video(), "float32", with_tracker=True)
pixels = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(state.process_index))
ids = torch.tensor([[49406, 320, 1615, 49407]])
find = lambda models: models.detector(pixels, input_ids=ids).pred_masks
expected = [teacher.features(kind, pixels) for kind in ("trunk", "clip")], teacher(find)
teacher.prepare(accelerator)
weights = list(teacher.models.parameters())
assert all(isinstance(each, DTensor) for each in weights)
for _ in range(2):
    found = [teacher.features(kind, pixels) for kind in ("trunk", "clip")], teacher(find)
    torch.testing.assert_close(found, expected)
assert not any(each.requires_grad for each in weights)
print("rank", state.process_index, "of", state.num_processes, "is right")
"""


def test_two_ranks_shard_it_and_compute_the_same():
    outputs = run_ranks(RANK)

    assert [output.splitlines()[-1] for output in outputs] == [
        "rank 0 of 2 is right",
        "rank 1 of 2 is right",
    ]


def test_a_folder_of_sam3_is_what_auto_model_loads(sam3_video, tmp_path):
    sam3_video.save_pretrained(tmp_path)

    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "Sam3VideoModel"
