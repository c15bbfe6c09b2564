"""Clips, a student that differs from its teacher in memory alone, and runs in other processes.

python clip_worlds.py OUTPUT_DIR KILL_IN_STEP {"max_steps": 4, ...}
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from distillation.worlds import tiny_teacher
from tiny import TINY_VIT, stir, tiny_config, tiny_video_config
from transformers import TrainerCallback

from efficientsam3_hf import (
    EfficientSam3ImageProcessor,
    EfficientSam3Model,
    EfficientSam3TrackerVideoModel,
)
from efficientsam3_hf.data.collators import ClipCollator
from efficientsam3_hf.data.synthetic import Clips
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.stage2_memory import (
    MemoryDistillationArguments,
    MemoryDistillationTrainer,
)

FRAMES = 4


def processor(size: int) -> EfficientSam3ImageProcessor:
    """Of a model of this size."""
    return EfficientSam3ImageProcessor(size={"height": size, "width": size})


def clips(length: int = 4, split: str = "train") -> Clips:
    """Clips of which every second frame is annotated."""
    return Clips(length, split, side=112, num_frames=FRAMES, most=3, annotate_every=2)


def collator(size: int = 112) -> ClipCollator:
    """To batches for a student of this size."""
    return ClipCollator(processor(size), mask_size=(32, 32), teacher_processor=processor(112))


def heir(teacher: Family) -> Family:
    """A student that has all of its teacher but the memory."""
    detector = stir(EfficientSam3Model(tiny_config(TINY_VIT)))
    detector.load_state_dict(teacher.detector.state_dict())
    config = tiny_video_config("perceiver", TINY_VIT)
    torch.manual_seed(2)
    source: Any = teacher.tracker
    return Family(detector, EfficientSam3TrackerVideoModel.from_teacher(source, config))


def make_trainer(
    folder: Any, student: Family | None = None, cache: Any = None, **fields: Any
) -> MemoryDistillationTrainer:
    """A trainer on four clips; of the heir of its teacher, if no student is given."""
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 5,
    }
    args = MemoryDistillationArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, **{**settings, **fields}
    )
    teacher = tiny_teacher()
    student = heir(teacher) if student is None else student
    return MemoryDistillationTrainer(
        student,
        args,
        teacher=teacher,
        cache=cache,
        train_dataset=clips(),
        eval_dataset=clips(2, "val"),
        data_collator=collator(student.detector.config.image_size),
    )


def trained_weights(made: MemoryDistillationTrainer) -> dict[str, torch.Tensor]:
    """Of a trainer's student."""
    return {
        name: weight.detach().clone()
        for name, weight in made.family.named_parameters()
        if weight.requires_grad
    }


class Kill(TrainerCallback):
    """Ends the process as a power cut would, in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        """Of several batches of a step, the first is done."""
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def start(folder: Path, kill: int = -1, rank: int = 0, port: int = 0, **fields: Any):
    """Train in another process, which writes `weights.pt`; with a port, in one of two."""
    places = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    if port:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        fields["ddp_backend"] = "gloo"
    words = [sys.executable, __file__, str(folder), str(kill), json.dumps(fields)]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> None:
    """Wait for the end of a process, which must be this one."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """What `start` runs."""
    torch.set_num_threads(1)
    folder, kill, fields = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    made = make_trainer(folder, **fields)
    if kill >= 0:
        made.add_callback(Kill(kill))
    made.train(resume_from_checkpoint=True)
    if made.is_world_process_zero():
        torch.save(trained_weights(made), Path(folder, "weights.pt"))


if __name__ == "__main__":
    main()
