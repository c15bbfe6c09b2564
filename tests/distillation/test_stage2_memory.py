"""Stage 2: memory from a teacher's and from annotations."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distillation.clip_worlds import (
    FRAMES,
    clips,
    collator,
    heir,
    make_trainer,
    trained_weights,
)
from distillation.processes import train_by_one_and_by_two, train_whole_and_killed, weights_of
from distillation.worlds import tiny_student, tiny_teacher
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Bernoulli, kl_divergence
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from efficientsam3_hf.distillation import memory_terms
from efficientsam3_hf.distillation.clip_prompts import first_prompts, to_pixels
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.feature_losses import whitened_error
from efficientsam3_hf.distillation.launch import prepare
from efficientsam3_hf.distillation.pictures import SIDE
from efficientsam3_hf.distillation.stage2_memory import (
    MemoryDistillationArguments,
    MemoryDistillationTrainer,
)
from efficientsam3_hf.distillation.teacher import frame_features
from efficientsam3_hf.models.clip_forward import ClipPrompts

PLAIN = {"corrections": 0, "forcing_share": 0.0, "prompt_shares": [0.5, 0.5, 0.0]}


def batch(*numbers: int) -> dict[str, Any]:
    data = clips(8)
    return collator()([data[number] for number in numbers])


def terms_of(made: MemoryDistillationTrainer, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Sums of a batch, in training mode."""
    made.family.train()
    with torch.no_grad():
        targets = made.teacher_step(inputs)
    return made.student_step(made.family, inputs, targets)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> MemoryDistillationTrainer:
    """One that tests must not change."""
    made = make_trainer(tmp_path_factory.mktemp("plain"), max_steps=10)
    made.state.max_steps = 10
    return made


def test_a_few_steps_bring_the_memory_to_the_teachers_and_leave_the_rest(tmp_path):
    made = make_trainer(
        tmp_path, max_steps=20, logging_steps=4, save_strategy="steps", save_steps=20, **PLAIN
    )
    made.train_dataset = clips(2)
    before = {name: each.clone() for name, each in made.family.state_dict().items()}
    teacher = {name: each.clone() for name, each in made.teacher.state_dict().items()}

    made.train()

    logs = [entry for entry in made.state.log_history if "features" in entry]
    assert logs[-1]["features"] < 0.6 * logs[0]["features"]
    assert logs[-1]["pointers"] < 0.6 * logs[0]["pointers"]
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    for name, each in made.teacher.state_dict().items():
        assert torch.equal(each, teacher[name]), name
    after = made.family.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(trained_weights(made))
    parts = {name.split(".")[1].split("_")[0] for name in moved}
    assert parts == {"memory", "spatial", "object", "temporal", "occlusion", "no"}
    loaded = Family.load(tmp_path / "checkpoint-20")
    for name, each in loaded.state_dict().items():
        assert torch.equal(each, after[name]), name
    size = sum(
        each.numel() for each in load_file(tmp_path / "checkpoint-20/model.safetensors").values()
    )
    assert size < 1.01 * sum(each.numel() for each in after.values())


def test_terms_equal_those_of_each_object_followed_alone(trainer, monkeypatch):
    monkeypatch.setattr(trainer.args, "corrections", 0)
    monkeypatch.setattr(trainer.args, "forcing_share", 0.0)
    inputs = batch(0, 1, 2)

    sums = terms_of(trainer, inputs)

    expected = dict.fromkeys(sums, 0.0)
    counts = dict.fromkeys(("tracked", "remembered", "predicted", "judged", "visible"), 0)
    plan = trainer.memory.plan(inputs)
    given = to_pixels(
        first_prompts(plan, inputs["labels"], 0.1), plan.num_objects, 112, torch.device("cpu")
    )
    for row, clip, asked in plan.rows():
        label = inputs["labels"][clip]
        (prompt,) = [each.of([each.rows.index(row)]) for each in given.prompts if row in each.rows]
        alone = ClipPrompts(1, [replace(prompt, rows=[0])])
        pixels = inputs["pixel_values"][clip : clip + 1]
        with torch.no_grad():
            said, taught = (
                each.tracker.forward_clip(pixels, prompts=alone, output_conditioned_features=True)
                for each in (trainer.family, trainer.teacher)
            )
        for time in range(asked.start, FRAMES):
            counts["tracked"] += 1
            own, goal = said.object_pointers[0, time, 0], taught.object_pointers[0, time, 0]
            expected["pointers"] += (own - goal).norm() ** 2 / goal.norm() ** 2
            if time > asked.start:
                counts["remembered"] += 1
                expected["features"] += whitened_error(
                    said.conditioned_features[time][:, 0], taught.conditioned_features[time][:, 0]
                )
            if time == asked.start and asked.kind == "mask":
                continue
            counts["predicted"] += 1
            masks, scores = said.all_masks[time][0, 0], said.all_iou_scores[time][0, 0]
            goals, goal_scores = taught.all_masks[time][0, 0], taught.all_iou_scores[time][0, 0]
            score = said.object_score_logits[0, time, 0]
            goal_score = taught.object_score_logits[0, time, 0]
            expected["teacher_object"] += divergence(score, goal_score)
            if goal_score > 0:
                best = goal_scores.argmax()
                expected["teacher_masks"] += divergence(masks[best], goals[best]).mean()
                expected["teacher_dice"] += dice(masks[best], goals[best].sigmoid())
                expected["teacher_iou"] += (scores - goal_scores).abs().mean()
            if not label["is_annotated"][time]:
                continue
            counts["judged"] += 1
            truth = label["masks"][asked.number, time].float()
            expected["object"] += cross_entropy(score, truth.any().float())
            if not truth.any():
                continue
            counts["visible"] += 1
            focal = [sigmoid_focal_loss(mask, truth, reduction="mean") for mask in masks]
            dices = [dice(mask, truth) for mask in masks]
            best = min(range(len(masks)), key=lambda i: float(20 * focal[i] + dices[i]))
            expected["focal"] += focal[best]
            expected["dice"] += dices[best]
            overlaps = [iou(mask > 0, truth > 0.5) for mask in masks]
            expected["iou"] += (scores - torch.tensor(overlaps)).abs().mean()
    assert trainer.count(inputs) == {"samples": 3, **counts}
    assert counts["visible"] < counts["judged"] or counts["judged"] < counts["predicted"]
    for name, total in sums.items():
        # Dense memories of the teacher are rounded to bfloat16, in other orders of addition.
        torch.testing.assert_close(total, torch.as_tensor(expected[name]), rtol=2e-3, atol=1e-4)


def cross_entropy(logits: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    return -goal * F.logsigmoid(logits) - (1 - goal) * F.logsigmoid(-logits)


def divergence(logits: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    return kl_divergence(Bernoulli(logits=goals), Bernoulli(logits=logits))


def dice(logits: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    found = logits.sigmoid()
    shared = torch.minimum(found, goal).sum()  # for hard goals, their product
    return 1 - (2 * shared + 1) / (found.sum() + goal.sum() + 1)


def iou(found: torch.Tensor, truth: torch.Tensor) -> float:
    return int((found & truth).sum()) / max(1, int((found | truth).sum()))


def test_every_term_reaches_what_it_should_and_nothing_frozen(trainer):
    sums = terms_of(trainer, batch(0, 1))
    weights = {n: w for n, w in trainer.family.named_parameters() if w.requires_grad}

    reached: dict[str, set[str]] = {}
    for term, total in sums.items():
        gradients = torch.autograd.grad(total, list(weights.values()), retain_graph=True)
        reached[term] = {
            name for name, each in zip(weights, gradients, strict=True) if each.abs().sum() > 0
        }

    by_memory = {
        n
        for n in weights
        if n.startswith(("tracker.memory_attention", "tracker.spatial_perceiver"))
    }
    assert len(by_memory) > 50
    for term, names in reached.items():
        assert by_memory <= names, (term, by_memory - names)
    # A pointer is seen in later frames, and so all terms reach what makes it.
    assert all("tracker.object_pointer_proj.proj_in.weight" in names for names in reached.values())
    assert all(
        any(name in names for names in reached.values())
        for name in weights
        if "occlusion" not in name and "no_object" not in name
    )
    assert not any(weight.requires_grad for weight in trainer.teacher.parameters())


def test_only_the_nearest_candidate_is_trained_by_the_truth_and_all_its_overlaps(trainer):
    seen: list[Any] = []
    inputs = batch(0, 1)

    def watched(*args, **options):
        said = plain_follow(*args, **options)
        if options.get("gradient_frames"):
            said.all_masks = tuple(each.detach().requires_grad_() for each in said.all_masks)
            said.all_iou_scores = tuple(
                each.detach().requires_grad_() for each in said.all_iou_scores
            )
            seen.append(said)
        return said

    plain_follow = memory_terms.follow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_terms, "follow", watched)
        sums = terms_of(trainer, inputs)
    (sums["focal"] + sums["dice"] + sums["iou"]).backward()

    visible = memory_terms.counted_frames(trainer.memory.plan(inputs), inputs["labels"])["visible"]
    asked = 0
    for time, (masks, scores) in enumerate(
        zip(seen[0].all_masks, seen[0].all_iou_scores, strict=True)
    ):
        if masks.shape[2] == 1 or masks.grad is None:
            continue
        trained = (masks.grad.flatten(3).abs().sum(-1) > 0).flatten(0, 1)
        judged = (scores.grad.abs() > 0).flatten(0, 1)
        for row in range(len(trained)):
            assert trained[row].sum() == (1 if visible[row, time] else 0)
            assert judged[row].all() if visible[row, time] else not judged[row].any()
            asked += int(visible[row, time])
    assert asked > 2


def test_a_batch_is_the_sum_of_its_clips(trainer):
    together = terms_of(trainer, batch(0, 1, 2))
    alone = [terms_of(trainer, batch(number)) for number in (0, 1, 2)]

    assert trainer.state.global_step == 0  # teacher forcing is certain
    for name, total in together.items():
        expected = sum(each[name] for each in alone)
        torch.testing.assert_close(total, expected, rtol=2e-3, atol=1e-4)


def test_frames_that_nobody_annotated_count_for_the_teacher_alone(trainer):
    inputs = batch(0, 1)
    expected = terms_of(trainer, inputs)

    for label in inputs["labels"]:
        label["masks"][:, 1::2] = True
    changed = terms_of(trainer, inputs)
    for label in inputs["labels"]:
        label["is_annotated"][2:] = False
    fewer = terms_of(trainer, inputs)

    assert not any(label["is_annotated"][1::2].any() for label in inputs["labels"])
    for name, total in expected.items():
        torch.testing.assert_close(changed[name], total)
        assert total > 0
    for name in ("focal", "dice", "iou", "object"):
        assert fewer[name] < expected[name]
    assert trainer.count(inputs)["predicted"] > 2 * trainer.count(inputs)["judged"]


def test_memories_are_the_teachers_at_first_and_the_students_later(trainer, monkeypatch):
    inputs = batch(0, 1, 2, 3)
    shape = (4, FRAMES, 2, 32, 32)
    taught = memory_terms.EfficientSam3ClipOutput(pred_masks=torch.randn(shape))
    truth = torch.ones(8, FRAMES, 32, 32)

    def share(step: int) -> float:
        monkeypatch.setattr(trainer.state, "global_step", step)
        forced = trainer.memory.forced_masks(inputs, taught, truth)
        return float(forced["is_forced"].float().mean()) if forced else 0.0

    monkeypatch.setattr(trainer.args, "forcing_share", 0.5)
    assert share(0) == 1
    assert 0 < sum(map(share, (1, 2))) / 2 < 1
    assert share(5) == share(9) == 0
    monkeypatch.setattr(trainer.state, "global_step", 2)
    for number in range(4):
        alone = {
            "labels": inputs["labels"][number:][:1],
            **{"pixel_values": inputs["pixel_values"]},
        }
        own = memory_terms.EfficientSam3ClipOutput(pred_masks=taught.pred_masks[:1])
        assert torch.equal(
            trainer.memory.forced_masks(alone, own, truth[:2])["is_forced"][0],
            trainer.memory.forced_masks(inputs, taught, truth)["is_forced"][number],
        )
    monkeypatch.setattr(trainer.args, "forcing", "truth")
    monkeypatch.setattr(trainer.state, "global_step", 0)
    forced = trainer.memory.forced_masks(inputs, taught, truth)
    assert forced["is_forced"].all(0).tolist() == [True, False, True, False]
    assert forced["memory_masks"].shape == shape
    monkeypatch.setattr(trainer, "is_evaluating", True)
    assert not trainer.memory.forced_masks(inputs, taught, truth)


def test_corrections_reach_teacher_and_student_alike(trainer, monkeypatch):
    monkeypatch.setattr(trainer.args, "corrections", 2)
    followed = []
    follow = memory_terms.follow

    def watched(family, frames, prompts, plan, **options):
        followed.append((family, prompts))
        return follow(family, frames, prompts, plan, **options)

    monkeypatch.setattr(memory_terms, "follow", watched)
    inputs = batch(0, 1, 2, 3)

    terms_of(trainer, inputs)

    (before, first), (teacher, given), (student, same) = followed
    assert before is student is trainer.family
    assert teacher is trainer.teacher
    assert given is same
    starts = {row: asked.start for row, _, asked in trainer.memory.plan(inputs).rows()}
    clicks = given[len(first) :]
    assert clicks
    for click in clicks:
        assert click.points.shape[1:] == (1, 2)
        for row in click.rows:
            assert click.frame > starts[row]
            assert click.frame % 2 == 0  # the annotated ones


def test_frames_before_the_gradient_count_for_nothing(trainer, monkeypatch):
    inputs = batch(0, 1)
    whole = trainer.count(inputs)
    monkeypatch.setattr(trainer.args, "gradient_frames", 1)

    sums = terms_of(trainer, inputs)

    number = len(list(trainer.memory.plan(inputs).rows()))
    assert trainer.count(inputs)["tracked"] == number < whole["tracked"]
    latents = trainer.family.tracker.spatial_perceiver.latents_2d
    (gradient,) = torch.autograd.grad(sums["features"], latents)
    assert not gradient.any()  # the memories of all earlier frames are constants


def test_a_batch_in_which_nothing_is_seen_has_no_gradient_and_no_error(trainer):
    inputs = batch(0, 1)
    for label in inputs["labels"]:
        label["masks"][:] = False

    sums = terms_of(trainer, inputs)
    gradients = torch.autograd.grad(
        sum(sums.values()), [w for w in trainer.family.parameters() if w.requires_grad]
    )

    assert set(torch.stack(list(sums.values())).tolist()) == {0.0}
    assert not any(each.any() for each in gradients)


def test_chance_comes_from_the_clip_alone_unless_dropout_is_asked_for(tmp_path):
    inputs = batch(0)
    for dropout in (False, True):
        made = make_trainer(tmp_path, dropout=dropout)
        made.family.train()
        assert made.family.tracker.memory_attention.layers[0].training

        first, second = (terms_of(made, inputs)["features"] for _ in range(2))

        assert torch.equal(first, second) != dropout


def test_a_teacher_of_another_size_is_shown_frames_of_its_own(tmp_path):
    made = make_trainer(tmp_path, tiny_student("perceiver", neck="lateral"), corrections=2)
    inputs = made.data_collator([clips()[0], clips()[1]])
    assert inputs["pixel_values"].shape[-1] == 128
    assert inputs["teacher_pixel_values"].shape[-1] == 112

    sums = terms_of(made, inputs)

    assert all(total.isfinite() for total in sums.values())
    assert sums["features"] > 0


def test_evaluation_scores_student_and_teacher_and_asks_the_teacher_once(tmp_path, monkeypatch):
    teacher = tiny_teacher()
    made = make_trainer(tmp_path, per_device_eval_batch_size=2, corrections=0)
    followed, follow = [], memory_terms.follow

    def watched(family, *args, **options):
        followed.append("teacher" if family is made.teacher else "student")
        return follow(family, *args, **options)

    monkeypatch.setattr(memory_terms, "follow", watched)

    first, second = made.evaluate(), made.evaluate()

    # For the losses, then for the scores.
    assert followed == ["teacher", "student", "teacher", "student", "teacher", "student", "student"]
    names = ("eval_J&F", "eval_teacher_J&F", "eval_loss", "eval_features")
    assert [first[name] for name in names] == [second[name] for name in names]
    # The teacher, as a student of itself, scores as it does.
    own = make_trainer(tmp_path, Family(teacher.detector, teacher.tracker), max_steps=1)
    scores = own.evaluate()
    assert scores["eval_J&F"] == scores["eval_teacher_J&F"] == first["eval_teacher_J&F"]
    assert scores["eval_features"] == pytest.approx(0, abs=1e-5)


def test_what_the_teacher_sees_may_come_with_the_batch(tmp_path, trainer):
    cache = SimpleNamespace(
        manifest=SimpleNamespace(kind="clip"), folder="cache", decode=lambda stored: stored
    )
    made = make_trainer(tmp_path, cache=cache)
    inputs = batch(0, 1)
    stored = frame_features(made.teacher, inputs["pixel_values"].flatten(0, 1))

    found = made.teacher_step({**inputs, "teacher_features": stored, "pixel_values": None})

    expected = trainer.teacher_step(inputs)
    assert len(found) == FRAMES
    for one, other in zip(found, expected, strict=True):
        for ours, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    cache.manifest.kind = "trunk"
    with pytest.raises(ValueError, match="features of kind 'trunk'"):
        make_trainer(tmp_path, cache=cache)


def test_pictures_show_both_models_on_frames_of_each_clip(trainer):
    pictures = trainer.draw_batch(batch(0, 1))

    assert sorted(pictures) == ["clip_0", "clip_1"]
    for picture in pictures.values():
        assert isinstance(picture, Image.Image)
        assert picture.size == (FRAMES * 192, 2 * 192)


def test_four_batches_of_one_and_one_batch_of_four_take_the_same_step(tmp_path):
    settings = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-3}
    whole = make_trainer(tmp_path / "a", per_device_train_batch_size=4, **settings)
    parts = make_trainer(
        tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )
    before = trained_weights(whole)

    whole.train()
    parts.train()

    assert_same_step(before, trained_weights(whole), trained_weights(parts))


def assert_same_step(
    before: dict[str, torch.Tensor], one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> None:
    """The same steps but for roundings, which are small beside them."""
    steps = [torch.cat([(w[n] - before[n]).flatten() for n in before]) for w in (one, other)]
    assert steps[0].norm() > 1e-3
    assert (steps[0] - steps[1]).norm() < 1e-3 * steps[0].norm()


def test_two_processes_take_the_steps_of_one(tmp_path):
    settings = {"max_grad_norm": 0.0, "learning_rate": 1e-3}

    one, two = train_by_one_and_by_two(make_trainer, tmp_path, **settings)

    make_trainer(tmp_path / "new").save_model()
    assert_same_step(weights_of(tmp_path / "new"), one, two)


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    train_whole_and_killed(
        make_trainer, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=1
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_shares": [1.0, 1.0]}, "three numbers"),
        ({"prompt_shares": [0.0, 0.0, 0.0]}, "three numbers"),
        ({"corrections": 9}, "from 0 to 4"),
        ({"forcing_share": 1.5}, "from 0 to 1"),
        ({"gradient_frames": 0}, "1 or more"),
        ({"loss_weights": {"masks": 1}}, "teacher_masks"),
    ],
)
def test_settings_that_cannot_be_are_errors(tmp_path: Path, fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **fields)


def test_without_a_teacher_there_are_annotations_alone(tmp_path):
    student = heir(tiny_teacher())
    made = MemoryDistillationTrainer(
        student,
        MemoryDistillationArguments(
            str(tmp_path),
            use_cpu=True,
            disable_tqdm=True,
            max_steps=8,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            forcing_share=0.5,
        ),
        train_dataset=clips(),
        eval_dataset=clips(2, "val"),
        data_collator=collator(student.detector.config.image_size),
    )
    taught = ("features", "pointers", "teacher_masks", "teacher_object")
    before = made.evaluate(clips())

    made.train()

    after = made.evaluate(clips())
    assert after["eval_loss"] < before["eval_loss"]
    assert all(after[f"eval_{name}"] == 0 for name in taught)
    assert 0 <= after["eval_J&F"] <= 1
    assert "eval_teacher_J&F" not in after
    masks = made.memory.forced_masks(batch(0, 1), None, torch.ones(4, FRAMES, 8, 8))
    assert masks == {}  # by now its own are remembered
    assert made.draw(student, batch(0))["clip_0"].height == SIDE


def test_models_without_video_are_errors(tmp_path):
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="The student has no tracker in video"):
        make_trainer(tmp_path, Family(heir(teacher).detector))


def test_the_command_trains_evaluates_draws_and_saves(tmp_path):
    teacher = tiny_teacher()
    teacher.save(tmp_path / "teacher")
    heir(teacher).save(tmp_path / "student")
    settings = {
        "stage": "stage2_memory",
        "student": tmp_path / "student",
        "teacher": tmp_path / "teacher",
        "teacher.dtype": "bfloat16",
        "data.format": "synthetic",
        "data.side": 112,
        "data.clip_length": 3,
        "data.length": 2,
        "data.eval_split": "val",
        "training.output_dir": tmp_path / "out",
        "training.max_steps": 1,
        "training.use_cpu": True,
        "training.pictures_every": 1,
        "training.save_strategy": "no",
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    prepare(None, flags).train()

    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["eval_teacher_J&F"] >= 0
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) == 2
    assert Family.load(tmp_path / "out").tracker.config.memory == "perceiver"
    example = Path(__file__).parents[2] / "examples/configs/stage2_memory_tinyvit_s.yaml"
    prepare(example, ["--training.bf16", "false", "--training.use_cpu", "true"])
