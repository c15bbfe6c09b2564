"""OpenAI CLIP's tokenizer, built from the merges that come with the package: no download."""

import gzip
from importlib.resources import files

from transformers import CLIPTokenizer


def build_tokenizer(context_length: int) -> CLIPTokenizer:
    """The tokenizer of all text towers.

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
