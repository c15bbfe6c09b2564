"""Stage 1 for images; what all stages share is in test_trainer.py."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from distillation.worlds import tiny_student, tiny_teacher
from PIL import Image
from torch.nn import functional as F
from transformers.integrations import TensorBoardCallback

from efficientsam3_hf import zoo
from efficientsam3_hf.data.augmentations import Augmentations
from efficientsam3_hf.data.collators import PictureCollator
from efficientsam3_hf.data.files import write_image
from efficientsam3_hf.data.loading import Samples, load
from efficientsam3_hf.data.own_folder import OwnImages
from efficientsam3_hf.data.synthetic import Scenes
from efficientsam3_hf.distillation.cache_writer import CacheOptions, CacheWriter
from efficientsam3_hf.distillation.cached_features import FEATURES, CachedTeacherFeatures, flips
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.pictures import DrawPictures
from efficientsam3_hf.distillation.stage1_image import (
    ImageDistillationArguments,
    ImageDistillationTrainer,
    check_cache,
    target_maps,
)
from efficientsam3_hf.distillation.teacher import Teacher
from efficientsam3_hf.distillation.trainer import NewEpoch, synchronize_norms


@pytest.fixture(scope="module")
def teacher() -> Family:
    return tiny_teacher()


def make_trainer(folder: Path, teacher: Family, student: Family, **fields: Any):
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
    own, other = (zoo.processor(each.configuration).image_processor for each in (student, teacher))
    return ImageDistillationTrainer(
        model=student,
        args=ImageDistillationArguments(output_dir=str(folder), **settings),
        teacher=teacher,
        train_dataset=Scenes(8, side=112),
        eval_dataset=Scenes(3, "val", side=112),
        data_collator=PictureCollator(own, [Augmentations(seed=1)], other),
        eval_collator=PictureCollator(own, teacher_processor=other),
    )


def test_a_lateral_student_learns_at_its_necks_from_a_teacher_of_another_size(tmp_path, teacher):
    student = tiny_student(neck="lateral")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = make_trainer(tmp_path, teacher, student, max_steps=30, learning_rate=1e-2)
    trainer.data_collator.augment = []
    trainer.train_dataset = Scenes(4, side=112)
    assert trainer.data_collator([Scenes(1)[0]])["teacher_pixel_values"].shape[-1] == 112

    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.targets == ["neck", "tracker_neck"]
    after = student.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(".backbone." in name or ".neck." in name for name in moved)
    assert any(name.startswith("detector.vision_encoder.neck") for name in moved)
    assert any(name.startswith("tracker.vision_encoder.neck") for name in moved)


def test_a_lateral_student_has_no_trunk_to_compare(tmp_path, teacher):
    with pytest.raises(ValueError, match=r"lateral neck .* targets \"neck\" and \"tracker_neck\""):
        make_trainer(tmp_path, teacher, tiny_student(neck="lateral"), targets=["trunk", "neck"])


def test_every_target_reaches_the_trunk_and_nothing_else(tmp_path, teacher):
    student = tiny_student()
    trainer = make_trainer(tmp_path, teacher, student, targets=["trunk", "neck", "tracker_neck"])
    inputs = trainer.data_collator([Scenes(1, side=112)[0]])

    terms = trainer.student_step(student.train(), inputs, trainer.teacher_step(inputs))

    assert set(terms) == set(trainer.units)
    for name, term in terms.items():
        student.zero_grad()
        term.backward(retain_graph=True)
        trained = {n for n, w in student.named_parameters() if w.grad is not None and w.grad.any()}
        assert any(".backbone.trunk." in each for each in trained), name
        assert all(".backbone." in each for each in trained), name
    assert not any(weight.grad is not None for weight in teacher.parameters())


def test_what_an_augmentation_leaves_empty_does_not_count(tmp_path, teacher):
    student = tiny_student().eval()
    trainer = make_trainer(tmp_path, teacher, student)
    inputs = {"pixel_values": torch.randn(2, 3, 112, 112)}
    targets = trainer.teacher_step(inputs)
    valid = torch.ones(2, 112, 112, dtype=torch.bool)
    valid[:, 56:] = False
    expected = trainer.student_step(student, {**inputs, "valid": valid}, targets)

    targets["trunk"][0][:, :, 4:] = 1e3  # the teacher's map is 8 places high

    changed = trainer.student_step(student, {**inputs, "valid": valid}, targets)
    torch.testing.assert_close(changed, expected)
    assert trainer.student_step(student, inputs, targets)["trunk_error"] != expected["trunk_error"]


def test_evaluation_measures_every_level(tmp_path, teacher):
    student = tiny_student()
    trainer = make_trainer(tmp_path, teacher, student, targets=["neck"])

    metrics = trainer.evaluate()

    samples = [trainer.eval_dataset[index] for index in range(3)]
    pixels = trainer.eval_collator(samples)["pixel_values"]
    with torch.no_grad():
        own, theirs = (target_maps(x, pixels, ["neck"])["neck"] for x in (student.eval(), teacher))
    for level in range(3):
        cosine = F.cosine_similarity(own[level], theirs[level], dim=1).mean()
        error = (own[level] - theirs[level]).norm() / theirs[level].norm()
        assert metrics[f"eval_neck_{level}_cosine"] == pytest.approx(cosine.item(), rel=1e-4)
        assert metrics[f"eval_neck_{level}_relative_error"] == pytest.approx(error.item(), rel=1e-4)


def test_pictures_are_of_the_same_samples_and_change_nothing(tmp_path, teacher):
    drawn, plain = tiny_student(), tiny_student()
    trainer = make_trainer(tmp_path, teacher, drawn, max_steps=4, pictures_every=2, ema_decay=0.5)
    shown = []

    class Writer:
        def add_image(self, name, image, step, dataformats):
            shown.append((name, image.shape, step, dataformats))

    board = TensorBoardCallback.__new__(TensorBoardCallback)  # the library is not needed
    board.tb_writer = Writer()
    for name in ("on_train_begin", "on_train_end", "on_log"):
        setattr(board, name, lambda *args, **kwargs: None)
    trainer.add_callback(board)

    trainer.train()
    make_trainer(tmp_path / "b", teacher, plain, max_steps=4, ema_decay=0.5).train()

    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, drawn.state_dict()[name]), name
    paths = sorted((tmp_path / "pictures").glob("*/*.png"))
    assert [path.relative_to(tmp_path / "pictures").as_posix() for path in paths] == [
        "step-000002/trunk.png",
        "step-000004/trunk.png",
    ]
    first, second = (np.asarray(Image.open(path)).astype(int) for path in paths)
    third = first.shape[1] // 3
    assert first.shape[0] == 3 * third  # the three samples of the evaluation
    assert np.array_equal(first[:, : 2 * third], second[:, : 2 * third])  # picture and teacher
    assert not np.array_equal(first[:, 2 * third :], second[:, 2 * third :])  # the student
    assert shown == [
        ("pictures/trunk", first.shape, 2, "HWC"),
        ("pictures/trunk", first.shape, 4, "HWC"),
    ]


def test_teacher_and_student_have_the_same_colours_where_they_agree(tmp_path, teacher):
    trainer = make_trainer(tmp_path, teacher, copy.deepcopy(teacher), trained_parts=["backbone"])
    callback = DrawPictures(trainer, 1, 2)
    callback.on_train_begin(None, None, None)

    picture = np.asarray(trainer.draw_batch(callback.batch)["trunk"])

    third = picture.shape[1] // 3
    assert np.array_equal(picture[:, third : 2 * third], picture[:, 2 * third :])
    assert picture[:, third:].std() > 20


def test_synchronized_norms_keep_weights_and_activations():
    student = tiny_student(neck="lateral").eval()
    pixels = torch.randn(1, 3, 128, 128)
    names = list(student.state_dict())
    with torch.no_grad():
        expected = student.see(pixels)

    synchronize_norms(student, SimpleNamespace(device=torch.device("cuda"), world_size=2))

    kinds = {type(m) for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert not kinds
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in student.modules())
    assert list(student.state_dict()) == names
    with torch.no_grad():
        seen = student.see(pixels)
    torch.testing.assert_close(seen.fpn_hidden_states, expected.fpn_hidden_states)


def test_norms_are_synchronized_on_gpus_only(tmp_path, teacher):
    with pytest.raises(ValueError, match="sync_norms needs GPUs"):
        synchronize_norms(tiny_student(), SimpleNamespace(device=torch.device("cpu"), world_size=2))
    make_trainer(tmp_path, teacher, tiny_student(), sync_norms=True)  # one process shares nothing
    with pytest.raises(ValueError, match="drop sync_norms"):
        ImageDistillationArguments(str(tmp_path), freeze_norms=True, sync_norms=True, use_cpu=True)


def test_channels_of_another_teacher_are_an_error(tmp_path, teacher):
    trainer = make_trainer(tmp_path, teacher, tiny_student())
    inputs = {"pixel_values": torch.randn(1, 3, 112, 112)}
    targets = {"trunk": [torch.randn(1, 48, 8, 8)]}

    with pytest.raises(ValueError, match=r"'trunk' have 32 channels, the teacher's 48"):
        trainer.student_step(trainer.family, inputs, targets)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Samples:
    """Pictures in a folder, as a cache needs them."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        write_image(folder / f"{number}.png", Scenes(6, side=112)[number].image)
    return load(OwnImages(str(folder)))


@pytest.mark.parametrize(
    ("kind", "target"), [("trunk", "trunk"), ("levels", "neck"), ("tracker_levels", "tracker_neck")]
)
def test_a_cache_says_what_the_teacher_says(tmp_path, teacher, pictures, kind, target):
    frozen = Teacher(copy.deepcopy(teacher.detector), copy.deepcopy(teacher.tracker))
    options = CacheOptions(kind=kind, codec="fp16", flips=True, num_workers=0)
    processor = zoo.processor(teacher.configuration).image_processor
    writer = CacheWriter(tmp_path / "cache", pictures, processor, frozen, options)
    cache = writer.write()
    own = PictureCollator(processor, [flips(1.0)])
    trainer = make_trainer(tmp_path, teacher, tiny_student(), targets=[target])
    trainer.cache = cache
    samples = [pictures[index] for index in (4, 1)]

    batch = CachedTeacherFeatures(cache, own)(samples)

    stored, online = trainer.teacher_step(batch)[target], trainer.teacher_step(own(samples))[target]
    assert FEATURES in batch
    for kept, said in zip(stored, online, strict=True):
        torch.testing.assert_close(kept, said, rtol=2**-10, atol=1e-5)  # float16
    check_cache(cache, [target])
    trainer.data_collator = CachedTeacherFeatures(cache, own)
    trainer.epochs = 3
    NewEpoch(trainer).on_epoch_begin(None, None, None)
    assert int(own.augment[0].epoch) == 3
    with pytest.raises(ValueError, match=rf"features of kind '{kind}', but the target"):
        check_cache(cache, [target, "neck" if target == "trunk" else "trunk"])
