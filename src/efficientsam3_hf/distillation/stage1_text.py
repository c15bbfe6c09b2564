"""Stage 1, text: a small tower learns to read phrases as the teacher does."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from ..evaluation.features import score_tokens, summarize
from ..evaluation.units import stack
from .arguments import DistillationArguments
from .family import Family
from .feature_losses import channel_variance, mean_token, order_error, token_angle, token_error
from .pictures import draw_similarities, samples_of
from .text_targets import TextTargets
from .trainer import DistillationTrainer


@dataclass
class TextDistillationArguments(DistillationArguments):
    """Arguments of stage 1 for text.

    Args:
        keep_targets: Ask the teacher of every phrase once, before the training, and keep what it
            says in memory. Not possible for a stream, whose phrases are asked for as they come.
        phrases_for_scale: Phrases at the beginning of the dataset by which it is measured how much
            the teacher's channels vary.
    """

    keep_targets: bool = field(
        default=True,
        metadata={"help": "Ask the teacher of each phrase once, and keep its answers in memory."},
    )
    phrases_for_scale: int = field(
        default=4096,
        metadata={"help": "Phrases by which it is measured how much the teacher's channels vary."},
    )

    learning_rate: float = 1.25e-3


class TextDistillationTrainer(DistillationTrainer):
    """Trains the text tower on the distance of its tokens to the teacher's.

    Student and teacher read the same token ids, cut to the shorter of their contexts, start and end
    token included.
    """

    stage = "stage 1: text"
    trained_parts = ("text",)
    units = {"token_error": "tokens", "token_angle": "tokens", "order_error": "phrases"}
    weights = {"token_error": 1.0, "token_angle": 1.0, "order_error": 0.1}
    drawn = 16

    args: TextDistillationArguments

    def __init__(self, model: Family, args: TextDistillationArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        collator: Any = self.data_collator
        first = islice(phrases_of(self.train_dataset), args.phrases_for_scale)
        sample = TextTargets(self.teach, collator.encode, first, dtype=torch.float32)
        self.variance = channel_variance(sample.values).to(args.device)
        self.targets: TextTargets | None = None
        datasets = [each for each in (self.train_dataset, self.eval_dataset) if each is not None]
        if args.keep_targets and not any(isinstance(each, IterableDataset) for each in datasets):
            phrases = chain.from_iterable(phrases_of(each) for each in datasets)
            self.targets = TextTargets(self.teach, collator.encode, phrases)

    def count(self, inputs: Mapping[str, Any]) -> dict[str, int | Tensor]:
        """Phrases, and their valid tokens."""
        mask = inputs["attention_mask"]
        return {"phrases": len(mask), "tokens": mask.sum()}

    @torch.no_grad()
    def teach(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The teacher's token features, in the width of the detector."""
        device = self.args.device
        return self.teacher(read, input_ids.to(device), attention_mask.to(device))

    def teacher_step(self, inputs: Mapping[str, Any]) -> Tensor:
        """The teacher's token features, out of memory if they are kept."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if self.targets is None:
            return self.teach(ids, mask)
        return self.targets(inputs["keys"], ids.shape[1]).to(ids.device)

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: Tensor
    ) -> dict[str, Tensor]:
        """Distances of tokens to the teacher's, and of phrases to themselves in another order."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        valid = mask.bool()
        if not self.shuffles:
            tokens = read(student, ids, mask)
        else:
            both = read(student, torch.cat([ids, inputs["shuffled_ids"]]), torch.cat([mask, mask]))
            tokens, shuffled = both.chunk(2)
        terms = {
            "token_error": token_error(tokens, targets, self.variance, valid),
            "token_angle": token_angle(tokens, targets, valid),
        }
        if self.shuffles:
            terms["order_error"] = order_error(tokens, shuffled, self.variance, valid)
        return terms

    @property
    def shuffles(self) -> bool:
        """Whether phrases are read in another order, too."""
        return self.factors["order_error"] != 0

    def score(
        self, student: Family, inputs: Mapping[str, Any], targets: Tensor
    ) -> list[dict[str, float]]:
        """Agreement of each phrase."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        triples = zip(read(student, ids, mask), targets, mask, strict=True)
        return [score_tokens(own, theirs, valid) for own, theirs, valid in triples]

    def summarize(self, records: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Cosine, squared and relative error of tokens."""
        return summarize(stack(records))

    def draw(self, student: Family, batch: Mapping[str, Any]) -> dict[str, Image.Image]:
        """How alike phrases are to the teacher, and to the student."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        theirs, own = self.teacher(read, ids, mask), read(student, ids, mask)
        return {"similarities": draw_similarities(mean_token(theirs, mask), mean_token(own, mask))}


def read(family: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Token features (phrases, length, channels) of a student or a teacher."""
    return family.detector.get_text_features(
        input_ids, attention_mask, return_dict=True
    ).pooler_output


def phrases_of(dataset: Any) -> Iterator[str]:
    """The texts of a dataset, in its order."""
    return (sample.text for sample in samples_of(dataset) if sample is not None)
