"""A student for the pictures of a folder and a list of phrases, with a teacher and nothing else.

    job = FolderJob(FolderSettings("photos", "phrases.txt", "efficientsam3-tinyvit-s", "student"))
    plan = job.plan()
    result = job.run()

The teacher labels the pictures, its features are cached if that pays, the student goes through the
stages, is calibrated, and is compared with the teacher on pictures that it has not seen. Run again
after any interruption, it goes on where it stopped. On disk:

    student/                 what `from_pretrained` reads, with card, records and licence
    student/work/labels/     what the teacher says, picture by picture and in SA-Co's form
    student/work/cache/      the teacher's features
    student/work/STAGE/      the student after each stage
    student/work/evaluation/ predictions and numbers
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data.loading import Samples
from ..data.phrases import write_phrases
from ..models.prompts import VISUAL_PHRASE
from .cache_files import INDEX, alone_in, write_json
from .cache_writer import CacheOptions, CacheWriter
from .data_settings import DataSettings, load_samples
from .folder_facts import DECISIONS, FolderFacts, digest, free_bytes
from .folder_plan import FolderPlan, StagePlan, measure_student, seconds_of
from .folder_result import FolderResult, evaluate_student, write_student
from .folder_stages import show_nothing, weights_checksum
from .provenance import command_line
from .teacher_labels import write_part

SUMMARY, RESULT = "summary.json", "result.json"
PARTS = ("train", "validation", "test")


class FolderJob(FolderFacts):
    """Everything from pictures to a student that was evaluated."""

    # The plan.

    def plan(self) -> FolderPlan:
        """What there is to do. Teacher and student are timed; nothing is written."""
        self.check_stages()
        speeds, _ = self.measured
        ranks = self.state.num_processes
        labelled = sum(self.labels.labelled(name) is not None for name in self.names)
        training = len(self.parts["train"])
        stages = [
            StagePlan(
                name,
                self.steps_of(name),
                self.samples_of_step(name),
                self.takes_cache(name),
                self.folder_of(name).result is not None,
            )
            for name in self.stages
        ]
        to_do = [stage for stage in stages if not stage.is_done]
        if to_do:
            run = self.run_of(to_do[0].name)
            bf16, batch = bool(run.training.bf16), self.settings.batch
            phrases, device = self.all_phrases, self.teacher.device
            measure_student(run.student, speeds, phrases, batch, device, bf16)
            for stage in to_do:
                stage.seconds = seconds_of(stage, speeds, min(4, len(phrases))) / ranks
        is_cached = (self.work / "cache" / INDEX).is_file() or not self.caches
        return FolderPlan(
            pictures=len(self.names),
            training=training,
            validation=len(self.parts["validation"]),
            test=len(self.parts["test"]),
            phrases=len(self.all_phrases),
            pairs=sum(len(self.labels.phrases_of(name)) for name in self.names),
            labelled=labelled,
            label_seconds=(len(self.names) - labelled) * speeds.label / ranks,
            cache_bytes=self.cache_bytes if self.cacheable else 0,
            free_bytes=free_bytes(self.output),
            caches=self.caches,
            cache_seconds=0.0 if is_cached else 2 * training * speeds.trunk / ranks,
            stages=stages,
            remarks=self.remarks(),
        )

    def remarks(self) -> list[str]:
        """What to know before it starts."""
        remarks = []
        if "stage1_text" in self.stages:
            remarks.append(
                f"The student's text tower is not the teacher's. It learns the "
                f"{self.text_count:,} phrases that it is given and no others; a variant whose "
                "name ends in -sam3text keeps the teacher's."
            )
        unknown = set(self.phrases) - set(self.names) if isinstance(self.phrases, dict) else ()
        if unknown:
            remarks.append(
                f"The phrases name {len(unknown):,} pictures that are not in the folder, for "
                f"example {min(unknown)}."
            )
        return remarks

    # The work.

    def run(self) -> FolderResult:
        """Do it, or what of it is left. All processes take part, and all get the result."""
        with self.alone():
            self.check_stages()
            if self.state.is_main_process:
                write_json(self.work / DECISIONS, {"caches": self.caches})
            self.state.wait_for_everyone()
            self.label()
            if self.caches:
                self.write_cache()
            for stage in self.stages:
                self.train(stage)
            return self.finish()

    def alone(self) -> AbstractContextManager[None]:
        """Keep other runs out of the folder."""
        if not self.state.is_main_process:
            return nullcontext()
        refusal = f"Another process works in {self.output}. Wait for it, or stop it."
        return alone_in(self.work, ValueError(refusal))

    def check_stages(self) -> None:
        """Raise for the first part of the work that was begun otherwise, before anything is done.

        Labels are kept where pictures or phrases were added; stages are not.
        """
        kept = ("teacher", "precision", "confidence", "absent")
        self.folder_of("labels").check({name: self.sources[name] for name in kept})
        for stage in self.stages:
            self.folder_of(stage).check(self.identity(stage))

    def label(self) -> None:
        """Have all pictures labelled, and write the parts in SA-Co's form."""
        state = self.state
        if state.is_main_process:
            self.folder_of("labels").begin(self.sources)
        mine = self.names[state.process_index :: state.num_processes]
        missing = [name for name in mine if self.labels.labelled(name) is None]
        show = self.show if state.is_main_process else show_nothing
        advance = show("labels", len(missing))
        for name in missing:
            self.labels.label(name, self.labeller)
            advance(1)
        state.wait_for_everyone()
        if state.is_main_process:
            self.write_parts()
        state.wait_for_everyone()
        if not self.part("train").is_file():
            raise ValueError(
                "The teacher is sure of no phrase in any picture to learn from: give phrases of "
                f"what can be seen, or other thresholds. {self.work / 'labels' / SUMMARY} counts "
                "what it says."
            )

    def write_parts(self) -> None:
        """The labels of each part, and counts of them."""
        summary = {}
        for part in PARTS:
            labels = (self.labels.labelled(name) for name in self.parts[part])
            summary[part] = write_part([each for each in labels if each], self.part(part))
        write_json(self.work / "labels" / SUMMARY, summary)
        # What goes with exemplars alone is read by the student's text tower, too.
        write_phrases([VISUAL_PHRASE, *self.all_phrases], self.work / "labels" / "phrases.json")

    def samples(self, part: str) -> Samples | None:
        """Pictures of a part with their labels; None if there are none."""
        if not self.part(part).is_file():
            return None
        values = {**self.data_of("stage3_concepts"), "annotations": str(self.part(part))}
        return load_samples(DataSettings(**values), "images")

    def write_cache(self) -> None:
        """The teacher's features of the pictures to learn from, as they are and flipped."""
        batch, samples = self.settings.batch, self.samples("train")
        options = CacheOptions(flips=True, batch_size=batch, num_workers=self.workers)
        transform, folder = self.labeller.processor, self.work / "cache"
        assert samples is not None  # or `label` would have raised
        CacheWriter(folder, samples, transform, self.teacher, options, self.state).write()

    def train(self, stage: str) -> None:
        """Run a stage, or what of it is left."""
        folder = self.folder_of(stage)
        before = self.stages[: self.stages.index(stage)]
        parent = self.folder_of(before[-1]).result if before else None
        settings = {**self.identity(stage), "parent": parent}
        folder.check(settings)
        if folder.result is None:
            folder.train(settings, self.run_of(stage), self.show)
            self.next_run = None  # and with it the student and its optimiser

    def finish(self) -> FolderResult:
        """The student calibrated, written, and compared with the teacher."""
        state, settings = self.state, self.settings
        last = self.folder_of(self.stages[-1])
        folder, path = self.folder_of("result"), self.work / "result" / RESULT
        made_of = {"student": last.result, "labels": digest(self.summary)}
        is_done = folder.record.get("settings") == made_of and folder.result is not None
        if is_done and folder.result == weights_checksum(self.output):
            return FolderResult(**json.loads(path.read_text(encoding="utf-8")))
        result = FolderResult(
            str(self.output),
            self.summary,
            {stage: self.steps_of(stage) for stage in self.stages},
            remarks=self.remarks(),
        )
        if state.is_main_process:
            folder.begin(made_of)
            samples = self.samples("validation")
            found, reason = write_student(last.folder, self.output, samples, self.device)
            if found is None:
                result.remarks.append(f"The student is not calibrated: {reason}")
            else:
                result.calibration = asdict(found)
        state.wait_for_everyone()
        if self.part("test").is_file():
            teacher = Path(settings.teacher)
            name = teacher.resolve().name if teacher.is_dir() else settings.teacher
            measured = evaluate_student(
                self.output,
                self.part("test"),
                settings.images,
                f"{Path(settings.images).resolve().name}, with labels of {name} as truth",
                {
                    "output": self.work / "evaluation",
                    "device": settings.device,
                    "command": command_line(),
                },
                self.show if state.is_main_process else show_nothing,
            )
            result.measurements = [asdict(each) for each in measured]
        else:
            result.remarks.append(
                "The student is not evaluated: no picture held out for it has labels."
            )
        if state.is_main_process:
            write_json(path, result.as_dict())
            folder.finish(weights_checksum(self.output))
        state.wait_for_everyone()
        return FolderResult(**json.loads(path.read_text(encoding="utf-8")))

    @property
    def summary(self) -> dict[str, Any]:
        """Counts of the labels of each part."""
        return json.loads((self.work / "labels" / SUMMARY).read_text(encoding="utf-8"))
