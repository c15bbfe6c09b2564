"""What a trainer pushes on the way is of use at once, also to those without the package."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from efficientsam3_hf import EfficientSam3VisionModel
from efficientsam3_hf.hub.trainer_push import PushCodeCallback
from efficientsam3_hf.models.auto_map import copy_code

pytestmark = [
    # As in test_push_and_pull.py.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    # torch asks for pinned memory's accelerator where there is none.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
PIXELS = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(2))


class Noise(Dataset):
    """Images of noise."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 112, 112, generator=generator)}


class ToyTrainer(Trainer):
    """Makes features small, which is enough to change the weights."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(inputs["pixel_values"])
        loss = outputs.last_hidden_state.square().mean()
        return (loss, outputs) if return_outputs else loss


class WaitForPush(TrainerCallback):
    """Waits for each push, since `Trainer` skips those that come before the last has ended.

    It keeps what the model computes then.
    """

    def __init__(self):
        self.trainer: Trainer | None = None
        self.outputs: dict[int, torch.Tensor] = {}

    def on_save(self, args, state, control, model, **kwargs):
        push = self.trainer.push_in_progress
        if push is not None:
            push.wait_until_done()
            assert not any(job.exception() for job in push.jobs)
        training = model.training
        with torch.no_grad():
            self.outputs[state.global_step] = model.eval()(PIXELS).last_hidden_state
        model.train(training)


def train(folder: Path, strategy: str, callbacks: list[TrainerCallback], processor=None):
    """Two steps, with a push after each; what the model computed then, by step."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        push_to_hub=True,
        hub_model_id="owner/student",
        hub_strategy=strategy,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    waiting = WaitForPush()
    waiting.trainer = ToyTrainer(
        tiny_model().vision_encoder,
        arguments,
        train_dataset=Noise(),
        processing_class=processor,
        callbacks=[waiting, *callbacks],
    )
    waiting.trainer.train()
    return waiting


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("inputs") / "pixels"
    save_file({"pixel_values": PIXELS}, file)
    return str(file)


def code(folder: Path) -> set[str]:
    return {file.name for file in copy_code(folder / "code")}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_every_intermediate_push_loads_without_the_package(
    strategy: str, hub, fresh, inputs, processor, tmp_path
):
    processor = processor if strategy == "checkpoint" else None

    training = train(tmp_path / "run", strategy, [PushCodeCallback()], processor)

    repository = hub.repositories["owner/student"]
    by_step = {
        int(message.rsplit(" ", 1)[1]): commit
        for commit, message in repository.messages.items()
        if message.startswith("Training in progress") and message[-1].isdigit()
    }
    assert by_step.keys() == {1, 2}
    assert not torch.equal(training.outputs[1], training.outputs[2])
    for step, commit in by_step.items():
        assert code(tmp_path) <= repository.commits[commit].keys()
        name, module = fresh.run(
            "compute", "AutoModel", "owner/student", inputs, tmp_path / "out", revision=commit
        )
        assert (name, module.split(".")[0]) == ("EfficientSam3VisionModel", "transformers_modules")
        outputs = load_file(tmp_path / "out")["last_hidden_state"]
        torch.testing.assert_close(outputs, training.outputs[step], atol=1e-6, rtol=1e-5)
    if strategy == "checkpoint":
        options = {"subfolder": "last-checkpoint"}
        fresh.run("compute", "AutoModel", "owner/student", inputs, tmp_path / "out", **options)
        outputs = load_file(tmp_path / "out")["last_hidden_state"]
        torch.testing.assert_close(outputs, training.outputs[2], atol=1e-6, rtol=1e-5)
        last = EfficientSam3VisionModel.from_pretrained("owner/student", **options)
        assert torch.isfinite(last(PIXELS).last_hidden_state).all()
        classes = fresh.run("process", "owner/student", tmp_path / "out")
        assert classes["processor"] == "EfficientSam3Processor"


def test_the_callback_is_what_it_takes(hub, fresh, tmp_path):
    train(tmp_path / "run", "every_save", [])

    assert "remote_code.py" not in hub.files("owner/student")
    message = fresh.run("error", "AutoModel", "owner/student")
    assert "does not appear to have a file named remote_code.py" in message


def test_the_last_push_loads_without_the_package(hub, fresh, inputs, tmp_path):
    training = train(tmp_path / "run", "end", [PushCodeCallback()])

    assert training.trainer is not None
    training.trainer.push_to_hub()

    assert code(tmp_path) <= hub.files("owner/student").keys()
    fresh.run("compute", "AutoModel", "owner/student", inputs, tmp_path / "out")
