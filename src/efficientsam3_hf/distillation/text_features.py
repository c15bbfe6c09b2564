"""The teacher's features of phrases, computed once and kept in memory."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .teacher import Teacher, TeacherModels


class TeacherTextFeatures:
    """Token features of a list of phrases, each phrase once, without padding.

    A million phrases of six tokens each take 3 GB in half precision.

    Args:
        places: Phrase -> (first row, number of tokens).
        tokens: (tokens of all phrases, channels).
    """

    def __init__(self, places: dict[str, tuple[int, int]], tokens: Tensor):
        self.places, self.tokens = places, tokens

    @classmethod
    def compute(
        cls,
        teacher: Teacher,
        tokenizer: Callable[..., Any],
        phrases: Iterable[str],
        batch_size: int = 256,
        dtype: torch.dtype | None = None,
        show_progress: bool = False,
    ) -> "TeacherTextFeatures":
        """Run the teacher's text tower on each phrase once.

        Args:
            teacher: One with a concept model.
            tokenizer: Of the teacher, or its processor.
            phrases: Any number of them, any of them any number of times.
            batch_size: Phrases that go through the tower at a time.
            dtype: To keep them in; None for the teacher's.
            show_progress: Whether to show a bar.
        """
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        unique = list(dict.fromkeys(phrases))
        places: dict[str, tuple[int, int]] = {}
        rows: list[Tensor] = []
        count = 0
        starts = range(0, len(unique), batch_size)
        for start in tqdm(starts, "teacher's phrases", disable=not show_progress):
            some = unique[start : start + batch_size]
            encoded = tokenizer(some, padding="longest", truncation=True, return_tensors="pt")
            mask = encoded["attention_mask"].bool()
            tokens = teacher(
                encode_phrases,
                encoded["input_ids"].to(teacher.device),
                encoded["attention_mask"].to(teacher.device),
            ).cpu()
            rows.append(tokens[mask].to(dtype or teacher.dtype))
            for phrase, length in zip(some, mask.sum(dim=1).tolist(), strict=True):
                places[phrase] = (count, length)
                count += length
        if not rows:
            raise ValueError("There are no phrases to compute features of.")
        return cls(places, torch.cat(rows))

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, phrase: str) -> bool:
        return phrase in self.places

    def __call__(
        self, phrases: Sequence[str], device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (phrases, tokens, channels), 0 where `valid` (phrases, tokens) is false."""
        unknown = [phrase for phrase in phrases if phrase not in self.places]
        if unknown:
            raise KeyError(
                f"{len(unknown)} of {len(phrases)} phrases, e.g. {unknown[0]!r}, are not among the "
                f"{len(self)} whose features were computed. Add them to that list."
            )
        spans = [self.places[phrase] for phrase in phrases]
        features = torch.nn.utils.rnn.pad_sequence(
            [self.tokens[start : start + length] for start, length in spans], batch_first=True
        )
        lengths = torch.tensor([length for _, length in spans])
        valid = torch.arange(features.shape[1]) < lengths[:, None]
        return features.to(device), valid.to(device)


def encode_phrases(models: TeacherModels, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Token features (phrases, tokens, channels) in the width of the detector."""
    if models.detector is None:
        raise ValueError("A tracker knows no phrases: load a teacher with its concept model.")
    outputs: Any = models.detector.get_text_features(input_ids, attention_mask, return_dict=True)
    return outputs.pooler_output
