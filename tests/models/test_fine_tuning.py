"""transformers' own `Trainer` fine-tunes the concept model, as docs/fine_tuning.md says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_vision
from transformers import Trainer, TrainingArguments

from efficientsam3_hf import EfficientSam3ImageProcessor, EfficientSam3Model, EfficientSam3Processor
from efficientsam3_hf.data.collators import ImageCollator
from efficientsam3_hf.data.synthetic import Scenes
from efficientsam3_hf.tokenizer import build_tokenizer

SIDE = 64
SIZE = {"height": SIDE, "width": SIDE}
PAGE = Path(__file__).parents[2] / "docs" / "fine_tuning.md"


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    """Few enough to be learnt by heart in seconds; two phrases of each name nothing."""
    scenes = Scenes(8, side=SIDE, most=3)
    return [scenes[index] for index in range(8)]


@pytest.fixture(scope="module")
def small_processor() -> EfficientSam3Processor:
    image_processor = EfficientSam3ImageProcessor(size=SIZE, mask_size={"height": 16, "width": 16})
    return EfficientSam3Processor(image_processor, build_tokenizer(16))


def fresh_model() -> EfficientSam3Model:
    torch.manual_seed(0)
    vision = tiny_vision("lateral")
    vision["backbone_config"]["image_size"] = SIDE
    objective = {"class_queries": 5, "mask_points": 64}
    return EfficientSam3Model(tiny_config(vision, objective=objective, init_local_box_bias=True))


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4, "bf16": True},
    ],
    ids=["plain", "accumulation", "bf16"],
)
def test_the_loss_falls_with_the_plain_trainer(options, scenes, small_processor, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=24,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        label_names=["labels"],
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(
        model=fresh_model(),
        args=arguments,
        data_collator=ImageCollator(small_processor, mask_size=(32, 32)),
        train_dataset=scenes,
        eval_dataset=scenes,
    )
    before = trainer.evaluate()["eval_loss"]

    trainer.train()

    after = trainer.evaluate()["eval_loss"]
    assert after < 0.65 * before


def test_the_page_is_run_from_top_to_bottom(small_processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "path/to/efficientsam3-tinyvit-s"
    fresh_model().save_pretrained(folder)
    small_processor.save_pretrained(folder)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    # As the page says it, but for how long it takes, and what a test run is not to leave or print.
    quick = (
        "max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,"
    )
    blocks[0] = blocks[0].replace("max_steps=1000,", quick)
    names: dict[str, Any] = {}

    for block in blocks:
        exec(block, names)

    assert len(blocks) == 3
    again = EfficientSam3Model.from_pretrained(tmp_path / "fine-tuned")
    trained = names["trainer"].model.state_dict()
    fresh = fresh_model().state_dict()
    box_head = "detr_decoder.box_head.layer1.weight"
    assert torch.equal(again.state_dict()[box_head], trained[box_head])
    assert not torch.equal(trained[box_head], fresh[box_head])
    assert all(p.grad is None or p.grad.isfinite().all() for p in names["model"].parameters())
