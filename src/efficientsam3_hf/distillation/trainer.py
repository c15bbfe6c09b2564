"""What all stages share: counting, loss terms, checkpoints that load, and going on after a stop."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size, gather_object
from PIL import Image
from safetensors import SafetensorError
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import cached_file

from ..data.loading import SampleStream
from ..hub.model_card import TEXT_TOWER
from ..hub.results import TRAINING_FILE, TrainingRecord, read_training, write_training
from ..hub.trainer_push import PushCodeCallback
from .arguments import DistillationArguments
from .cached_features import decoded
from .checkpoints import EXTRA_FILE, STATE_FILE, is_whole, last_checkpoint
from .ema import MovingAverage
from .family import NORMS, Family
from .pictures import DrawPictures
from .provenance import command_line, hardware, hyper_parameters, name_of, names_of
from .teacher_cache import TeacherCache


class DistillationTrainer(Trainer):
    """`Trainer` for a student and its frozen teacher. Each stage is a subclass of three methods.

    * `count` says of a batch how many units there are of each kind a loss term is a mean over.
    * `teacher_step` gives what the student is to reach.
    * `student_step` gives the loss terms, each the **sum** over the units of the batch.

    The sums are divided by the counts of a whole optimiser step, over all its batches and all
    processes. So neither the number of processes nor gradient accumulation changes a gradient.

    Args:
        model: The student.
        args: Of the stage.
        teacher: What `teacher_step` asks; moved to the device, in evaluation mode, never saved.
        parent: Folder the student came from: its record of training is continued.
        cache: `TeacherCache` of which batches bring the teacher's features along.
        eval_collator: In place of `data_collator` where the student is evaluated.
        **kwargs: For `Trainer`: `data_collator`, `train_dataset`, `eval_dataset`, ...
    """

    stage: ClassVar[str] = ""
    trained_parts: ClassVar[Sequence[str]] = ()
    # Loss term -> what it is counted in, and its factor.
    units: Mapping[str, str] = {}
    weights: Mapping[str, float] = {}
    # Samples in a picture.
    drawn: ClassVar[int] = 4

    args: DistillationArguments

    def __init__(
        self,
        model: Family,
        args: DistillationArguments,
        teacher: Any = None,
        parent: str | os.PathLike | None = None,
        cache: TeacherCache | None = None,
        eval_collator: Callable[[list], dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would split batches behind the trainer's back. "
                "Start one process for each GPU, with `accelerate launch`, or choose one with "
                "CUDA_VISIBLE_DEVICES."
            )
        if args.device.type == "cpu":  # where memory cannot be pinned
            args.dataloader_pin_memory = False
        if args.sync_norms:
            synchronize_norms(model, args)
        model.drops_out = args.dropout
        model.set_trainable(args.trained_parts or self.trained_parts, args.freeze_norms)
        super().__init__(model=model, args=args, **kwargs)
        # `compute_loss` divides by counts of the whole step itself.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.family = model
        self.teacher = self.prepare_teacher(teacher)
        self.parent, self.cache, self.eval_collator = parent, cache, eval_collator
        self.factors = {**self.weights, **self.own_weights()}
        self.epochs = 0  # that have begun
        self.tally: dict[str, Tensor] = {}
        self.tallied = 0
        self.is_evaluating = False
        if args.ema_decay and is_zero_3(self.accelerator):
            raise ValueError(
                f"ema_decay={args.ema_decay}: under ZeRO-3 there are no weights at hand to keep an "
                "average of. Set zero_stage: 2, take FSDP2, or set ema_decay to 0."
            )
        self.average = MovingAverage(model, args.ema_decay) if args.ema_decay else None
        if self.average is not None:
            self.add_callback(self.average)
        self.add_callback(PushCodeCallback())
        self.add_callback(NewEpoch(self))
        if self.is_fsdp_enabled:
            self.add_callback(GradientsForAll())
        if args.pictures_every:
            self.add_callback(DrawPictures(self, args.pictures_every, self.drawn))
        self.watch = Watch()

    @property
    def output_dir(self) -> Path:
        """Where checkpoints go, and the student at the end."""
        return Path(self.args.output_dir or "trainer_output")

    # What a stage says.

    def count(self, inputs: Mapping[str, Any]) -> dict[str, int | Tensor]:
        """How many units of each kind a batch has."""
        raise NotImplementedError

    def teacher_step(self, inputs: Mapping[str, Any]) -> Any:
        """What the student is to reach on a batch; called without gradients."""
        return None

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: Any
    ) -> dict[str, Tensor]:
        """Loss terms of a batch, each summed over its units; runs within the student's forward."""
        raise NotImplementedError

    def score(
        self, student: Family, inputs: Mapping[str, Any], targets: Any
    ) -> list[dict[str, float]]:
        """For evaluation: a record of `evaluation/` for each unit of a batch."""
        return []

    def summarize(self, records: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Numbers of a whole dataset out of the records of its units."""
        return {}

    def draw(self, student: Family, batch: Mapping[str, Any]) -> dict[str, Image.Image]:
        """Pictures, by name, of what the student makes of a batch; see `pictures_every`."""
        return {}

    def own_weights(self) -> dict[str, float]:
        """Factors of loss terms that the arguments set."""
        own = self.args.loss_weights or {}
        unknown = sorted(set(own) - set(self.weights))
        if unknown:
            raise ValueError(
                f"loss_weights names {unknown[0]!r}. The terms of this stage are: "
                f"{', '.join(self.weights)}."
            )
        return {name: float(value) for name, value in own.items()}

    def wanted(self, names: Sequence[str]) -> list[str]:
        """Those of some terms that have a weight."""
        return [name for name in names if self.factors[name]]

    def prepare_teacher(self, teacher: Any) -> Any:
        """The teacher where it will run; not a part of anything that is saved."""
        prepare = getattr(teacher, "prepare", None)
        if prepare is not None:
            return prepare(self.accelerator)
        if isinstance(teacher, nn.Module):
            return teacher.to(self.args.device).eval().requires_grad_(False)
        return teacher

    # One step.

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Units of all batches of an optimiser step, in all processes."""
        if not batch_samples:
            return None
        totals: dict[str, float] = {}
        for inputs in batch_samples:
            self.add_counts(totals, inputs)
        everyone = self.summed(torch.tensor(list(totals.values()), dtype=torch.float64))
        return dict(zip(totals, everyone.clamp(min=1).unbind(), strict=True))

    def summed(self, numbers: Tensor) -> Tensor:
        """Sums over all processes, as exact as the device has numbers."""
        kind = torch.float32 if self.args.device.type == "mps" else torch.float64
        sums: Any = self.accelerator.reduce(numbers.to(self.args.device, kind), reduction="sum")
        return sums

    def add_counts(self, totals: dict[str, float], inputs: Mapping[str, Any]) -> None:
        """Add the units of a batch to those of others."""
        for name, number in self.count(inputs).items():
            totals[name] = totals.get(name, 0) + float(number)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of the terms of a batch, as its share of the whole step."""
        counts = num_items_in_batch or self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad():
            targets = self.teacher_step(inputs)
        terms, balanced = model(self.losses, inputs, targets, counts)
        self.note(terms)
        loss = sum(self.factors[name] * term for name, term in balanced.items())
        # DDP takes the mean of gradients over processes: each holds its share of one sum.
        loss = loss * self.accelerator.num_processes
        return (loss, terms) if return_outputs else loss

    def losses(
        self,
        student: Family,
        inputs: Mapping[str, Any],
        targets: Any,
        counts: Mapping[str, float | Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms of a batch as their share of the whole step, and as they are added up.

        Both within the student's forward: whatever takes gradients of terms must do so before they
        leave it, since DeepSpeed takes every pass back through them for that of the step.
        """
        sums = self.student_step(student, inputs, targets)
        terms = {name: total / counts[self.units[name]] for name, total in sums.items()}
        return terms, self.balance(terms)

    def balance(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms as they are added up. A stage may scale some of them here."""
        return terms

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> Tensor:
        """As in `Trainer`; a lack of memory says what the batch was and what can be done."""
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"Out of memory in step {self.state.global_step + 1}, with a batch of "
                f"{describe(inputs)}. What was saved before is untouched: resume with a smaller "
                "per_device_train_batch_size and more gradient_accumulation_steps, which train the "
                "same, or with gradient_checkpointing or bf16."
            ) from error
        finally:
            self.watch.steps += 1

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As in `Trainer`, and timed: it is here that training waits for data.

        A stream may end within a step. Those batches are left out, as `Trainer` would add their
        gradient to that of the next step.
        """
        with self.watch.waiting():
            batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)
        return (batches, counts) if len(batches) == num_batches else ([], None)

    def cached(self, inputs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Tokens of the teacher that a batch brought along; None if it brought none."""
        return decoded(inputs, self.cache)

    def note(self, terms: Mapping[str, Tensor]) -> None:
        """Keep terms for the log; whether they are numbers is looked at when they are logged."""
        for name, term in terms.items():
            term = term.detach().float()
            self.tally[name] = self.tally[name] + term if name in self.tally else term

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in `Trainer`, with each term, samples a second, and the share of time without data."""
        if "loss" in logs and self.tally:
            steps = max(self.state.global_step - self.tallied, 1)
            logs |= {name: value / steps for name, value in self.read_tally().items()}
            logs |= self.watch.read(self.args.train_batch_size * self.args.world_size)
            self.tallied = self.state.global_step
        super().log(logs, *args, **kwargs)
        if self.args.stop_on_nan:
            self.check_numbers(logs)

    def read_tally(self) -> dict[str, float]:
        """Sums over steps of the terms of all processes; begins anew."""
        values = torch.stack(list(self.tally.values()))
        values = self.accelerator.reduce(values, reduction="sum").tolist()
        names = list(self.tally)
        self.tally = {}
        return dict(zip(names, values, strict=True))

    def check_numbers(self, logs: Mapping[str, Any]) -> None:
        """Raise if a loss is no number, before weights that are none are saved."""
        wrong = {
            name: value
            for name, value in logs.items()
            if (name == "loss" or name in self.units)
            and isinstance(value, float)
            and not math.isfinite(value)
        }
        if wrong:
            kept = last_checkpoint(self.output_dir)
            raise FloatingPointError(
                f"The loss is no number by step {self.state.global_step}: {wrong}. "
                + (f"{kept} was saved before and is good: resume from it " if kept else "Start ")
                + "with a lower max_grad_norm, or bf16 in place of fp16; or begin anew with a "
                "lower learning_rate, of which a checkpoint keeps its own."
            )

    # The optimiser.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `Trainer`, with a learning rate of their own for norms and for the trunk."""
        is_new = self.optimizer is None
        optimizer = (
            super().create_optimizer(model) if model is not None else super().create_optimizer()
        )
        if not is_new:
            return optimizer
        factors = self.rate_factors(self.family)
        groups = []
        for group in optimizer.param_groups:
            by_factor: dict[float, list[nn.Parameter]] = {}
            for weight in group["params"]:
                by_factor.setdefault(factors.get(weight, 1.0), []).append(weight)
            groups += [
                {**group, "params": weights, "lr": group["lr"] * factor}
                for factor, weights in by_factor.items()
            ]
        optimizer.param_groups = groups
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in `Trainer`, which knows norms by their names, less those that have other names."""
        names = super().get_decay_parameter_names(model)
        kinds = (*NORMS, nn.GroupNorm)
        norms = {f"{n}.weight" for n, each in model.named_modules() if isinstance(each, kinds)}
        return [name for name in names if name not in norms]

    def rate_factors(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """By how much the learning rate of a weight differs from that of the rest."""
        decayed = set(self.get_decay_parameter_names(model))
        return {
            weight: (1.0 if name in decayed else self.args.norm_learning_rate)
            * (self.args.trunk_learning_rate if ".backbone.trunk." in name else 1.0)
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    # Data.

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; a stream of ours is shared out among processes by itself."""
        if not isinstance(self.train_dataset, SampleStream):
            return super().get_train_dataloader()
        return self.stream_loader(self.train_dataset, self._train_batch_size, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """A loader of this process's part of the samples: together they have each of them once."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("There is nothing to evaluate on: give an eval_dataset.")
        collate = self.eval_collator or self.data_collator
        if isinstance(dataset, SampleStream):
            return self.stream_loader(dataset, self.args.eval_batch_size, collate)
        if len(dataset) < self.args.world_size:
            raise ValueError(
                f"{len(dataset)} samples cannot be shared out among {self.args.world_size} "
                "processes: evaluate on more."
            )
        own = range(self.args.process_index, len(dataset), self.args.world_size)
        return self.loader(Subset(dataset, own), self.args.eval_batch_size, collate)

    def stream_loader(self, stream: SampleStream, batch_size: int, collate: Any) -> DataLoader:
        """A loader of this process's part of a stream."""
        own = stream.split(self.args.process_index, self.args.world_size)
        # Or one process would have a batch more than another.
        return self.loader(own, batch_size, collate, drop_last=True)

    def loader(
        self, dataset: Any, batch_size: int, collate: Any, drop_last: bool = False
    ) -> DataLoader:
        """A loader as the arguments have it, that nothing shares out any further."""
        return DataLoader(
            dataset,
            batch_size,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            drop_last=drop_last,
        )

    # Checkpoints.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The folder that `from_pretrained` reads; at the end of training, of averaged weights."""
        is_checkpoint = _internal_call and output_dir is not None  # a push names no folder
        with nullcontext() if is_checkpoint else self.averaged():
            super().save_model(output_dir or self.args.output_dir, _internal_call=_internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the family's card was written with the weights."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # First, since the card that is saved with the weights tells it.
        write_training([*self.earlier_stages, self.training_record()], folder)
        repo_id = self.hub_model_id if self.args.push_to_hub else None
        self.family.save(folder, state_dict, repo_id)
        torch.save(self.args, folder / "training_args.bin")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():  # `Trainer` takes the weights alone
            for file in Path(checkpoint_folder).iterdir():
                is_told = file.suffix in ("", ".json", ".md", ".txt") and file.is_file()
                if is_told and file.name not in (STATE_FILE, EXTRA_FILE):
                    shutil.copy(file, self.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    @cached_property
    def earlier_stages(self) -> list[TrainingRecord]:
        """Those that the student has come through, by the record of its folder or repository."""
        if self.parent is None:
            return []
        record = cached_file(
            self.parent,
            TRAINING_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return [] if record is None else read_training(Path(record).parent)

    def training_record(self) -> TrainingRecord:
        """This stage, for the card."""
        initial_weights = {"student": self.parent_name()}
        if self.parent is None and "text_encoder" in self.family.detector.fresh_parts:
            initial_weights[TEXT_TOWER] = "random"
        return TrainingRecord(
            stage=self.stage or type(self).__name__,
            teacher=name_of(self.teacher),
            datasets=names_of(self.train_dataset),
            command=command_line(),
            steps=self.state.global_step,
            hardware=hardware(self.args),
            initial_weights=initial_weights,
            hyper_parameters=hyper_parameters(self.args),
        )

    def parent_name(self) -> str:
        """Where the student came from, without the place on this machine."""
        if self.parent is None:
            return "teacher"
        return Path(self.parent).name if os.path.isdir(self.parent) else str(self.parent)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`; if it cannot be written whole, it is not there at all."""
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"
        if self.tally and self.args.stop_on_nan:
            self.check_numbers({name: term.item() for name, term in self.tally.items()})
        if self.args.should_save:  # one of this number that is there is whole no longer
            (folder / STATE_FILE).unlink(missing_ok=True)
        try:
            with self.watch.resting():
                super()._save_checkpoint(model, trial)
        # Where a disk is full, torch and safetensors raise errors of their own.
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_whole(folder):  # what failed came after it, such as a push
                raise
            shutil.rmtree(folder, ignore_errors=True)
            kept = last_checkpoint(self.output_dir)
            raise OSError(
                f"{folder.name} could not be written ({error}), and was taken away again. "
                f"{f'{kept} is whole. ' if kept else ''}If the disk is full, make room, or choose "
                "a lower save_total_limit, and resume."
            ) from error

    def extra_state(self) -> dict[str, float]:
        """What a stage must remember besides, to go on as if nothing had been."""
        return {}

    def load_extra_state(self, state: Mapping[str, float]) -> None:
        """Take up what `extra_state` gave."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.average is not None:
            self.average.save(output_dir, self.args.should_save)
        if not self.args.should_save:
            return
        if state := self.extra_state():
            (Path(output_dir) / EXTRA_FILE).write_text(json.dumps(state), encoding="utf-8")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> Any:
        """As in `Trainer`; True resumes from the last checkpoint that was written whole, if any.

        Checkpoints of two runs in one folder would be taken for one another: that is an error.
        """
        found = last_checkpoint(self.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = found
        elif found and not resume_from_checkpoint:
            raise ValueError(
                f"{found} is of an earlier run. Go on with it by resume_from_checkpoint=True, or "
                "choose another output_dir, or delete that one."
            )
        if resume_from_checkpoint:
            self.check_stage(Path(resume_from_checkpoint))
        self.watch = Watch()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_stage(self, checkpoint: Path) -> None:
        """Raise for a checkpoint of another stage."""
        own = self.training_record().stage
        stages = [record.stage for record in read_training(checkpoint)]
        if stages and stages[-1] != own:
            raise ValueError(
                f"{checkpoint} is of {stages[-1]!r}, and this is {own!r}. Each stage has an "
                "output_dir of its own, and starts from the student of the one before."
            )

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """As in `Trainer`, which takes all passes over a stream for the first when it resumes."""
        self.epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        goes_on = not has_length(self.train_dataset) and not self.args.ignore_data_skip
        if resume_from_checkpoint is not None and goes_on:
            # Its state has the passes before this one, and steps of this one as a share of all.
            before = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, STATE_FILE))
            self.epochs = math.ceil(before.epoch) - 1
            steps = round((before.epoch - self.epochs) * before.max_steps)
            batches = steps * self.args.gradient_accumulation_steps
        return self.epochs, batches

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.family.load_weights(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_own_state(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None:
            return
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)
        self.load_own_state(best)

    def load_own_state(self, checkpoint: str) -> None:
        """Go on with the average and with what the stage remembers."""
        if self.average is not None:
            self.average.load(checkpoint)
        extra = Path(checkpoint) / EXTRA_FILE
        if extra.is_file():
            self.load_extra_state(json.loads(extra.read_text(encoding="utf-8")))

    # Evaluation.

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the student has its averaged weights, if an average is kept."""
        if self.average is None:
            yield
            return
        with self.family.holding(self.average.weights):
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it, `is_evaluating` is true: for stages that then ask otherwise."""
        self.is_evaluating = True
        try:
            with self.watch.resting():
                yield
        finally:
            self.is_evaluating = False

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The loss terms of a whole dataset, and what `summarize` says of it."""
        model: Any = self._wrap_model(self.family, training=False)
        model.eval()
        totals: dict[str, Tensor] = {}
        counts: dict[str, float] = {}
        records: list[Mapping[str, float]] = []
        seen = 0
        is_stream = isinstance(dataloader.dataset, IterableDataset)
        batches = tqdm(
            self.in_step(dataloader),
            desc=description,
            total=None if is_stream else len(dataloader),
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        )
        with torch.no_grad(), self.averaged(), self.evaluating():
            for inputs, is_new in batches:
                with self.compute_loss_context_manager(), self.autocast_smart_context_manager():
                    targets = self.teacher_step(inputs)
                    sums = model(self.student_step, inputs, targets)
                    scored = model(self.score, inputs, targets)
                if not is_new:
                    continue
                records += scored
                seen += find_batch_size(inputs) or 0
                for name, total in sums.items():
                    totals[name] = totals.get(name, 0) + total.detach().cpu().double()
                self.add_counts(counts, inputs)
            metrics = self.join_terms(totals, counts, metric_key_prefix)
            records = gather_object(records)
            measured = self.summarize(records) if records else {}
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        number: Any = self.accelerator.reduce(torch.tensor(seen, device=self.args.device))
        nothing: Any = None
        return EvalLoopOutput(nothing, nothing, metrics, int(number))

    def in_step(self, dataloader: DataLoader) -> Iterator[tuple[dict[str, Any], bool]]:
        """Batches, each with True; then the last again, with False, while others have some left.

        Where weights are sharded, all processes gather them, or none can.
        """
        inputs: Any = None
        batches = iter(dataloader)
        while True:
            batch = next(batches, None)
            mine = torch.tensor([batch is not None], device=self.args.device)
            if not self.accelerator.gather(mine).any():
                return
            inputs = inputs if batch is None else self._prepare_inputs(batch)
            yield inputs, batch is not None

    def join_terms(
        self, totals: dict[str, Tensor], counts: dict[str, float], prefix: str
    ) -> dict[str, float]:
        """Means over the datasets of all processes."""
        names = list(totals)
        own = torch.stack([totals[name] for name in names])
        own = torch.cat([own, own.new_tensor(list(counts.values()))])
        values = self.summed(own).tolist()
        everyone = dict(zip(counts, values[len(names) :], strict=True))
        means = {
            name: value / max(everyone[self.units[name]], 1)
            for name, value in zip(names, values, strict=False)
        }
        loss = math.fsum(self.factors[name] * value for name, value in means.items())
        return {f"{prefix}_loss": loss} | {f"{prefix}_{name}": v for name, v in means.items()}

    def draw_batch(self, batch: dict[str, Any]) -> dict[str, Image.Image]:
        """What `draw` says of a batch, of the weights as they would be saved."""
        model: Any = self._wrap_model(self.family, training=False)
        was_training = model.training
        model.eval()
        with (
            torch.no_grad(),
            self.watch.resting(),
            self.averaged(),
            self.autocast_smart_context_manager(),
        ):
            pictures = model(self.draw, self._prepare_inputs(batch))
        model.train(was_training)
        return pictures


class GradientsForAll(TrainerCallback):
    """Gives weights that no loss has reached a gradient of 0, and so a state of the optimiser.

    Without one for each weight that is trained, torch does not resume what FSDP2 shares out.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Before the first step, and each after it."""
        for weight in model.parameters() if model is not None else ():
            if weight.requires_grad and weight.grad is None:
                weight.grad = torch.zeros_like(weight)


class NewEpoch(TrainerCallback):
    """Tells data and collator which epoch it is, for what they choose anew in each."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        """Pass the number of the epoch on: `state.epoch` does not count passes over a stream."""
        collator: Any = self.trainer.data_collator
        # A stream's loader has a part of it, with an epoch of its own.
        data = getattr(train_dataloader, "dataset", None)
        for holder in (data, collator, *(getattr(collator, "augment", None) or ())):
            set_epoch = getattr(holder, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self.trainer.epochs)
        self.trainer.epochs += 1


class Watch:
    """How long training takes, and how much of it is waiting for data."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited = self.steps = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is spent without data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Time spent here is not of training."""
        start = time.perf_counter()
        yield
        self.began += time.perf_counter() - start

    def read(self, batch_size: int) -> dict[str, float]:
        """Samples a second and the share of waiting since the last time; begins anew."""
        now = time.perf_counter()
        passed = max(now - self.began, 1e-9)
        numbers = {
            "samples_per_second": self.steps * batch_size / passed,
            "waiting_for_data": self.waited / passed,
        }
        self.began, self.waited, self.steps = now, 0.0, 0.0
        return numbers


def synchronize_norms(model: nn.Module, args: DistillationArguments) -> None:
    """Let batch norms see the batches of all processes."""
    if args.world_size == 1:
        return
    if args.device.type == "cpu":
        raise ValueError("sync_norms needs GPUs: torch has no synchronized batch norms for CPUs.")
    convert_sync_batchnorm(model)  # timm's, which knows its norms with activations


def is_zero_3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed shares weights out."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def describe(inputs: Mapping[str, Any]) -> str:
    """The shapes of a batch."""
    shapes = [f"{name} {tuple(x.shape)}" for name, x in inputs.items() if isinstance(x, Tensor)]
    shapes += [f"{name}: {describe(x)}" for name, x in inputs.items() if isinstance(x, Mapping)]
    return ", ".join(shapes) or "no tensors"
