"""Stage 3 on images and clips: the terms of both stages, in one step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation.joint_worlds import batch_of, joint_student, make_trainer
from distillation.processes import distance, train_by_one_and_by_two
from distillation.worlds import tiny_student, tiny_teacher

from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.launch import prepare
from efficientsam3_hf.distillation.memory_terms import TERMS
from efficientsam3_hf.distillation.stage2_memory import (
    MemoryDistillationArguments,
    MemoryDistillationTrainer,
)
from efficientsam3_hf.distillation.stage3_concepts import ConceptTrainer, ConceptTrainingArguments

SGD = {"optim": "sgd", "freeze_norms": True, "max_grad_norm": 0.1}


def terms_of(trainer: Any, inputs: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        targets = trainer.teacher_step(inputs)
    return trainer.student_step(trainer.family, inputs, targets)


def test_terms_and_counts_are_those_of_the_two_stages(tmp_path):
    student = joint_student()
    trainer = make_trainer(tmp_path, student)
    inputs = batch_of(trainer)
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "seed": 3}
    of_images = ConceptTrainer(
        student,
        ConceptTrainingArguments(confidence=0.05, **settings),
        teacher=trainer.teacher,
    )
    of_clips = MemoryDistillationTrainer(
        student, MemoryDistillationArguments(**settings), teacher=trainer.teacher
    )
    student.set_trainable(trainer.trained_parts, freeze_norms=True)
    student.train()

    terms, counts = terms_of(trainer, inputs), trainer.count(inputs)

    images, clips = (
        terms_of(each, inputs[name]) for name, each in (("images", of_images), ("clips", of_clips))
    )
    expected = images | {f"clip_{name}": term for name, term in clips.items()}
    assert terms.keys() == expected.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], msg=name)
    clip_counts = of_clips.count(inputs["clips"])
    assert counts == {
        **of_images.count(inputs["images"]),
        **{f"clip_{name}": number for name, number in clip_counts.items()},
    }
    assert {trainer.units[name] for name in terms} <= counts.keys()


def test_images_reach_concepts_and_clips_memory_and_both_the_trunk(tmp_path):
    trainer = make_trainer(tmp_path)
    terms = terms_of(trainer, batch_of(trainer))
    weights = {n: w for n, w in trainer.family.named_parameters() if w.requires_grad}

    reached = {}
    for kind in (True, False):
        chosen = [term for name, term in terms.items() if name.startswith("clip_") == kind]
        gradients = torch.autograd.grad(
            torch.stack(chosen).sum(), list(weights.values()), retain_graph=True, allow_unused=True
        )
        reached[kind] = {
            name
            for name, each in zip(weights, gradients, strict=True)
            if each is not None and each.any()
        }

    trunk = {name for name in weights if ".backbone.trunk." in name}
    assert trunk <= reached[True] & reached[False]
    assert {name.split(".")[0] for name in reached[True] - reached[False]} == {"tracker"}
    assert any("spatial_perceiver" in name for name in reached[True])
    assert any("tracker.vision_encoder.neck" in name for name in reached[True])
    assert any("detr_decoder" in name for name in reached[False])
    assert {name.split(".")[0] for name in reached[False]} == {"detector"}
    assert not any("mask_decoder" in name and name.startswith("tracker") for name in weights)


def test_training_lowers_the_loss_of_images_and_of_clips_and_leaves_the_teacher(tmp_path):
    trainer = make_trainer(
        tmp_path, images=2, max_steps=10, learning_rate=3e-3, per_device_train_batch_size=1
    )
    teacher = {name: each.clone() for name, each in trainer.teacher.state_dict().items()}

    trainer.train()

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]

    def total(entry: dict[str, float], of_clips: bool) -> float:
        names = [name for name in trainer.units if name in entry]
        names = [name for name in names if name.startswith("clip_") == of_clips]
        return sum(trainer.factors[name] * entry[name] for name in names)

    assert total(logs[-1], False) < 0.85 * total(logs[0], False)
    assert total(logs[-1], True) < 0.85 * total(logs[0], True)
    for name, each in trainer.teacher.state_dict().items():
        assert torch.equal(each, teacher[name]), name


def test_the_weight_of_clips_is_that_of_all_their_terms(tmp_path):
    trainer = make_trainer(tmp_path, clip_weight=0.5, loss_weights={"clip_focal": 3.0})

    expected = {f"clip_{name}": 0.5 * factor for name, (_, factor) in TERMS.items()}
    expected["clip_focal"] = 3.0
    found = {name: each for name, each in trainer.factors.items() if name.startswith("clip_")}
    assert found == expected


def test_four_batches_of_one_and_one_batch_of_four_take_the_same_step(tmp_path):
    whole, parts = joint_student(), joint_student()
    one = make_trainer(tmp_path / "a", whole, per_device_train_batch_size=4, max_steps=1, **SGD)
    four = make_trainer(
        tmp_path / "b",
        parts,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=1,
        **SGD,
    )

    one.train()
    four.train()

    assert distance(whole.state_dict(), joint_student().state_dict()) > 0
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, parts.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_two_processes_take_the_steps_of_one(tmp_path):
    one, two = train_by_one_and_by_two(make_trainer, tmp_path, max_grad_norm=0.1)

    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)


def test_a_run_that_was_stopped_within_an_epoch_goes_on_with_its_groups(tmp_path):
    settings = {"max_steps": 4, "save_steps": 3, "per_device_train_batch_size": 2}
    whole = make_trainer(tmp_path / "a", save_strategy="steps", **settings)
    whole.train()  # epochs of two steps: the third checkpointed step is within one

    again = make_trainer(tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))

    expected = whole.family.state_dict()
    for name, tensor in again.family.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_student_or_teacher_without_video_is_an_error(tmp_path):
    student = tiny_student()
    with pytest.raises(ValueError, match="The student has no tracker in video"):
        make_trainer(tmp_path, Family(student.detector))


def test_the_command_trains_on_both_and_evaluates_each(tmp_path):
    tiny_teacher().save(tmp_path / "teacher")
    joint_student().save(tmp_path / "student")
    settings = {
        "stage": "stage3_joint",
        "student": tmp_path / "student",
        "teacher": tmp_path / "teacher",
        "data.format": "synthetic",
        "data.side": 112,
        "data.length": 3,
        "data.eval_length": 2,
        "clips.format": "synthetic",
        "clips.side": 112,
        "clips.clip_length": 2,
        "clips.length": 1,
        "clips.eval_split": "val",
        "training.output_dir": tmp_path / "out",
        "training.images_per_clip": 2,
        "training.max_steps": 1,
        "training.per_device_train_batch_size": 1,
        "training.use_cpu": True,
        "training.pictures_every": 1,
        "training.save_strategy": "no",
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    prepare(None, flags).train()

    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert {"eval_images_cgF1", "eval_images_loss", "eval_clips_J&F", "eval_clips_loss"} <= set(
        results
    )
    names = {path.stem for path in (tmp_path / "out" / "pictures").rglob("*.png")}
    assert "clip_0" in names
    assert len(names) > 2
    (record,) = json.loads((tmp_path / "out" / "training_record.json").read_text())
    assert record["datasets"] == ["Scenes", "Clips"]
    assert Family.load(tmp_path / "out").tracker.config.memory == "perceiver"


def test_a_section_of_clips_is_for_the_stage_that_has_them(tmp_path: Path):
    flags = ["--stage", "stage1_image", "--student", "x", "--clips.format", "synthetic"]
    with pytest.raises(ValueError, match="stage1_image has no section clips"):
        prepare(None, flags)
