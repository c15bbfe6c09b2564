"""What the teacher says of phrases, computed once and kept in memory.

Nothing of it goes to disk: half a million phrases of eight tokens in 256 channels are 2 GB.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .in_batches import in_batches

# Token ids and attention mask (phrases, length) to features (phrases, length, channels).
Teach = Callable[[Tensor, Tensor], Tensor]
# Phrases to `input_ids`, `attention_mask` and `keys`, as `PhraseCollator.encode`.
Encode = Callable[[list[str]], Mapping[str, Any]]


class TextTargets:
    """Token features of phrases, without padding, each phrase once.

    They are computed in the order in which phrases come, so that every process and every run has
    the same.

    Args:
        teach: The teacher.
        encode: The collator's.
        phrases: All there will be; those with equal tokens count as one.
        batch_size: Phrases that the teacher is given at once.
        dtype: To keep features in.
    """

    def __init__(
        self,
        teach: Teach,
        encode: Encode,
        phrases: Iterable[str],
        batch_size: int = 256,
        dtype: torch.dtype = torch.float16,
    ):
        self.rows: dict[bytes, int] = {}
        values, lengths = [], []
        for batch in self.new_phrases(encode, phrases, batch_size):
            mask = batch["attention_mask"]
            features = teach(batch["input_ids"], mask).to(dtype).cpu()
            values.append(features[mask.bool()])
            lengths.append(mask.sum(dim=1))
        if not values:
            raise ValueError("There are no phrases for the teacher to say something of.")
        self.values = torch.cat(values)  # (tokens of all phrases, channels)
        self.lengths = torch.cat(lengths)
        self.starts = self.lengths.cumsum(dim=0) - self.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def new_phrases(
        self, encode: Encode, phrases: Iterable[str], batch_size: int
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of ids and masks of phrases that have not come before."""
        for chunk in in_batches(phrases, batch_size):
            batch = encode(chunk)
            new = []
            for index, key in enumerate(batch["keys"]):
                if key not in self.rows:
                    self.rows[key] = len(self.rows)
                    new.append(index)
            if new:
                yield {name: batch[name][new] for name in ("input_ids", "attention_mask")}

    def __call__(self, keys: Sequence[bytes], length: int) -> Tensor:
        """Features (phrases, length, channels) of phrases by their keys, zero where padded."""
        rows = torch.tensor([self.rows[key] for key in keys])
        places = torch.arange(length)
        inside = places < self.lengths[rows, None]
        index = (self.starts[rows, None] + places).where(inside, 0)
        return self.values[index] * inside[..., None]
