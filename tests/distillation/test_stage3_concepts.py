"""Stage 3: the objective, the teacher's answers and its maps, in one loss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from distillation.processes import distance, train_by_one_and_by_two, train_whole_and_killed
from distillation.worlds import concept_trainer, scenes, tiny_student, tiny_teacher

from efficientsam3_hf.distillation.pictures import DrawPictures
from efficientsam3_hf.distillation.prompt_losses import CONCEPT_TERMS
from efficientsam3_hf.distillation.stage3_concepts import (
    MAP_TERMS,
    ConceptTrainer,
    ConceptTrainingArguments,
    part_graph,
)
from efficientsam3_hf.tokenizer import build_tokenizer

# torch's tracing looks for gradients everywhere, and warns of itself.
LOOKS_FOR_GRADIENTS = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor"
)


def batch_of(trainer: ConceptTrainer) -> dict[str, Any]:
    dataset: Any = trainer.train_dataset
    return trainer.data_collator([dataset[index] for index in range(len(dataset))])


def terms_of(trainer: ConceptTrainer) -> dict[str, torch.Tensor]:
    batch = batch_of(trainer)
    with torch.no_grad():
        lesson = trainer.teacher_step(batch)
    return trainer.student_step(trainer.family, batch, lesson)


def test_training_lowers_every_part_of_the_loss_and_leaves_the_teacher(tmp_path):
    trainer = concept_trainer(tmp_path, max_steps=40, learning_rate=2e-3, logging_steps=4)
    teacher = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    text = {n: t.clone() for n, t in trainer.family.detector.text_encoder.state_dict().items()}

    trainer.train()

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = logs[0], logs[-1]
    objective = ("class", "l1", "giou", "mask", "dice", "presence")
    before, after = (
        sum(trainer.factors[name] * entry[name] for name in objective) for entry in (first, last)
    )
    assert after < 0.75 * before
    assert last["neck_angle"] < 0.7 * first["neck_angle"]
    assert last["concept_box"] < first["concept_box"]
    for name, tensor in trainer.teacher.state_dict().items():
        assert torch.equal(tensor, teacher[name]), name
    for name, tensor in trainer.family.detector.text_encoder.state_dict().items():
        assert torch.equal(tensor, text[name]), name


def test_terms_are_those_of_the_model_and_sums(tmp_path):
    trainer = concept_trainer(tmp_path, targets=[], exemplar_share=0)
    trainer.family.eval()
    batch = batch_of(trainer)
    keys = ("pixel_values", "input_ids", "attention_mask", "image_indices", "labels")

    sums = terms_of(trainer)
    output = trainer.family.detector(**{key: batch[key] for key in keys})

    counts = trainer.count(batch)
    for name, term in output.loss_dict.items():
        expected = term * counts[trainer.units[name]]
        torch.testing.assert_close(sums[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("term", "reached", "untouched"),
    [
        ("presence", "detr_decoder.presence_head", "detr_decoder.box_head"),
        ("concept_presence", "detr_decoder.presence_head", "mask_decoder"),
        ("concept_box", "detr_decoder.box_head", "detr_decoder.presence_head"),
        ("concept_score", "dot_product_scoring", "detr_decoder.presence_head"),
        ("concept_dice", "mask_decoder", "dot_product_scoring"),
        ("neck_error", "vision_encoder.neck", "detr_encoder"),
    ],
)
def test_each_term_teaches_what_it_is_about(tmp_path, term, reached, untouched):
    trainer = concept_trainer(tmp_path)

    terms_of(trainer)[term].backward()

    def has_gradient(part: str) -> bool:
        return any(
            weight.grad is not None and bool(weight.grad.any())
            for name, weight in trainer.family.detector.named_parameters()
            if name.startswith(part)
        )

    assert has_gradient(reached)
    assert not has_gradient(untouched)
    assert has_gradient("vision_encoder.backbone")
    assert not has_gradient("text_encoder")


def test_answers_equal_to_the_teachers_cost_nothing(tmp_path):
    teacher = tiny_teacher()
    trainer = concept_trainer(tmp_path, teacher=teacher, targets=[])
    batch = batch_of(trainer)
    with torch.no_grad():
        lesson = trainer.teacher_step(batch)

    terms = trainer.answer_terms(lesson.found, lesson.found, batch)

    assert set(terms) == set(CONCEPT_TERMS) - {"concept_focal"}
    for name, term in terms.items():
        assert float(term) == pytest.approx(0, abs=1e-3), name


def test_what_the_teacher_says_of_an_empty_canvas_does_not_count(tmp_path):
    trainer = concept_trainer(tmp_path)
    trainer.family.eval()
    batch = batch_of(trainer)
    valid = torch.ones(len(batch["pixel_values"]), 112, 112, dtype=torch.bool)
    valid[:, 56:] = False
    batch["valid"] = valid
    with torch.no_grad():
        lesson = trainer.teacher_step(batch)
        terms = trainer.student_step(trainer.family, batch, lesson)
        masks = lesson.found.pred_masks
        lesson.found.pred_masks = masks.clone()
        lesson.found.pred_masks[..., masks.shape[-2] // 2 :, :] = 30.0
        for maps in lesson.maps.values():
            for each in maps:
                each[..., each.shape[-2] // 2 :, :] += 3.0
        elsewhere = trainer.student_step(trainer.family, batch, lesson)
        batch.pop("valid")
        counted = trainer.student_step(trainer.family, batch, lesson)

    for name in ("concept_bce", "concept_dice", "neck_error", "neck_angle"):
        torch.testing.assert_close(elsewhere[name], terms[name])
        assert abs(counted[name] - terms[name]) > 1e-3 * abs(terms[name])
    assert torch.equal(counted["semantic"], terms["semantic"])  # of the truth


def test_images_without_prompts_teach_by_their_maps(tmp_path):
    trainer = concept_trainer(tmp_path)
    images = [replace(trainer.train_dataset[index], queries=[]) for index in range(2)]
    batch = trainer.data_collator(images)

    with torch.no_grad():
        lesson = trainer.teacher_step(batch)
    terms = trainer.student_step(trainer.family, batch, lesson)
    sum(terms.values()).backward()

    assert trainer.count(batch) == {"samples": 2, "prompts": 0, "boxes": 0}
    assert set(terms) == set(terms_of(trainer))
    assert {name for name, term in terms.items() if term.item()} == {"neck_error", "neck_angle"}
    assert trainer.score(trainer.family, batch, lesson) == []
    assert trainer.draw(trainer.family, batch) == {}
    for weight in trainer.family.detector.detr_decoder.parameters():
        assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize("with_teacher", [True, False])
def test_prompts_without_phrases_are_an_error_that_says_so(tmp_path, with_teacher: bool):
    trainer = concept_trainer(tmp_path)
    if not with_teacher:
        trainer.teacher = None
    sample = trainer.train_dataset[0]
    nameless = [replace(query, phrase=None) for query in sample.queries]
    trainer.train_dataset = [replace(sample, queries=nameless)]

    with pytest.raises(ValueError, match=r"learns from phrases.*data\.captions"):
        terms_of(trainer)


def test_the_teacher_is_asked_for_whole_phrases(tmp_path):
    trainer = concept_trainer(tmp_path, targets=[], exemplar_share=0)
    detector = trainer.teacher.detector
    assert detector.config.context_length > 5
    trainer.tokenizer = build_tokenizer(5)
    short = trainer.teacher_step(batch_of(trainer)).found
    batch = batch_of(trainer)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert int(mask.sum(dim=1).max()) > 5

    trainer.tokenizer = concept_trainer(tmp_path).tokenizer
    batch["input_ids"], batch["attention_mask"] = ids[:, :5], mask[:, :5]  # what a student reads
    found = trainer.teacher_step(batch).found

    with torch.no_grad():
        expected = detector(
            pixel_values=batch["pixel_values"],
            input_ids=ids,
            attention_mask=mask,
            image_indices=batch["image_indices"],
        )
    torch.testing.assert_close(found.pred_logits, expected.pred_logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(short.pred_logits, expected.pred_logits, atol=1e-4)


def test_the_gradient_of_maps_gets_its_share(tmp_path):
    trainer = concept_trainer(tmp_path, balance=0.3)
    trainer.family.eval()  # batch norms do not move: both looks see the same
    counts = trainer.count(batch_of(trainer))
    terms = {name: sum_ / counts[trainer.units[name]] for name, sum_ in terms_of(trainer).items()}
    shared = trainer.balancer.shared

    unscaled = trainer.balance(terms)
    trainer.state.global_step = 1
    trainer.balancer.on_step_end(trainer.args, trainer.state, trainer.control)
    scaled = trainer.balance(terms)

    norms = []
    for of_maps in (True, False):
        chosen = [name for name in scaled if (name in MAP_TERMS) == of_maps]
        loss = sum(trainer.factors[name] * scaled[name] for name in chosen)
        gradients = torch.autograd.grad(loss, shared, retain_graph=True)
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
    assert norms[0] == pytest.approx(0.3 * norms[1], rel=1e-3)
    assert all(torch.equal(unscaled[name], terms[name]) for name in terms)
    assert all(torch.equal(scaled[name], terms[name]) for name in terms if name not in MAP_TERMS)


def test_without_a_teacher_the_truth_is_left(tmp_path):
    student = tiny_student()
    student.configuration.objective = {"mask_points": None}
    dataset, collator = scenes(student, 4)
    arguments = ConceptTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no", logging_steps=1
    )
    trainer = ConceptTrainer(student, arguments, train_dataset=dataset, data_collator=collator)

    trainer.train()

    log = trainer.state.log_history[0]
    assert "class" in log
    assert not any(name in log for name in (*CONCEPT_TERMS, *MAP_TERMS))


def test_four_batches_of_one_and_one_batch_of_four_take_the_same_steps(tmp_path):
    settings = {"max_steps": 2, "optim": "sgd", "freeze_norms": True, "max_grad_norm": 0.1}
    whole, parts = tiny_student(), tiny_student()
    one = concept_trainer(tmp_path / "a", whole, **settings)
    four = concept_trainer(
        tmp_path / "b",
        parts,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **settings,
    )

    one.train()
    four.train()

    assert four.balancer.scale == pytest.approx(one.balancer.scale, rel=1e-4)
    begin = tiny_student().state_dict()
    assert distance(whole.state_dict(), begin) > 0
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, parts.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_two_processes_take_the_steps_of_one(tmp_path):
    one, two = train_by_one_and_by_two(concept_trainer, tmp_path, max_grad_norm=0.1)

    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)


def test_gradients_of_what_is_compiled_are_measured_before_the_step(tmp_path):
    trainer = concept_trainer(tmp_path)
    # With sizes that vary, as the numbers of prompts do, the way back is compiled beforehand.
    head = torch.compile(
        lambda maps: maps.sin().cos().exp() * maps.shape[0], backend="aot_eager", dynamic=True
    )
    maps = torch.randn(3, 4, requires_grad=True)
    answers = head(maps)

    trainer.balancer.shared = [maps]
    terms = {"neck_error": maps.square().sum(), "class": answers.square().sum()}
    trainer.balancer.look(terms)
    torch.stack(list(terms.values())).sum().backward()

    assert (trainer.balancer.squares > 0).all()
    assert maps.grad is not None


@LOOKS_FOR_GRADIENTS
@pytest.mark.parametrize("is_parted", [False, True])
def test_compiled_graphs_part_where_gradients_are_measured(is_parted: bool):
    torch.compiler.reset()  # what it keeps of a function does not depend on hooks
    trunk, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
    if is_parted:
        trunk.register_forward_hook(part_graph)

    def step(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = trunk(pixels)
        return maps, head(maps).sum()

    maps, loss = torch.compile(step, backend="aot_eager")(torch.randn(3, 4))

    (gradient,) = torch.autograd.grad(loss, [maps], allow_unused=True)
    assert (gradient is not None) == is_parted


def test_the_trunk_is_parted_from_the_rest_where_it_is_compiled(tmp_path):
    for compiles in (False, True):
        trainer = concept_trainer(tmp_path, torch_compile=compiles)

        hooks = trainer.family.detector.vision_encoder.backbone._forward_hooks.values()
        assert (part_graph in hooks) == compiles


@pytest.mark.slow  # minutes of tracing
@LOOKS_FOR_GRADIENTS
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_compiled_student_trains(tmp_path):
    trainer = concept_trainer(
        tmp_path,
        length=2,
        max_steps=1,
        per_device_train_batch_size=2,
        torch_compile=True,
        torch_compile_backend="aot_eager",
    )

    trainer.train()

    assert trainer.state.log_history[0]["loss"] > 0
    assert trainer.balancer.scale != 1  # the gradient of maps was measured, too


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    train_whole_and_killed(concept_trainer, tmp_path)


def test_evaluation_measures_concepts(tmp_path):
    trainer = concept_trainer(tmp_path)

    metrics = trainer.evaluate()

    assert 0 <= metrics["eval_pmF1"] <= 1
    assert -1 <= metrics["eval_IL_MCC"] <= 1
    assert metrics["eval_cgF1"] == pytest.approx(
        metrics["eval_pmF1"] * metrics["eval_IL_MCC"], abs=1e-6
    )
    assert "eval_neck_error" in metrics


def test_any_phrase_may_be_drawn(tmp_path):
    trainer = concept_trainer(tmp_path, length=2)
    callback = DrawPictures(trainer, every=1, samples=2)
    callback.batch = batch_of(trainer)
    labels = callback.batch["labels"]
    for label in labels:
        label["phrase"] = "salt/pepper shaker " * 30

    callback.draw(step=1)

    names = [path.name for path in (tmp_path / "pictures" / "step-000001").iterdir()]
    assert len(names) == len(labels) > len({label["image"] for label in labels})
    assert all("salt pepper shaker" in name for name in names)


def test_pictures_show_truth_and_answers(tmp_path):
    trainer = concept_trainer(tmp_path)

    pictures = trainer.draw(trainer.family.eval(), batch_of(trainer))

    assert len(pictures) == len(batch_of(trainer)["labels"])
    assert all(picture.size == (64, 32) for picture in pictures.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ["heads"]}, "some of trunk"),
        ({"balance": -1.0}, "must not be negative"),
        ({"temperature": 0.0}, "more than 0"),
        ({"loss_weights": {"cls": 1}}, "one_to_many_class"),
    ],
)
def test_settings_that_cannot_be_are_errors(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        concept_trainer(tmp_path, **fields)
