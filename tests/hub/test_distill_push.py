"""What a run of distillation pushes: a student that loads, its card, and nothing of the teacher."""

import json

import pytest
import torch
import yaml
from distillation.worlds import concept_trainer, tiny_student, tiny_teacher
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback

from efficientsam3_hf import zoo
from efficientsam3_hf.distillation.launch import prepare

pytestmark = [
    # As in test_push_and_pull.py.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]
TOLD = {
    "stage1_image": ("stage 1: image", "targets", "trunk"),
    "stage3_concepts": ("stage 3: concepts", "balance", "0.25"),
}


class WaitForPush(TrainerCallback):
    """Waits for each push, since `Trainer` skips those that come before the last has ended."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        self.trainer.push_in_progress.wait_until_done()
        assert not any(job.exception() for job in self.trainer.push_in_progress.jobs)


@pytest.mark.parametrize("stage", TOLD)
def test_a_run_pushes_the_student_with_its_card(stage, hub, tmp_path):
    tiny_teacher().save(tmp_path / "teacher")
    tiny_student().save(tmp_path / "parent")
    told, name, value = TOLD[stage]
    config = {
        "stage": stage,
        "student": str(tmp_path / "parent"),
        "teacher": {"name": str(tmp_path / "teacher"), "dtype": "float32"},
        "data": {"format": "synthetic", "length": 4, "side": 112},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "push_to_hub": True,
            "hub_model_id": "owner/student",
            "max_steps": 2,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-4,
            "ema_decay": 0.5,
            "disable_tqdm": True,
            "use_cpu": True,
            name: [value] if name == "targets" else float(value),
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run = prepare(path)
    run.trainer.add_callback(WaitForPush(run.trainer))

    run.train()

    pushed = AutoModel.from_pretrained("owner/student")
    averaged = run.trainer.average.weights
    followed = {f"detector.{key}" for key, _ in pushed.named_parameters()} & averaged.keys()
    assert followed
    own = pushed.state_dict()
    for key in followed:
        assert torch.equal(own[key.removeprefix("detector.")], averaged[key])
    stored = hub.files("owner/student")
    assert {"README.md", "LICENSE", "training_record.json", "tokenizer.json"} <= stored.keys()
    local = load_file(tmp_path / "out" / "model.safetensors")
    assert local.keys() == load_file(tmp_path / "parent" / "model.safetensors").keys()
    weights = [file for file in stored if file.endswith((".safetensors", ".pt", ".pth"))]
    assert weights == ["model.safetensors"]  # of the student, whose names these are

    card = ModelCard.load("owner/student").text
    assert told in card
    assert "student before | parent" in card
    assert "| data | Scenes |" in card
    assert f"| {name} | `" in card
    assert value in card
    assert "| learning\\_rate | `0.0003` |" in card
    assert '"owner/student"' in card
    assert str(tmp_path) not in card
    repository = hub.repositories["owner/student"]
    middle = next(
        commit
        for commit, message in repository.messages.items()
        if message == "Training in progress, step 1"
    )
    assert {"README.md", "LICENSE", "tokenizer.json"} <= repository.commits[middle].keys()


def test_a_save_writes_the_card_once(monkeypatch, tmp_path):
    written = []
    write = zoo.write_model_card
    monkeypatch.setattr(
        zoo, "write_model_card", lambda *given: (written.append(given), write(*given))
    )
    trainer = concept_trainer(tmp_path)

    trainer.save_model()

    assert len(written) == 1
    (record,) = json.loads((tmp_path / "training_record.json").read_text())
    assert record["hyper_parameters"]["confidence"] == "0.05"
    assert "stage 3: concepts" in (tmp_path / "README.md").read_text()
