"""Stage 1+: what is compared, what learns, and that nothing else does."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distillation.processes import train_by_one_and_by_two, train_whole_and_killed
from distillation.prompt_worlds import make_trainer, prompt_student, scenes
from distillation.worlds import tiny_teacher
from tiny import stir, tiny_config, tiny_tracker, tiny_vision
from torchvision.ops import generalized_box_iou

from efficientsam3_hf import EfficientSam3Model
from efficientsam3_hf.data.sa1b import write_sa1b
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.launch import prepare
from efficientsam3_hf.distillation.prompt_losses import (
    CONCEPT_TERMS,
    OBJECT_TERMS,
    ConceptPairs,
    concept_losses,
)
from efficientsam3_hf.distillation.prompted_heads import ask_objects, match_queries, scores_of
from efficientsam3_hf.distillation.prompts import Objects, choose_objects
from efficientsam3_hf.distillation.teacher import Teacher

EVERY_TERM = dict.fromkeys((*OBJECT_TERMS, *CONCEPT_TERMS), 1.0)


@pytest.fixture(scope="module")
def teacher() -> Family:
    return tiny_teacher()


@pytest.fixture(scope="module")
def untrained(teacher) -> Family:
    return prompt_student(teacher)


@pytest.fixture
def student(untrained) -> Family:
    return copy.deepcopy(untrained)


def batch_of(trainer, count: int = 2, first: int = 0):
    return trainer.data_collator([trainer.train_dataset[first + index] for index in range(count)])


def terms_of(trainer, inputs, student: Family | None = None):
    student = student or trainer.family
    return trainer.student_step(student, inputs, trainer.teacher_step(inputs))


# The losses.


@pytest.mark.parametrize("match", ["hungarian", "teacher_query"])
def test_a_student_that_sees_what_its_teacher_sees_has_nothing_to_learn(tmp_path, teacher, match):
    twin = copy.deepcopy(teacher)
    trainer = make_trainer(tmp_path, twin, teacher, loss_weights=EVERY_TERM, match=match)
    twin.eval()

    terms = terms_of(trainer, batch_of(trainer))

    assert set(terms) == {*EVERY_TERM, "trunk_error", "trunk_angle"}
    for name, term in terms.items():
        assert abs(term.item()) < 1e-4, name


def test_terms_of_the_tracker_equal_those_of_a_loop_over_its_public_parts(
    tmp_path, teacher, student, monkeypatch
):
    """Prompt by prompt, one answer after another, with the losses written out."""
    settings = {"iterations": 3, "temperature": 2.0, "concepts_per_image": 0}
    trainer = make_trainer(
        tmp_path, student, teacher, loss_weights=EVERY_TERM, **settings, box_share=0.5
    )
    student.eval()
    for family in (student, teacher):
        # This is how the mask decoder answers in training.
        decoder = family.tracker.mask_decoder
        monkeypatch.setattr(decoder, "dynamic_multimask_via_stability", False)
    inputs = batch_of(trainer, 2)
    lesson = trainer.teacher_step(inputs)

    with torch.no_grad():
        terms = trainer.student_step(student, inputs, lesson)

        expected = dict.fromkeys(OBJECT_TERMS, 0.0)
        answers = []
        for prompts in lesson.objects:
            for row in range(len(prompts)):
                pixels = inputs["pixel_values"][prompts.image[row]][None]
                frames = [each.tracker.encode_frames(pixels) for each in (student, teacher)]
                points, labels = prompts.points[row] * 112, prompts.labels[row]
                losses = []
                for correction in range(3):
                    own, theirs = (
                        each.tracker.predict_masks(
                            frame,
                            each.tracker.without_memory(frame.coarse),
                            points[None],
                            labels[None],
                            multimask_output=len(points) == 1,
                        )
                        for each, frame in zip((student, teacher), frames, strict=True)
                    )
                    losses.append(plain_losses(own, theirs))
                    best = theirs.all_iou_scores[0].argmax()
                    mine, wanted = own.all_masks[0, best] > 0, theirs.all_masks[0, best] > 0
                    wrong = torch.nonzero(mine != wanted)
                    if correction == 2 or len(wrong) < 3:
                        break
                    y, x = wrong[int(prompts.draws[row, correction] * len(wrong))]
                    point = (torch.stack([x, y]) + 0.5) * 112 / mine.shape[0]
                    points = torch.cat([points, point[None]])
                    labels = torch.cat([labels, wanted[y, x][None].long()])
                answers.append(len(losses))
                for name in expected:
                    expected[name] += sum(each[name] for each in losses) / len(losses)

    assert len(answers) == trainer.count(inputs)["prompts"] > 4
    assert max(answers) == 3  # there were corrections
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6)


def plain_losses(own, theirs) -> dict[str, torch.Tensor]:
    """The terms of one answer at a temperature of 2."""
    logits, targets = own.all_masks[0] / 2, (theirs.all_masks[0] / 2).sigmoid()
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy(targets, targets, reduction="none")
    wrong = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") - entropy
    weight = 0.25 * targets + 0.75 * (1 - targets)
    overlap = 2 * torch.minimum(probability, targets).sum(dim=(1, 2)) + 1
    total = (probability + targets).sum(dim=(1, 2)) + 1
    score, truth = own.object_score_logits[0, 0], theirs.object_score_logits[0, 0].sigmoid()
    score_entropy = F.binary_cross_entropy(truth, truth)
    return {
        "mask_bce": wrong.mean(),
        "mask_focal": (weight * (probability - targets) ** 2 * wrong).mean(),
        "mask_dice": (1 - overlap / total).mean(),
        "iou_score": F.mse_loss(own.all_iou_scores, theirs.all_iou_scores),
        "object_score": F.binary_cross_entropy_with_logits(score, truth) - score_entropy,
    }


@pytest.mark.parametrize("ask", ["phrases", "anything"])
def test_terms_of_the_detector_equal_those_of_a_loop_over_prompts(tmp_path, teacher, student, ask):
    settings = {"match": "teacher_query", "prompts_per_image": 0, "exemplar_share": 0.5}
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        ask,
        loss_weights=EVERY_TERM,
        concepts_per_image=3,
        confidence=0.05,
        **settings,
    )
    student.eval()
    inputs = batch_of(trainer, 2)
    lesson = trainer.teacher_step(inputs)
    processor = trainer.data_collator.processor
    asked = lesson.concepts

    with torch.no_grad():
        terms = trainer.student_step(student, inputs, lesson)

        expected, detections = dict.fromkeys(CONCEPT_TERMS, 0.0), 0
        for row in range(len(asked)):
            phrase = inputs["labels"][asked.label[row]]["phrase"] or "visual"
            tokens = processor(text=phrase)
            tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            question = {"pixel_values": inputs["pixel_values"][asked.image[row]][None]}
            if asked.boxes_labels[row, 0] == 1:
                question["input_boxes"] = asked.boxes_cxcywh[row][None]
            text = teacher.detector.get_text_features(**tokens)
            own, theirs = (
                each.detector(**question, text_embeds=text) for each in (student, teacher)
            )
            losses = plain_concept_losses(own, theirs)
            detections += losses.pop("detections")
            for name, loss in losses.items():
                expected[name] += loss

    assert len(asked) == trainer.count(inputs)["concepts"] > 4
    assert {1, -10} >= set(asked.boxes_labels.flatten().tolist())
    assert detections > 2
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=2e-5)


def plain_concept_losses(own, theirs) -> dict[str, torch.Tensor]:
    """The terms of one prompt whose queries are compared number by number."""

    def divergence(logits, wanted):
        wanted = wanted.sigmoid()
        entropy = F.binary_cross_entropy(wanted, wanted, reduction="none")
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none") - entropy

    found = torch.nonzero(scores_of(theirs)[0] > 0.05)[:, 0]
    masks = [each.pred_masks[0, found] for each in (own, theirs)]
    boxes = [each.pred_boxes[0, found] for each in (own, theirs)]
    probability, targets = (each.sigmoid() for each in masks)
    wrong = divergence(*masks)
    weight = 0.25 * targets + 0.75 * (1 - targets)
    overlap = 2 * torch.minimum(probability, targets).sum(dim=(1, 2)) + 1
    total = (probability + targets).sum(dim=(1, 2)) + 1
    mean = max(len(found), 1)
    return {
        "concept_bce": wrong.mean(dim=(1, 2)).sum() / mean,
        "concept_dice": (1 - overlap / total).sum() / mean,
        "concept_focal": (weight * (probability - targets) ** 2 * wrong).mean(dim=(1, 2)).sum()
        / mean,
        "concept_box": (boxes[0] - boxes[1]).abs().sum() / mean,
        "concept_overlap": (1 - generalized_box_iou(*boxes).diagonal()).sum() / mean,
        "concept_score": theirs.presence_logits.sigmoid().squeeze()
        * divergence(own.pred_logits, theirs.pred_logits).sum()
        / mean,
        "concept_presence": divergence(own.presence_logits, theirs.presence_logits).sum(),
        "detections": len(found),
    }


def test_scores_and_presence_are_the_divergence_of_their_product():
    """Absent, or present with each query right or wrong: the distance of all that can be said."""
    generator = torch.Generator().manual_seed(0)
    scores, presence = torch.randn(2, 1, 3, generator=generator), torch.tensor([[[0.3]], [[-2.0]]])
    pairs = ConceptPairs(
        row=torch.zeros(0, dtype=torch.long),
        shares=torch.zeros(0),
        masks=(torch.zeros(0, 4, 4),) * 2,
        boxes=(torch.zeros(0, 4),) * 2,
        scores=tuple(scores),
        presence=tuple(presence),
    )

    losses = concept_losses(["concept_score", "concept_presence"], pairs)

    outcomes = []
    for logits, there in zip(scores.double().sigmoid(), presence.double().sigmoid(), strict=True):
        each = [(1 - there).flatten()]
        for bits in itertools.product((0, 1), repeat=3):
            each.append(there[0] * torch.where(torch.tensor(bits) > 0, logits, 1 - logits).prod())
        outcomes.append(torch.cat(each))
    own, theirs = outcomes
    expected = (theirs * (theirs / own).log()).sum()
    total = losses["concept_score"].sum() + losses["concept_presence"].sum()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)


def test_detections_find_their_queries_in_whatever_order_these_are(tmp_path, teacher):
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher)
    theirs = trainer.teacher_step(batch_of(trainer)).found
    own, order = copy.copy(theirs), torch.tensor([3, 0, 4, 1, 2])
    own.pred_boxes, own.pred_logits = theirs.pred_boxes[:, order], theirs.pred_logits[:, order]
    scores = scores_of(theirs)
    is_confident = scores >= scores.topk(3, dim=1).values[:, -1:]

    teacher_of = match_queries(own, theirs, is_confident)
    alike = match_queries(theirs, theirs, is_confident)

    assert torch.equal(alike, torch.arange(5).expand(2, -1))
    for row in range(2):
        assert sorted(teacher_of[row].tolist()) == list(range(5))
        confident = is_confident[row][order]
        assert torch.equal(teacher_of[row][confident], order[confident])


def test_a_student_of_another_size_is_compared_on_the_same_pictures(tmp_path, teacher):
    student = prompt_student(teacher, "lateral")
    trainer = make_trainer(tmp_path, student, teacher)
    inputs = batch_of(trainer)
    assert inputs["pixel_values"].shape[-1] == 128
    assert inputs["teacher_pixel_values"].shape[-1] == 112

    sum(terms_of(trainer, inputs).values()).backward()

    trained = {name for name, weight in student.named_parameters() if weight.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"backbone", "neck"}
    assert {name.split(".")[0] for name in trained} == {"detector", "tracker"}
    assert all(student.get_parameter(name).grad is not None for name in trained)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_teacher_in_half_precision_teaches(tmp_path, teacher, student, bf16: bool):
    half = Teacher(*copy.deepcopy((teacher.detector, teacher.tracker)), torch.bfloat16)
    trainer = make_trainer(tmp_path, student, half, bf16=bf16)
    inputs = batch_of(trainer)

    with trainer.autocast_smart_context_manager():
        terms = terms_of(trainer, inputs)
    sum(terms.values()).backward()

    assert all(term.isfinite() for term in terms.values())
    assert all(term.dtype == torch.float32 for term in terms.values())


def test_cached_tokens_of_the_teacher_stand_for_its_look(tmp_path, teacher, student, monkeypatch):
    trainer = make_trainer(tmp_path, student, teacher, targets=["trunk", "neck"])
    student.eval()
    inputs = batch_of(trainer)
    expected = terms_of(trainer, inputs)
    tokens = teacher.see(inputs["pixel_values"]).last_hidden_state

    monkeypatch.setattr(trainer, "cached", lambda inputs: {"trunk": tokens})
    monkeypatch.setattr(teacher, "see", None)

    for name, term in terms_of(trainer, inputs).items():
        torch.testing.assert_close(term, expected[name], msg=name)


def test_the_students_own_reading_of_phrases_can_be_what_it_is_asked_with(
    tmp_path, teacher, student
):
    with torch.no_grad():
        student.detector.text_projection.bias.add_(1.0)
    terms = {}
    for text in ("teacher", "student"):
        trainer = make_trainer(tmp_path, student, teacher, text=text)
        student.eval()
        terms[text] = terms_of(trainer, batch_of(trainer))

    assert terms["teacher"]["concept_score"] != terms["student"]["concept_score"]
    assert terms["teacher"]["mask_bce"] == terms["student"]["mask_bce"]


def test_a_tracker_on_images_is_asked_as_it_is_asked_alone(teacher):
    """With the features that `Family` gives it, and with its own forward."""
    vision = tiny_vision()
    tracker = tiny_tracker(vision)
    family = Family(stir(EfficientSam3Model(tiny_config(vision))), tracker).eval()
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    objects = Objects(
        ["a", "b"],
        np.array([1, 0]),
        np.zeros(2, int),
        np.zeros(2, int),
        np.array([[0.1, 0.2, 0.6, 0.7], [0.3, 0.3, 0.9, 0.8]]),
        np.array([[0.4, 0.5], [0.5, 0.6]]),
    )

    with torch.no_grad():
        features = family.tracker_features(family.see(pixels))
        boxes, _ = choose_objects(objects, 9, 0, 0, box_share=1.0)
        _, clicks = choose_objects(objects, 9, 0, 0, box_share=0.0)
        for group in (boxes, clicks):
            assert len(group) == 2
            answers = ask_objects(tracker, features, group, in_use=True)
            for row in range(len(group)):
                points = group.points[row] * 112
                is_box = len(points) == 2
                prompt = {"input_boxes": points.view(1, 1, 4)} if is_box else {}
                prompt |= {} if is_box else {"input_points": points[None, None]}
                alone = tracker(
                    pixels[group.image[row]][None], **prompt, multimask_output=not is_box
                )
                torch.testing.assert_close(
                    answers.masks[row], alone.pred_masks[0, 0], rtol=1e-4, atol=1e-4
                )
                torch.testing.assert_close(answers.iou_scores[row], alone.iou_scores[0, 0])


# What learns.


def test_every_term_teaches_the_encoder_and_only_what_it_passes_through(tmp_path, teacher, student):
    parts = ["backbone", "neck", "tracker_neck"]
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        loss_weights=EVERY_TERM,
        trained_parts=parts,
        concepts_per_image=2,
    )

    terms = terms_of(trainer, batch_of(trainer))

    groups = {
        "trunk": "detector.vision_encoder.backbone.",
        "neck": "detector.vision_encoder.neck.",
        "tracker_neck": "tracker.vision_encoder.neck.",
    }
    weights = {
        group: [w for n, w in student.named_parameters() if n.startswith(start) and w.requires_grad]
        for group, start in groups.items()
    }
    for name, term in terms.items():
        reached = {
            group
            for group, members in weights.items()
            if any(
                gradient is not None and gradient.any()
                for gradient in torch.autograd.grad(
                    term, members, retain_graph=True, allow_unused=True
                )
            )
        }
        if name.startswith("trunk"):
            assert reached == {"trunk"}, name
        elif name in OBJECT_TERMS:
            assert reached == {"trunk", "tracker_neck"}, name
        else:
            assert reached == {"trunk", "neck"}, name


def test_a_term_without_weight_is_not_computed(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, student, teacher, loss_weights={"mask_dice": 0})

    terms = terms_of(trainer, batch_of(trainer))

    assert not {"mask_dice", "mask_focal", "concept_focal"} & set(terms)


def test_images_without_anything_to_ask_for_teach_by_their_maps(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, student, teacher)
    inputs = batch_of(trainer)
    inputs["labels"] = []

    terms = terms_of(trainer, inputs)

    assert trainer.count(inputs) == {"samples": 2, "prompts": 0, "concepts": 0}
    assert set(terms) == set(terms_of(trainer, batch_of(trainer)))
    assert terms["trunk_error"] > 0
    assert not any(term.item() for name, term in terms.items() if not name.startswith("trunk"))


def test_gradient_checkpointing_changes_no_gradient(tmp_path, teacher, untrained):
    gradients = []
    for checkpointing in (False, True):
        student = copy.deepcopy(untrained)
        trainer = make_trainer(
            tmp_path, student, teacher, activation_checkpointing=checkpointing, freeze_norms=True
        )
        sum(terms_of(trainer, batch_of(trainer)).values()).backward()
        gradients.append({n: w.grad for n, w in student.named_parameters() if w.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_training_brings_masks_nearer_and_leaves_heads_and_teacher(tmp_path, teacher, student):
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        max_steps=20,
        learning_rate=3e-3,
        logging_steps=20,
        loss_weights={"trunk_error": 0, "trunk_angle": 0},  # masks alone can teach
        freeze_norms=True,
    )
    trainer.train_dataset = scenes(2)
    of_teacher = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    start = trainer.evaluate(trainer.train_dataset)

    trainer.train()

    end = trainer.evaluate(trainer.train_dataset)
    assert end["eval_loss"] < 0.7 * start["eval_loss"]
    assert end["eval_mask_bce"] < 0.7 * start["eval_mask_bce"]
    assert end["eval_concept_bce"] < 0.5 * start["eval_concept_bce"]
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, of_teacher[name]), name
    moved = {n for n, tensor in student.state_dict().items() if not torch.equal(before[n], tensor)}
    assert moved
    assert all(".backbone." in name for name in moved)


def test_heads_answer_as_in_use_when_they_are_scored(tmp_path, teacher, monkeypatch):
    """The single mask of a box that is not stable is replaced there, and there alone."""
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher, box_share=1.0)
    lesson = trainer.teacher_step(batch_of(trainer))
    boxes, decoder = lesson.objects[0], teacher.tracker.mask_decoder

    trained = ask_objects(teacher.tracker, lesson.features, boxes).masks
    used = ask_objects(teacher.tracker, lesson.features, boxes, in_use=True).masks

    assert decoder.dynamic_multimask_via_stability
    monkeypatch.setattr(decoder, "dynamic_multimask_stability_thresh", -1.0)  # all are stable
    plain = ask_objects(teacher.tracker, lesson.features, boxes, in_use=True).masks
    assert torch.equal(trained, plain)
    assert not torch.equal(trained, used)


def test_scores_of_a_student_that_is_its_teacher(tmp_path, teacher):
    trainer = make_trainer(tmp_path, copy.deepcopy(teacher), teacher)

    metrics = trainer.evaluate()
    again = trainer.evaluate()

    assert metrics["eval_box_agreement"] == metrics["eval_click_agreement"] == 1
    assert metrics["eval_box_iou"] == metrics["eval_box_iou_of_teacher"] > 0
    assert metrics["eval_click_iou"] == metrics["eval_click_iou_of_teacher"]
    names = [name for name in metrics if "second" not in name and "runtime" not in name]
    assert {name: metrics[name] for name in names} == {name: again[name] for name in names}


def test_pictures_show_each_image_twice(tmp_path, teacher, student):
    trainer = make_trainer(tmp_path, student, teacher)

    pictures = trainer.draw_batch(batch_of(trainer))

    assert {name: each.size for name, each in pictures.items()} == {
        "prompts_0": (224, 112),
        "prompts_1": (224, 112),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"match": "best"}, "match='best' must be one of"),
        ({"text": "none"}, "text='none' must be one of"),
        ({"iterations": 0}, "iterations=0 not less than 1"),
        ({"prompts_per_image": -1}, "prompts_per_image=-1"),
        ({"temperature": 0.0}, "temperature=0.0 must be more than 0"),
        ({"loss_weights": {"mask": 1}}, "mask_bce"),
    ],
)
def test_settings_that_cannot_be_are_errors(tmp_path, teacher, student, fields, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, student, teacher, **fields)


def test_a_student_without_tracker_needs_prompts_for_the_detector_alone(tmp_path, teacher, student):
    without = Family(student.detector)
    with pytest.raises(ValueError, match=r"student has no tracker.*prompts_per_image=0"):
        make_trainer(tmp_path, without, teacher)

    trainer = make_trainer(tmp_path, without, teacher, prompts_per_image=0)

    terms = terms_of(trainer, batch_of(trainer))
    assert not set(OBJECT_TERMS) & set(terms)
    assert trainer.draw_batch(batch_of(trainer)) == {}


# However it is run.


@pytest.mark.parametrize("layout", ["anything", "phrases"])
def test_it_is_a_stage_of_the_one_command(tmp_path, teacher, student, layout):
    teacher.save(tmp_path / "teacher")
    student.save(tmp_path / "student")
    words = {
        "stage": "stage1_prompts",
        "student": str(tmp_path / "student"),
        "teacher.name": str(tmp_path / "teacher"),
        "data.root": str(tmp_path / "sa1b"),
        "data.format": "sa1b" if layout == "anything" else "synthetic",
        "data.length": 4,
        "data.side": 112,
        "data.eval_length": 2,
        "training.output_dir": str(tmp_path / "out"),
        "training.use_cpu": True,
        "training.disable_tqdm": True,
        "training.max_steps": 1,
        "training.per_device_train_batch_size": 2,
        "training.prompts_per_image": 2,
    }
    write_sa1b(scenes(4, "anything"), tmp_path / "sa1b")

    run = prepare(
        None, [word for name, value in words.items() for word in (f"--{name}", str(value))]
    )
    run.train()

    assert isinstance(run.trainer.teacher, Teacher)
    labels = run.trainer.data_collator([run.trainer.train_dataset[0]])["labels"]
    assert sum(len(label["boxes"]) for label in labels) <= 2
    assert Family.load(tmp_path / "out").has_video
    assert "stage 1+: prompts" in (tmp_path / "out" / "README.md").read_text()
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert 0 <= metrics["eval_box_agreement"] <= 1


def test_four_batches_of_one_and_one_batch_of_four_take_the_same_step(tmp_path, teacher, untrained):
    settings = {"max_steps": 1, "optim": "sgd", "freeze_norms": True, "max_grad_norm": 0.0}
    settings |= {"learning_rate": 1e-2, "concepts_per_image": 2}
    whole, parts = copy.deepcopy(untrained), copy.deepcopy(untrained)

    make_trainer(tmp_path, whole, teacher, per_device_train_batch_size=4, **settings).train()
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    make_trainer(tmp_path, parts, teacher, **split, **settings).train()

    begin, one, four = (each.state_dict() for each in (untrained, whole, parts))
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(tensor, begin[name]) for name, tensor in one.items())


def test_two_processes_take_the_steps_of_one(tmp_path, untrained):
    one, two = train_by_one_and_by_two(make_trainer, tmp_path)

    begin = untrained.detector.state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(one[f"detector_model.{name}"], begin[name]) for name in begin)


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    train_whole_and_killed(make_trainer, tmp_path)
