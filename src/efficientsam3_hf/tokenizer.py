"""OpenAI CLIP's tokenizer, built from the merges that come with the package: no download.

Beside it, one of a few whole words, for models of a small world.
"""

import gzip
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

# What the ids of a tokenizer of words begin and end with. Text towers pad with id 0, and find the
# end of a phrase by its id, the highest.
FIRST_TOKENS = ("<|padding|>", "<|unknown|>")
LAST_TOKENS = ("<|startoftext|>", "<|endoftext|>")


def build_tokenizer(
    context_length: int, words: Sequence[str] | None = None
) -> CLIPTokenizer | PreTrainedTokenizerFast:
    """The tokenizer of a model.

    Args:
        context_length: Tokens a phrase is padded or cut to.
        words: All that it knows, as `EfficientSam3Config.words` has them; None for CLIP's.
    """
    if words is None:
        return build_clip_tokenizer(context_length)
    return build_word_tokenizer(context_length, words)


def build_word_tokenizer(context_length: int, words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; all others are the same unknown one.

    Args:
        context_length: Tokens a phrase is padded or cut to.
        words: In lower case, in the order of their ids.
    """
    tokens = [*FIRST_TOKENS, *words, *LAST_TOKENS]
    ids = {token: index for index, token in enumerate(tokens)}
    (_, unknown), (start, end) = FIRST_TOKENS, LAST_TOKENS
    tokenizer: Any = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, ids[start]), (end, ids[end])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context_length,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=unknown,
    )


def build_clip_tokenizer(context_length: int) -> CLIPTokenizer:
    """The tokenizer of SAM 3 and of MobileCLIP's text towers.

    It pads with the end token, as transformers' CLIP does: CLIP's pad id 0 is also the token "!",
    which must not become special. The processor and the text towers put 0 in its place.

    Args:
        context_length: Tokens a phrase is padded or cut to.
    """
    merges = [tuple(line.split()) for line in read_merges()]
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # pyright: ignore[reportArgumentType]  the stub forgets pairs, tokenizers wants them
        model_max_length=context_length,
    )


def read_merges() -> list[str]:
    """The 48,894 merges, most frequent first."""
    data = files("efficientsam3_hf") / "assets" / "clip_bpe_merges.txt.gz"
    return gzip.decompress(data.read_bytes()).decode("utf-8").splitlines()


def byte_letters() -> list[str]:
    """A printable letter for each byte, in the order in which CLIP numbers them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]
