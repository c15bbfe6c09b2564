"""What all stages share, shown on stage 1 for images."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distillation.processes import (
    distance,
    train_by_one_and_by_two,
    train_on_a_full_disk,
    train_whole_and_killed,
    weights_of,
)
from distillation.worlds import Pictures, image_trainer, tiny_student
from no_doubles import NoDoubles
from ranks import Started
from tiny import tiny_model, tiny_vision

from efficientsam3_hf import EfficientSam3Model, EfficientSam3TrackerVideoModel
from efficientsam3_hf.distillation.checkpoints import last_checkpoint
from efficientsam3_hf.distillation.ema import MovingAverage
from efficientsam3_hf.distillation.family import Family


def test_training_brings_the_student_to_the_teacher_and_leaves_the_rest(tmp_path):
    student = tiny_student()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = image_trainer(
        tmp_path, student, max_steps=40, learning_rate=3e-3, targets=["trunk"], logging_steps=5
    )
    trainer.train_dataset = Pictures(4)
    teacher = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}

    trainer.train()

    angles = [entry["trunk_angle"] for entry in trainer.state.log_history if "loss" in entry]
    assert angles[-1] < 0.5 * angles[0]  # finer detail than a stride of 32 is out of its reach
    for name, tensor in trainer.teacher.state_dict().items():
        assert torch.equal(tensor, teacher[name]), name
    after = student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".backbone." in name for name in moved)


def test_frozen_norms_keep_their_statistics(tmp_path):
    student = tiny_student()
    before = {n: t.clone() for n, t in student.state_dict().items() if "running_" in n}

    image_trainer(tmp_path, student, freeze_norms=True).train()

    for name, tensor in before.items():
        assert torch.equal(tensor, student.state_dict()[name]), name


def test_a_checkpoint_is_the_whole_student_and_nothing_of_the_teacher(tmp_path):
    trainer = image_trainer(tmp_path, save_strategy="steps", save_steps=2)

    trainer.train()

    folder = tmp_path / "checkpoint-2"
    loaded = Family.load(folder)
    for name, tensor in trainer.family.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert isinstance(loaded.tracker, EfficientSam3TrackerVideoModel)
    EfficientSam3Model.from_pretrained(folder)
    own = sum(weight.numel() for weight in trainer.family.parameters())
    stored = weights_of(folder)
    assert sum(t.numel() for n, t in stored.items() if "running_" not in n) < own * 1.01
    assert not any("embeddings.patch_embeddings" in name for name in stored)  # a ViT's


def test_the_record_of_a_stage_follows_that_of_the_one_before(tmp_path):
    first = image_trainer(tmp_path / "first")
    first.train()
    first.save_model()
    second = image_trainer(tmp_path / "second", Family.load(tmp_path / "first"))
    second.parent = tmp_path / "first"

    second.train()
    second.save_model()

    record = json.loads((tmp_path / "second" / "training_record.json").read_text())
    assert [entry["steps"] for entry in record] == [2, 2]
    assert record[1]["initial_weights"] == {"student": "first"}
    assert record[1]["stage"] == "stage 1: images"
    assert "stage 1: images" in (tmp_path / "second" / "README.md").read_text()


def test_four_batches_of_one_and_one_batch_of_four_take_the_same_step(tmp_path):
    settings = {"max_steps": 1, "optim": "sgd", "freeze_norms": True, "max_grad_norm": 0.0}
    whole, parts = tiny_student(), tiny_student()

    image_trainer(tmp_path / "a", whole, per_device_train_batch_size=4, **settings).train()
    trainer = image_trainer(
        tmp_path / "b",
        parts,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **settings,
    )
    trainer.train()

    start_state, moved = tiny_student().state_dict(), 0.0
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, parts.state_dict()[name], rtol=1e-5, atol=1e-6)
        moved += (tensor - start_state[name]).abs().sum().item()
    assert moved > 0


def test_two_processes_take_the_step_of_one(tmp_path):
    one, two = train_by_one_and_by_two(image_trainer, tmp_path)

    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-5, atol=1e-6)
    assert distance(one, whole_names(tiny_student())) > 0


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    train_whole_and_killed(image_trainer, tmp_path, ema_decay=0.9)

    at_the_end, last = weights_of(tmp_path / "whole"), weights_of(tmp_path / "whole/checkpoint-4")
    assert distance(at_the_end, last) > 0  # the average is saved


def test_the_average_follows_a_plain_computation():
    layer = torch.nn.Linear(2, 1, bias=False)
    average = MovingAverage(layer, 0.5)
    expected = layer.weight.detach().clone()

    for step in range(1, 5):
        with torch.no_grad():
            layer.weight.add_(float(step))
        average.on_step_end(None, type("State", (), {"global_step": step}), None)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()

    torch.testing.assert_close(average.weights["weight"], expected)


def test_a_loss_that_is_no_number_stops_training_before_it_is_saved(tmp_path, monkeypatch):
    trainer = image_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    step = trainer.student_step

    def broken(student, inputs, targets):
        terms = step(student, inputs, targets)
        return {name: term * float("nan") for name, term in terms.items()} if ready() else terms

    def ready() -> bool:
        return trainer.state.global_step == 2

    monkeypatch.setattr(trainer, "student_step", broken)
    with pytest.raises(FloatingPointError, match=r"step 3.*checkpoint-2.*resume from it"):
        trainer.train()

    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_what_was_saved_before(tmp_path, part: str):
    image_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    said = Started(train_on_a_full_disk, image_trainer, tmp_path, part).finish()

    assert "checkpoint-4 could not be written" in said
    assert "checkpoint-2 is whole. If the disk is full, make room" in said
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()


def test_a_checkpoint_that_only_failed_to_be_pushed_stays(tmp_path, monkeypatch):
    trainer = image_trainer(tmp_path, save_strategy="steps", save_steps=2)

    def offline(folder: str) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(trainer, "_push_from_checkpoint", offline)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "init_hf_repo", lambda **options: None)
    with pytest.raises(OSError, match=r"^no connection"):
        trainer.train()

    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_new_run_in_a_used_folder_is_refused(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2}
    image_trainer(tmp_path, **fields).train()

    with pytest.raises(ValueError, match=r"checkpoint-2 is of an earlier run.*another output_dir"):
        image_trainer(tmp_path, **fields).train()

    trainer = image_trainer(tmp_path, max_steps=3, **fields)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    trainer.stage = "stage 3: concepts"
    with pytest.raises(
        ValueError, match="is of 'stage 1: images', and this is 'stage 3: concepts'"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_samples_a_second_are_those_of_training_alone(tmp_path, monkeypatch):
    fields = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = image_trainer(tmp_path, max_steps=3, pictures_every=1, **fields)
    save, score, clock = trainer._save, trainer.score, [0.0]  # every step takes a second
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow(method: Callable) -> Callable:
        def called(*args: Any) -> Any:
            clock[0] += 1000
            return method(*args)

        return called

    def step(student, inputs, targets, step=trainer.student_step):
        clock[0] += 0 if trainer.is_evaluating else 1
        return step(student, inputs, targets)

    for name, method in {"_save": save, "score": score, "draw": trainer.draw}.items():
        monkeypatch.setattr(trainer, name, slow(method))
    monkeypatch.setattr(trainer, "student_step", step)
    clock[0] += 1000  # what comes between making a trainer and training

    trainer.train()

    rates = [each["samples_per_second"] for each in trainer.state.log_history if "loss" in each]
    assert rates == pytest.approx([4, 4, 4])


def test_a_lack_of_memory_says_what_to_do(tmp_path, monkeypatch):
    trainer = image_trainer(tmp_path)

    def hungry(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "student_step", hungry)
    with pytest.raises(MemoryError, match=r"step 1, with a batch of pixel_values \(4, 3, 112"):
        trainer.train()


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    trainer = image_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text()[:20])

    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_evaluation_gives_the_mean_of_the_terms_over_all_samples(tmp_path):
    student = tiny_student()
    trainer = image_trainer(tmp_path, student, per_device_eval_batch_size=4, targets=["trunk"])

    metrics = trainer.evaluate()

    student.eval()
    errors = []
    for index in range(6):
        inputs = {"pixel_values": Pictures(6)[index]["pixel_values"][None]}
        with torch.no_grad():
            terms = trainer.student_step(student, inputs, trainer.teacher_step(inputs))
        errors.append(float(terms["trunk_error"]))
    assert metrics["eval_trunk_error"] == pytest.approx(sum(errors) / 6, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(
        metrics["eval_trunk_error"] + metrics["eval_trunk_angle"]
    )


def test_evaluation_needs_no_doubles_of_the_device(tmp_path, monkeypatch):
    trainer = image_trainer(tmp_path)
    expected = trainer.evaluate()
    step = trainer.student_step

    def on_device(student, inputs, targets):
        terms = step(student, inputs, targets)
        return {name: term.as_subclass(NoDoubles) for name, term in terms.items()}

    monkeypatch.setattr(trainer, "student_step", on_device)

    assert trainer.evaluate()["eval_loss"] == expected["eval_loss"]


@pytest.mark.parametrize("trunk", ["repvit_m0_9", "tiny_vit_5m_224", "efficientvit_b0"])
def test_norms_and_biases_have_a_rate_of_their_own_and_no_decay(tmp_path, trunk: str):
    student = Family(tiny_model(tiny_vision(trunk=trunk)))
    rates = {"trunk_learning_rate": 0.1, "norm_learning_rate": 0.5, "weight_decay": 0.2}
    trainer = image_trainer(tmp_path, student, trained_parts=["detector.*"], **rates)

    optimizer = trainer.create_optimizer()

    names = {weight: name for name, weight in student.named_parameters()}
    small = {  # of norms, whatever they are called, and biases
        weight
        for module in student.modules()
        for name, weight in module.named_parameters(recurse=False)
        if "Norm" in type(module).__name__ or "bias" in name
    }
    seen = set()
    for group in optimizer.param_groups:
        for weight in group["params"]:
            name = names[weight]
            expected = 1e-3 * (0.1 if ".trunk." in name else 1) * (0.5 if weight in small else 1)
            assert group["lr"] == pytest.approx(expected), name
            assert group["weight_decay"] == (0 if weight in small else 0.2), name
            seen.add(weight)
    assert seen == {weight for weight in student.parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_weights": {"trunk": 1}}, "trunk_error, trunk_angle"),
        ({"trained_parts": ["brain"]}, "'brain' names nothing to train"),
        ({"ema_decay": 1.0}, "less than 1"),
        ({"targets": ["head"]}, "some of trunk, neck"),
    ],
)
def test_settings_that_cannot_be_are_errors(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        image_trainer(tmp_path, **fields)


def whole_names(student: Family) -> dict[str, torch.Tensor]:
    """Weights of a student's detector under their names on disk."""
    return {f"detector_model.{name}": x for name, x in student.detector.state_dict().items()}
