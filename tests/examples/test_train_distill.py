"""The one command for every stage, run as users run it."""

import json
import os
import random
import re
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
from efficientsam3_hf.distillation.arguments import build
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.folder_stages import RECIPES
from efficientsam3_hf.distillation.launch import STAGES, explain, prepare
from examples import train_distill

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
        (["--data.eval_format", "cocoa"], r"'cocoa' is no format of pictures. Did you mean"),
        (["--data.augment", "much"], r"invalid choice: 'much' \(choose from .*flip"),
        (["--data.clip_place", "middle"], r"invalid choice: 'middle' \(choose from .*start"),
        (["--data.on_error", "ignore"], r"invalid choice: 'ignore' \(choose from .*skip"),
        (["--teacher.dtype", "fp16"], r"invalid choice: 'fp16' \(choose from .*float16"),
        (["--student.memory", "dens"], r"invalid choice: 'dens' \(choose from .*perceiver"),
        (["--stage", ""], "stage is one of stage1_image"),
        (["--training.max_steps", "many"], "Section training: .*max_steps"),
        (["--training.max_steps"], "training: argument --max_steps.*: expected one"),
        (
            ["--training.loss_weights", "{trunk_angle: 2}"],
            "training: '{trunk_angle: 2}' is no JSON",
        ),
        (["--student", ""], "Say what to train"),
        (["--data.streaming", "true", "--data.limit", "3"], "choose a fraction"),
        (["--calibration.share", "0.1"], "no section calibration"),
        (["--stage", "stage3_concepts", "--calibration.share", "1"], "less than 1"),
    ],
)
def test_a_wrong_setting_is_an_error_that_helps(images, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        prepare(images, [*flags, "--training.output_dir", str(tmp_path)])


def test_a_wrong_name_of_a_student_is_an_error_that_helps(images, tmp_path):
    flags = ["--student", "efficientsam3-tinyvit-xs", "--training.output_dir", str(tmp_path)]

    with pytest.raises(ValueError, match="efficientsam3-tinyvit"):
        _ = prepare(images, flags).trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: .*--config FILE"),
        (["--config", "nowhere.yaml"], "error: There is no configuration nowhere.yaml"),
        (["--help", "--stage", "stage1_imag"], "error: .*Did you mean 'stage1_image'"),
        (["--stage=stage1_imag"], "error: .*Did you mean 'stage1_image'"),
    ],
)
def test_what_is_wrong_is_said_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        train_distill.main(arguments)

    assert left.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises((ValueError, OSError)):
        train_distill.main([*arguments, "--debug"])


def test_help_knows_the_stage_in_both_forms(capsys):
    for words in (["--stage", "stage1_text"], ["--stage=stage1_text"]):
        train_distill.main(["--help", *words])

        text = " ".join(capsys.readouterr().out.split())
        assert "--training.keep_targets" in text
        assert "--student.memory (None) A new student's memory" in text
        assert "One of perceiver, dense." in text


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


def test_nothing_can_be_said(tmp_path):
    path = tmp_path / "c.yaml"
    training = {"use_cpu": True, "output_dir": str(tmp_path), "targets": []}
    path.write_text(yaml.safe_dump({"stage": "stage3_joint", "student": "x", "training": training}))

    assert prepare(path).training.targets == []
    assert prepare(path, ["--training.targets"]).training.targets == []
    flags = ["--training.targets", "neck", "--training.dropout"]
    run = prepare(path, flags)
    assert run.training.targets == ["neck"]
    assert run.training.dropout
    training |= {"gradient_frames": None, "balance": None}
    path.write_text(yaml.safe_dump({"stage": "stage3_joint", "student": "x", "training": training}))
    with pytest.raises(ValueError, match="Section training: balance has no value"):
        prepare(path)
    assert prepare(path, ["--training.balance", "0"]).training.gradient_frames is None


def test_several_places_to_report_to(images, tmp_path):
    flags = ["--training.report_to", "tensorboard", "wandb"]
    path = tmp_path / "c.yaml"
    content = yaml.safe_load(images.read_text())
    content["training"]["report_to"] = ["tensorboard", "wandb"]
    path.write_text(yaml.safe_dump(content))

    assert prepare(images, flags).training.report_to == ["tensorboard", "wandb"]
    assert prepare(path).training.report_to == ["tensorboard", "wandb"]
    assert prepare(path, ["--training.report_to", "tensorboard"]).training.report_to == [
        "tensorboard"
    ]
    assert prepare(images).training.report_to == []


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
    training = run.training
    if training.metric_for_best_model is not None:  # or the last one would be the result
        assert training.load_best_model_at_end
        assert training.eval_strategy == training.save_strategy
        assert training.eval_steps == training.save_steps


def test_the_configurations_that_come_along_are_a_chain_of_all_stages():
    parents, stages = {}, {}
    for path in CONFIGS:
        content = yaml.safe_load(path.read_text())
        folder, student = content["training"]["output_dir"], content["student"]
        parents[folder] = student if isinstance(student, str) else student["name"]
        stages[folder] = content["stage"]

    for last in ("stage3_concepts", "stage3_joint"):
        folder, chain = f"outputs/{last}_tinyvit_s", []
        while folder in parents:
            chain.append(stages[folder])
            folder = parents[folder]
        first = ["stage1_image", "stage1_text", "stage1_prompts", "stage2_memory"]
        assert chain[::-1] == [*first, last]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_that_come_along_train_by_the_rules_of_distill(path, tmp_path):
    own = prepare(path, ["--training.use_cpu", "true"])
    stage = yaml.safe_load(path.read_text())["stage"]
    if stage not in RECIPES:
        assert stage in ("stage2_memory", "stage3_joint")
        return
    training = {**RECIPES[stage].training, "output_dir": str(tmp_path), "use_cpu": True}

    distill = build("training", training, STAGES[stage].arguments)

    for rule in (
        *("learning_rate", "trunk_learning_rate", "norm_learning_rate", "weight_decay"),
        *("warmup_steps", "lr_scheduler_type", "max_grad_norm", "freeze_norms", "dropout"),
    ):
        assert getattr(distill, rule) == getattr(own.training, rule), rule
