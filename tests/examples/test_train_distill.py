"""The one command for every stage, run as users run it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from distillation.processes import train_by_command
from distillation.worlds import tiny_student, tiny_teacher
from ranks import Started, free_port, of_several
from safetensors.torch import load_file
from tiny import tiny_config, tiny_video_config, tiny_vision
from transformers import AutoConfig

from efficientsam3_hf import zoo
from efficientsam3_hf.data.phrases import write_phrases
from efficientsam3_hf.distillation import calibration
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.launch import STAGES, explain, prepare

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_distill.py"
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
PHRASES = ["a red car", "dog", "two people on a bench", "the small cat left of the sofa"]
PHRASES += ["window", "green glass bottle", "a white horse", "traffic light"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Folders of a teacher, a student, a configuration alone, and phrases."""
    folder = tmp_path_factory.mktemp("world")
    tiny_teacher().save(folder / "teacher")
    tiny_student().save(folder / "student")
    video = tiny_video_config("perceiver", tiny_vision())
    zoo.save(tiny_config(tiny_vision(), tracker_video_config=video), folder / "variant")
    write_phrases(PHRASES, folder / "phrases.txt")
    return folder


def write_config(world: Path, path: Path, **sections) -> Path:
    content = {
        "student": str(world / "student"),
        "teacher": {"name": str(world / "teacher"), "dtype": "float32"},
        **sections,
    }
    defaults = {"logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-3}
    content["training"] = {**defaults, **content["training"]}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def images(world, tmp_path) -> Path:
    data = {"format": "synthetic", "length": 8, "side": 112, "eval_split": "val", "eval_length": 3}
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    return write_config(
        world, tmp_path / "images.yaml", stage="stage1_image", data=data, training=training
    )


@pytest.fixture
def texts(world, tmp_path) -> Path:
    data = {"format": "phrases", "root": str(world / "phrases.txt")}
    training = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4}
    training |= {"ema_decay": 0.9, "freeze_norms": True}
    return write_config(
        world, tmp_path / "texts.yaml", stage={"name": "stage1_text"}, data=data, training=training
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_accelerate_launches_it(images, world, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += [str(SCRIPT), "--config", str(images), "--training.output_dir", str(output)]

    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    assert json.loads((output / "eval_results.json").read_text())["eval_trunk_cosine"] < 1
    (record,) = json.loads((output / "training_record.json").read_text())
    assert record["teacher"] == "teacher"
    assert record["command"].startswith("train_distill.py --config images.yaml")
    assert str(tmp_path) not in json.dumps(record)
    trained, before = (load_file(f / "model.safetensors") for f in (output, world / "student"))
    moved = {name for name in before if not torch.equal(before[name], trained[name])}
    assert moved
    assert all(".vision_encoder.backbone." in name for name in moved)
    assert Family.load(output).has_video


def test_two_processes_take_the_steps_of_one(texts, tmp_path):
    flags = ["--training.max_steps", "2", "--training.save_strategy", "no"]
    flags += ["--training.optim", "sgd", "--training.learning_rate", "0.1"]
    flags += ["--data.eval_limit", "5"]
    alone = prepare(texts, [*flags, "--training.output_dir", str(tmp_path / "one")])
    pair = [*flags, "--training.output_dir", str(tmp_path / "two")]
    pair += ["--training.per_device_train_batch_size", "2", "--training.ddp_backend", "gloo"]

    port = free_port()
    ranks = [Started(train_by_command, texts, pair, **of_several(rank, 2, port)) for rank in (0, 1)]
    alone.train()
    for rank in ranks:
        rank.finish()

    one, two = (load_file(tmp_path / each / "model.safetensors") for each in ("one", "two"))
    before = tiny_student().detector.state_dict()
    moved = 0.0
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-5, atol=1e-6)
        if name.startswith("detector_model."):
            moved += float((tensor - before[name.removeprefix("detector_model.")]).abs().sum())
    assert moved > 0
    measured = [
        json.loads((tmp_path / each / "eval_results.json").read_text()) for each in ("one", "two")
    ]
    for name in ("eval_loss", "eval_cosine", "eval_token_error"):  # five phrases by two processes
        assert measured[0][name] == pytest.approx(measured[1][name], rel=1e-5)


def test_a_killed_run_goes_on_as_if_nothing_had_been(texts, tmp_path):
    whole = ["--training.output_dir", str(tmp_path / "whole")]
    killed = ["--training.output_dir", str(tmp_path / "killed")]
    step = random.randint(2, 5)
    victim = Started(train_by_command, texts, killed, step)
    prepare(texts, whole).train()
    victim.finish(code=-9)
    assert (tmp_path / "killed" / f"checkpoint-{step // 2 * 2}").is_dir()
    assert not (tmp_path / "killed" / "model.safetensors").exists()  # it did not come to the end

    prepare(texts, [*killed, "--training.resume_from_checkpoint", "true"]).train()

    for name in ("", "checkpoint-6"):
        one, two = (
            load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "killed")
        )
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", ["stage3_concepts", "stage3_joint"])
def test_scores_are_calibrated_after_stage_3(stage, world, tmp_path, monkeypatch):
    # Random weights are right of nothing: every second detection is called right.
    monkeypatch.setattr(calibration, "rightness", lambda masks, *_: np.arange(len(masks)) % 2 == 0)
    data = {"format": "synthetic", "length": 2, "side": 112, "eval_split": "val", "eval_length": 4}
    clips = {"format": "synthetic", "length": 1, "side": 112, "clip_length": 2, "eval_length": 1}
    sections: dict[str, Any] = {"data": data, "calibration": {"share": 0.5}}
    training: dict[str, Any] = {"max_steps": 1, "save_strategy": "no", "confidence": 0.05}
    training["per_device_train_batch_size"] = 1
    if stage == "stage3_joint":
        sections["clips"] = clips
        training["images_per_clip"] = 1
        sections["student"] = str(world / "perceiver")
        tiny_student("perceiver").save(world / "perceiver")
    path = write_config(world, tmp_path / "c.yaml", stage=stage, training=training, **sections)
    run = prepare(path, ["--training.output_dir", str(tmp_path / "out")])
    taken, left = run.held_out
    assert sorted([*taken.indices, *left.indices]) == [0, 1, 2, 3]
    assert len(taken) == 2

    run.train()

    config = AutoConfig.from_pretrained(tmp_path / "out")
    found = run.trainer.calibration
    assert (config.score_temperature, config.score_bias) == (found.temperature, found.bias)
    assert (found.temperature, found.bias) != (1.0, 0.0)
    assert (
        f"| score temperature | `{found.temperature:.4g}` |"
        in (tmp_path / "out" / "README.md").read_text()
    )
    assert any("score_bias" in entry for entry in run.trainer.state.log_history)
    evaluated = run.trainer.eval_dataset
    assert (evaluated["images"] if stage == "stage3_joint" else evaluated) is left


def test_scores_that_cannot_be_calibrated_are_left_and_it_is_said(world, tmp_path, caplog):
    data = {"format": "synthetic", "length": 2, "side": 112, "eval_split": "val", "eval_length": 4}
    training = {"max_steps": 1, "save_strategy": "no"}
    stage = {"stage": "stage3_concepts", "data": data, "training": training}
    path = write_config(world, tmp_path / "c.yaml", **stage)
    out = ["--training.output_dir", str(tmp_path / "out")]

    too_few, without = (
        prepare(path, [*out, "--calibration.share", share]) for share in ("0.2", "0")
    )
    too_few.calibrate()
    assert "images to evaluate on is none" in caplog.text
    assert len(too_few.eval_dataset) == len(without.eval_dataset) == 4
    assert without.held_out[0] is None

    some = prepare(path, [*out, "--calibration.share", "0.5"])
    some.calibrate()  # random weights, which are right of nothing
    assert "both right and wrong" in caplog.text
    assert some.student.configuration.score_temperature == 1.0


def test_a_new_student_is_made_from_the_teacher(images, world, tmp_path):
    flags = ["--student.name", str(world / "variant"), "--student.pretrained_trunk", "false"]
    run = prepare(images, [*flags, "--training.output_dir", str(tmp_path / "out")])

    assert run.parent is None
    assert run.student.tracker.config.memory == "perceiver"
    for part in ("detector.detr_encoder", "tracker.mask_decoder"):
        kept = run.teacher.models.get_submodule(part).state_dict()
        assert kept
        for name, tensor in run.student.get_submodule(part).state_dict().items():
            assert torch.equal(tensor, kept[name]), name
    alone = prepare(images, [*flags, "--teacher.tracker", "false"]).student
    assert alone.tracker is None


def test_a_teacher_in_half_precision_leaves_the_student_whole(images, world, tmp_path):
    flags = ["--student.name", str(world / "variant"), "--student.pretrained_trunk", "false"]
    flags += ["--teacher.dtype", "bfloat16", "--training.output_dir", str(tmp_path / "out")]
    run = prepare(images, flags)

    exact = tiny_teacher().detector.detr_encoder.state_dict()
    for name, tensor in run.student.detector.detr_encoder.state_dict().items():
        assert torch.equal(tensor, exact[name]), name
    run.trainer.train()
    assert run.teacher.detector.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage", "stage1_imag"], r"'stage1_imag' is no stage. Did you mean 'stage1_image'\?"),
        (["--trainin.max_steps", "3"], r"Did you mean 'training'\?"),
        (["--training.max_step", "3"], r"'max_step' is no setting of training. Did you mean"),
        (["--data.rot", "x"], r"'rot' is no setting of data. Did you mean 'root'\?"),
        (["--data.format", "cocoa"], r"'cocoa' is no format of pictures. Did you mean 'coco'\?"),
        (["--data.augment", "much"], "none of none, flip, all"),
        (["--training.max_steps", "many"], "Section training: .*max_steps"),
        (["--student", ""], "Say what to train"),
        (["--student", "efficientsam3-tinyvit-xs"], "efficientsam3-tinyvit"),
        (["--data.streaming", "true", "--data.limit", "3"], "choose a fraction"),
        (["--calibration.share", "0.1"], "no section calibration"),
        (["--stage", "stage3_concepts", "--calibration.share", "1"], "less than 1"),
    ],
)
def test_a_wrong_setting_is_an_error_that_helps(images, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        _ = prepare(images, [*flags, "--training.output_dir", str(tmp_path)]).trainer


def test_a_wrong_key_of_a_file_is_an_error_that_helps(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("stage: stage1_text\nstudnet: x\n")

    with pytest.raises(ValueError, match=r"'studnet' is no section .* Did you mean 'student'\?"):
        prepare(path)


def test_a_flag_goes_before_the_file(images):
    run = prepare(images, ["--training.learning_rate", "0.5", "--data.scale", "1", "2"])

    assert run.training.learning_rate == 0.5
    assert run.training.max_steps == 2
    assert run.data.scale == [1.0, 2.0]


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_help_names_every_setting(stage):
    text = " ".join(explain(stage).split())

    assert "--student.pretrained_trunk (True)" in text
    assert "--data.augment ('all')" in text
    assert "--training.ema_decay (0.0)" in text
    assert ("--training.keep_targets" in text) == (stage == "stage1_text")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_that_come_along_are_read(path, tmp_path):
    flags = ["--training.output_dir", str(tmp_path), "--training.use_cpu", "true"]

    run = prepare(path, flags)

    student = run.student_settings
    if student.name in zoo.names():
        assert student.memory == "perceiver"  # or stage 2 would have nothing to train
    else:  # what another of them writes
        folders = {yaml.safe_load(each.read_text())["training"]["output_dir"] for each in CONFIGS}
        assert student.name in folders
    assert run.data.for_evaluation() is not None
    assert (run.clips.for_evaluation() is not None) == run.stage.with_clips
    metric = run.training.metric_for_best_model
    assert metric is None or run.training.eval_strategy == run.training.save_strategy
