"""Exemplars among phrases, and in place of them."""

from typing import Any

import pytest
import torch
from distillation.prompt_worlds import make_trainer
from distillation.worlds import concept_trainer

from efficientsam3_hf.distillation.exemplars import visual_tokens, with_exemplars
from efficientsam3_hf.distillation.prompt_losses import CONCEPT_TERMS
from efficientsam3_hf.distillation.stage3_concepts import ConceptTrainer
from efficientsam3_hf.models.prompts import PADDING_LABEL, VISUAL_PHRASE
from efficientsam3_hf.tokenizer import build_tokenizer


def batch_of(trainer: Any, count: int = 4) -> dict[str, Any]:
    return trainer.data_collator([trainer.train_dataset[index] for index in range(count)])


def asked(trainer: ConceptTrainer, batch: Any, share: float = 1.0, alone: float = 0.5) -> Any:
    return with_exemplars(batch, trainer.visual, share, alone, seed=0, step=3)


def test_an_exemplar_is_one_of_what_its_phrase_names(tmp_path):
    trainer = concept_trainer(tmp_path)
    batch = batch_of(trainer)

    prompts = asked(trainer, batch, alone=0)

    assert torch.equal(prompts["input_ids"], batch["input_ids"])
    rows = zip(batch["labels"], prompts["input_boxes"], prompts["input_boxes_labels"], strict=True)
    with_some = 0
    for label, boxes, sign in rows:
        if len(label["boxes"]):
            with_some += 1
            assert sign.tolist() == [1]
            assert (label["boxes"] - boxes).abs().sum(dim=1).min() < 1e-5
        else:
            assert sign.tolist() == [PADDING_LABEL]
    assert 0 < with_some < len(batch["labels"])
    for before, after in zip(batch["labels"], prompts["labels"], strict=True):
        assert after is before


def test_an_exemplar_alone_knows_nothing_but_itself(tmp_path):
    trainer = concept_trainer(tmp_path)
    batch = batch_of(trainer)

    prompts = asked(trainer, batch, alone=1)

    ids, mask = visual_tokens(trainer.family.configuration)
    words = build_tokenizer(ids.shape[1])
    assert words.decode(ids[0], skip_special_tokens=True).strip() == VISUAL_PHRASE
    for row, (before, after) in enumerate(zip(batch["labels"], prompts["labels"], strict=True)):
        if not len(before["boxes"]):
            assert after is before
            assert torch.equal(prompts["input_ids"][row], batch["input_ids"][row])
            continue
        length = int(mask.sum())
        assert torch.equal(prompts["input_ids"][row, :length], ids[0, :length])
        assert int(prompts["attention_mask"][row].sum()) == length
        assert after["phrase"] == VISUAL_PHRASE
        assert not after["is_exhaustive"]
        torch.testing.assert_close(after["boxes"], prompts["input_boxes"][row])
        (number,) = [
            n for n, box in enumerate(before["boxes"]) if torch.equal(box, after["boxes"][0])
        ]
        assert torch.equal(after["masks"][0], before["masks"][number])


def test_what_is_asked_of_an_image_does_not_depend_on_its_batch(tmp_path):
    trainer = concept_trainer(tmp_path)
    together = asked(trainer, batch_of(trainer), share=0.5)

    first = 0
    for index in range(4):
        single = asked(trainer, trainer.data_collator([trainer.train_dataset[index]]), share=0.5)
        rows = slice(first, first + len(single["labels"]))
        first = rows.stop
        length = single["input_ids"].shape[1]
        assert torch.equal(together["input_ids"][rows, :length], single["input_ids"])
        assert torch.equal(together["input_boxes_labels"][rows], single["input_boxes_labels"])
        assert torch.equal(together["input_boxes"][rows], single["input_boxes"])
    assert {1, PADDING_LABEL} == set(together["input_boxes_labels"].flatten().tolist())


def test_no_share_changes_nothing(tmp_path):
    trainer = concept_trainer(tmp_path, exemplar_share=0)
    batch = batch_of(trainer)

    assert trainer.ask(batch) is batch


def test_every_batch_has_boxes_where_some_have(tmp_path):
    """Where weights are shared out, processes must not part ways."""
    trainer = concept_trainer(tmp_path, exemplar_share=0.25)
    batch = batch_of(trainer)
    nothing = {"pixel_values": batch["pixel_values"], "labels": []}

    prompts = asked(trainer, batch, share=0)
    blank = trainer.teacher_step(nothing).asked

    assert prompts.keys() == trainer.teacher_step(batch).asked.keys()
    assert prompts["labels"] == batch["labels"]
    for each in (prompts, blank):
        assert each["input_boxes_labels"].eq(PADDING_LABEL).all()
        assert each["input_boxes"].shape[1:] == (1, 4)
    assert not trainer.count(nothing)["prompts"]


@pytest.mark.parametrize("fields", [{}, {"loss_weights": dict.fromkeys(CONCEPT_TERMS, 0.0)}])
def test_without_a_teachers_answers_all_keep_their_words(tmp_path, fields: dict[str, Any]):
    trainer = concept_trainer(tmp_path, exemplar_share=1, exemplar_alone=1, **fields)
    if not fields:
        trainer.teacher = None
    batch = batch_of(trainer)

    prompts = trainer.ask(batch)

    assert torch.equal(prompts["input_ids"], batch["input_ids"])
    assert prompts["input_boxes_labels"].eq(1).any()
    assert prompts["labels"] == batch["labels"]


def test_evaluation_asks_for_phrases(tmp_path):
    trainer = concept_trainer(tmp_path, exemplar_share=1)
    batch = batch_of(trainer)

    with trainer.evaluating():
        assert trainer.ask(batch) is batch
    assert trainer.ask(batch) is not batch


def test_teacher_and_student_are_shown_the_same_and_counts_are_of_it(tmp_path):
    trainer = concept_trainer(tmp_path, exemplar_share=1, exemplar_alone=1)
    batch = batch_of(trainer)
    shown: list[Any] = []
    for family in (trainer.teacher, trainer.family):
        family.detector.register_forward_pre_hook(
            lambda _, args, kwargs: shown.append(kwargs), with_kwargs=True
        )

    with torch.no_grad():
        lesson = trainer.teacher_step(batch)
    terms = trainer.student_step(trainer.family, batch, lesson)

    (teachers, students) = shown
    for name in ("input_boxes", "input_boxes_labels"):
        assert torch.equal(teachers[name], students[name]), name
    length = int(students["attention_mask"].sum(dim=1).max())
    theirs, own = (
        (each["input_ids"] * each["attention_mask"])[:, :length] for each in (teachers, students)
    )
    assert torch.equal(theirs, own)
    named = sum(len(label["boxes"]) > 0 for label in batch["labels"])
    assert trainer.count(batch)["boxes"] == named  # one each
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.parametrize("share", [0, 1])
def test_exemplars_teach_the_encoder_of_boxes(tmp_path, share: float):
    trainer = concept_trainer(tmp_path, exemplar_share=share, targets=[])
    batch = batch_of(trainer)
    trainer.family.set_trainable(trainer.trained_parts, freeze_norms=True)
    with torch.no_grad():
        lesson = trainer.teacher_step(batch)

    sum(trainer.student_step(trainer.family, batch, lesson).values()).backward()

    weight = trainer.family.detector.geometry_encoder.boxes_direct_project.weight
    assert (weight.grad is not None and bool(weight.grad.abs().sum() > 0)) == bool(share)


def test_stage_1_asks_by_exemplars_alone_too(tmp_path):
    trainer = make_trainer(tmp_path, exemplar_share=1, exemplar_alone=1)
    batch = batch_of(trainer)

    lesson = trainer.teacher_step(batch)

    concepts = lesson.concepts
    assert 0 < int(concepts.has_words.sum()) < len(concepts)  # what names nothing keeps its words
    assert torch.equal(concepts.has_words, concepts.instance < 0)
    detector = trainer.teacher.detector
    ids, mask = visual_tokens(trainer.family.configuration)
    with torch.no_grad():
        visual = detector.get_text_features(ids, mask, return_dict=True).pooler_output
    length = int(mask.sum())
    for row in torch.nonzero(~concepts.has_words)[:, 0]:
        assert int(lesson.text_mask[row].sum()) == length
        torch.testing.assert_close(
            lesson.text[row, :length], visual[0, :length], rtol=1e-4, atol=1e-5
        )
