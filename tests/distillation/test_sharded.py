"""FSDP2 and DeepSpeed: two processes that share weights out take the steps of one."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distillation.processes import distance, train_by_command, weights_of
from distillation.sharded import start
from distillation.worlds import tiny_student, tiny_teacher
from safetensors.torch import load_file

from efficientsam3_hf.distillation.ema import EMA_FILE

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
STAGES = {
    "stage1_image": {"max_grad_norm": 0.1},
    "stage3_concepts": {"max_grad_norm": 0.1, "confidence": 0.05},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Folders of a teacher and a student."""
    folder = tmp_path_factory.mktemp("world")
    tiny_teacher().save(folder / "teacher")
    student = tiny_student()
    student.configuration.objective = {"mask_points": None}
    student.save(folder / "student")
    path = folder / "student" / "config.json"
    path.write_text(json.dumps(without_dropout(json.loads(path.read_text()))))
    return folder


def without_dropout(config: Any) -> Any:
    """A configuration without random numbers, which depend on how a batch is cut up."""
    if not isinstance(config, dict):
        return config
    return {name: 0.0 if "drop" in name else without_dropout(x) for name, x in config.items()}


def write_config(world: Path, stage: str, path: Path, **training) -> Path:
    data = {"format": "synthetic", "length": 8, "side": 112, "eval_split": "val", "eval_length": 3}
    training = {
        "max_steps": 2,
        "save_steps": 1,
        "optim": "adamw_torch",
        "adam_epsilon": 0.01,  # or the sign of a gradient near 0 would decide
        "learning_rate": 0.01,
        "weight_decay": 0.0,  # ZeRO decays weights that no loss reaches, too
        "freeze_norms": True,
        "disable_tqdm": True,
        "use_cpu": True,
        **STAGES[stage],
        **training,
    }
    content = {
        "stage": stage,
        "student": str(world / "student"),
        "teacher": {"name": str(world / "teacher"), "dtype": "float32"},
        "data": data,
        "training": training,
    }
    path.write_text(yaml.safe_dump(content))
    return path


# Stage 3 has all that stage 1 has. Under ZeRO-3 two processes on CPUs take minutes for it.
CASES = [
    ("fsdp2", "stage3_concepts"),
    ("zero2", "stage1_image"),
    ("zero2", "stage3_concepts"),
    ("zero3", "stage1_image"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "stage"),
    [pytest.param(*case, marks=[] if case[0] == "fsdp2" else needs_deepspeed) for case in CASES],
)
def test_two_processes_that_share_weights_out_take_the_steps_of_one(world, tmp_path, recipe, stage):
    decay = 0.0 if recipe == "zero3" else 0.5
    config = write_config(world, stage, tmp_path / "config.yaml", ema_decay=decay)
    out = "--training.output_dir"
    batch = "--training.per_device_train_batch_size"
    alone = [batch, "4", out, str(tmp_path / "one")]
    shared = [batch, "1", "--training.gradient_accumulation_steps", "2"]
    first = [*shared, out, str(tmp_path / "two")]
    again = [*shared, out, str(tmp_path / "again")]
    again += ["--training.resume_from_checkpoint", str(tmp_path / "two" / "checkpoint-1")]

    pair = start(recipe, config, [first, again])
    train_by_command(config, alone)
    for each in pair:
        each.finish()

    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert distance(one, weights_of(world / "student")) > 1e-3
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    resumed = weights_of(tmp_path / "again")
    for name, tensor in two.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)
    if decay:
        averages = [load_file(tmp_path / run / "checkpoint-2" / EMA_FILE) for run in ("one", "two")]
        for name, tensor in averages[0].items():
            torch.testing.assert_close(averages[1][name], tensor, rtol=1e-4, atol=1e-6)
    measured = [
        json.loads((tmp_path / run / "eval_results.json").read_text())["eval_loss"]
        for run in ("one", "two", "again")
    ]
    assert measured == pytest.approx([measured[0]] * 3, rel=1e-4)
