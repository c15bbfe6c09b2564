"""Stage 1 for text; what all stages share is in test_trainer.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distillation.worlds import tiny_student, tiny_teacher
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from efficientsam3_hf.data.collators import PhraseCollator
from efficientsam3_hf.data.loading import SampleStream, load
from efficientsam3_hf.data.phrases import PhraseList, TextSample, write_phrases
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.stage1_text import (
    TextDistillationArguments,
    TextDistillationTrainer,
    read,
)

PHRASES = [
    "a red car",
    "dog",
    "two people on a bench",
    "the small striped cat left of the sofa",
    "window",
    "green glass bottle",
    "a white horse",
    "traffic light",
]
SAMPLES = [TextSample(text, str(number)) for number, text in enumerate(PHRASES)]


@pytest.fixture(scope="module")
def teacher() -> Family:
    return tiny_teacher()


@pytest.fixture
def make_trainer(tmp_path: Path, teacher: Family, processor):
    def make(student: Family | None = None, train: Any = SAMPLES, **fields: Any):
        settings = {
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 5,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            **fields,
        }
        return TextDistillationTrainer(
            model=student or tiny_student(),
            args=TextDistillationArguments(output_dir=str(tmp_path), **settings),
            teacher=teacher,
            train_dataset=train,
            eval_dataset=SAMPLES[:3],
            data_collator=PhraseCollator(processor),
        )

    return make


def test_the_tower_learns_to_read_and_nothing_else_moves(make_trainer, teacher):
    student = tiny_student()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    taught = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = make_trainer(student, max_steps=60, learning_rate=1e-2, freeze_norms=True)

    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.1 * losses[0]
    assert all(torch.equal(tensor, taught[name]) for name, tensor in teacher.state_dict().items())
    after = student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in moved} == {"text_encoder", "text_projection"}
    assert not any("running_" in name for name in moved)


def test_every_term_trains_tower_and_projection(make_trainer):
    trainer = make_trainer()
    inputs = trainer.data_collator(SAMPLES[:4])
    student = trainer.family.train()

    terms = trainer.student_step(student, inputs, trainer.teacher_step(inputs))

    assert set(terms) == set(trainer.units)
    for name, term in terms.items():
        student.zero_grad()
        term.backward(retain_graph=True)
        trained = {n for n, w in student.named_parameters() if w.grad is not None and w.grad.any()}
        assert {each.split(".")[1] for each in trained} == {"text_encoder", "text_projection"}, name


def test_order_is_compared_once_and_only_if_it_counts(make_trainer):
    student = tiny_student()
    rows = []
    student.detector.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["input_ids"])),
        with_kwargs=True,
    )
    for weight, expected in ((0.1, [8]), (0.0, [4])):
        trainer = make_trainer(student, loss_weights={"order_error": weight})
        inputs = trainer.data_collator(SAMPLES[:4])
        rows.clear()
        terms = trainer.student_step(student, inputs, trainer.teacher_step(inputs))
        assert rows == expected
        assert ("order_error" in terms) == bool(weight)


def test_phrases_of_one_word_have_no_order(make_trainer):
    trainer = make_trainer()
    inputs = trainer.data_collator([SAMPLES[1], SAMPLES[4]])

    terms = trainer.student_step(trainer.family.eval(), inputs, trainer.teacher_step(inputs))

    assert terms["order_error"].item() == pytest.approx(0, abs=1e-9)


def test_a_stream_is_taught_as_it_comes_and_says_the_same(make_trainer):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(SAMPLES)

    kept, online = make_trainer(), make_trainer(train=Stream())
    inputs = kept.data_collator(SAMPLES[2:5])

    assert kept.targets is not None
    assert online.targets is None
    torch.testing.assert_close(kept.variance, online.variance)
    mask = inputs["attention_mask"][..., None]
    # Kept in float16.
    torch.testing.assert_close(
        kept.teacher_step(inputs) * mask, online.teacher_step(inputs) * mask,
        rtol=2**-11, atol=2**-25, check_dtype=False,
    )  # fmt: skip


@pytest.fixture
def stream(tmp_path) -> SampleStream:
    write_phrases(PHRASES, tmp_path / "phrases.txt")
    return load(PhraseList(str(tmp_path / "phrases.txt")), streaming=True).shuffle(0)


@pytest.mark.parametrize(("workers", "done"), [(0, 5), (0, 8), (2, 5)])
def test_a_stream_is_other_in_each_pass_and_goes_on_as_if_nothing_had_been(
    make_trainer, stream, tmp_path, workers: int, done: int
):
    fields = {"max_steps": 10, "per_device_train_batch_size": 2, "dataloader_num_workers": workers}
    fields |= {"save_strategy": "steps", "save_steps": done, "freeze_norms": True}

    def train(checkpoint: Path | None = None) -> tuple[list[tuple], dict[str, torch.Tensor]]:
        trainer = make_trainer(train=stream, **fields)
        seen, step = [], trainer.student_step

        def watched(student, inputs, targets):
            names = ("input_ids", "shuffled_ids")
            seen.append(tuple(tuple(map(tuple, inputs[name].tolist())) for name in names))
            return step(student, inputs, targets)

        trainer.student_step = watched
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return seen, trainer.family.state_dict()

    seen, weights = train()
    seen_again, weights_again = train(tmp_path / f"checkpoint-{done}")

    passes = [[ids for step in seen[first : first + 4] for ids in step[0]] for first in (0, 4)]
    assert set(passes[0]) == set(passes[1])  # four steps have each of eight phrases
    assert passes[0] != passes[1]
    shuffled = [
        dict(pair for step in seen[first : first + 4] for pair in zip(*step, strict=True))
        for first in (0, 4)
    ]
    assert shuffled[0] != shuffled[1]  # words change places otherwise
    assert seen_again == seen[done:]
    for name, tensor in weights.items():
        assert torch.equal(tensor, weights_again[name]), name


def test_the_end_of_a_stream_makes_no_step_of_fewer_batches(make_trainer, stream, monkeypatch):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = make_trainer(train=stream, **split)  # a pass of four batches has one too many
    step, seen = trainer.student_step, []
    monkeypatch.setattr(trainer, "student_step", lambda *args: seen.append(1) or step(*args))

    trainer.train()

    assert (trainer.state.global_step, len(seen)) == (2, 6)


def test_evaluation_counts_every_token_alike(make_trainer, teacher):
    trainer = make_trainer(per_device_eval_batch_size=2)

    metrics = trainer.evaluate()

    cosines, errors, powers = [], [], []
    student = trainer.family.eval()
    for sample in SAMPLES[:3]:
        inputs = trainer.data_collator.encode([sample.text])
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            own, theirs = (read(each, ids, mask)[mask.bool()] for each in (student, teacher))
        cosines += F.cosine_similarity(own, theirs, dim=-1).tolist()
        errors.append((own - theirs).square().sum())
        powers.append(theirs.square().sum())
    assert metrics["eval_cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-3)
    relative = (sum(errors) / sum(powers)) ** 0.5
    assert metrics["eval_relative_error"] == pytest.approx(relative.item(), rel=1e-3)


def test_four_batches_of_one_and_one_batch_of_four_take_the_same_step(make_trainer):
    settings = {"max_steps": 1, "optim": "sgd", "freeze_norms": True, "max_grad_norm": 0.0}
    whole, parts = tiny_student(), tiny_student()

    make_trainer(whole, **settings).train()
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    make_trainer(parts, **settings, **split).train()

    start, moved = tiny_student().state_dict(), 0.0
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, parts.state_dict()[name], rtol=1e-5, atol=1e-6)
        moved += (tensor - start[name]).abs().sum().item()
    assert moved > 0


def test_a_picture_shows_which_phrases_are_alike(make_trainer, tmp_path):
    make_trainer(pictures_every=2).train()

    assert (tmp_path / "pictures/step-000002/similarities.png").is_file()


def test_what_is_pushed_is_the_average_with_the_familys_card(make_trainer, tmp_path):
    trainer = make_trainer(ema_decay=0.9)
    trainer.train()

    trainer.save_model(_internal_call=True)  # as `Trainer.push_to_hub` does
    trainer.create_model_card(model_name="student")

    stored = load_file(tmp_path / "model.safetensors")
    name = "text_projection.weight"
    assert torch.equal(
        stored[f"detector_model.{name}"], trainer.average.weights[f"detector.{name}"]
    )
    assert not torch.equal(
        stored[f"detector_model.{name}"], trainer.family.detector.text_projection.weight
    )
    assert "stage 1: text" in (tmp_path / "README.md").read_text()
