"""MobileCLIP towers: padding, contexts, precision."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import TINY_TEXT, stir
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam3LiteTextTextConfig, Sam3LiteTextTextModel

from efficientsam3_hf import EfficientSam3TextConfig, EfficientSam3TextModel


def text_model(**fields) -> EfficientSam3TextModel:
    torch.manual_seed(0)
    return stir(EfficientSam3TextModel(EfficientSam3TextConfig(**{**TINY_TEXT, **fields})))


def ids_and_mask(length: int = 16) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[49406, 320, 1615, 49407], [49406, 2533, 49407, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return F.pad(ids, (0, length - 4)), F.pad(mask, (0, length - 4))


@pytest.mark.parametrize("use_repmixer_blocks", [True, False])
@torch.no_grad()
def test_tower_equals_that_of_transformers_without_a_mask(use_repmixer_blocks: bool):
    ours = text_model(use_repmixer_blocks=use_repmixer_blocks)
    fields = {**TINY_TEXT, "use_repmixer_blocks": use_repmixer_blocks}
    stock = Sam3LiteTextTextModel(Sam3LiteTextTextConfig(**fields)).eval()
    stock.load_state_dict(ours.state_dict())
    ids, mask = ids_and_mask()

    output = ours(ids, attention_mask=mask)

    expected = stock(ids)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(output.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("use_repmixer_blocks", [True, False])
@torch.no_grad()
def test_released_towers_do_not_care_how_their_tokenizer_pads(use_repmixer_blocks: bool):
    model = text_model(use_repmixer_blocks=use_repmixer_blocks)
    ids, mask = ids_and_mask()
    expected = model(ids, attention_mask=mask).last_hidden_state

    with_end_tokens = model(ids.masked_fill(mask == 0, 49407), attention_mask=mask)
    short = model(ids[:, :4], attention_mask=mask[:, :4])

    torch.testing.assert_close(with_end_tokens.last_hidden_state, expected)
    torch.testing.assert_close(short.last_hidden_state, expected[:, :4])


@pytest.mark.parametrize("use_repmixer_blocks", [True, False])
@torch.no_grad()
def test_padding_is_felt_only_where_the_configuration_says_so(use_repmixer_blocks: bool):
    ids, mask = ids_and_mask()
    alone = ids[1:, :3]

    blind = text_model(use_repmixer_blocks=use_repmixer_blocks, attend_to_padding=False)
    feeling = text_model(use_repmixer_blocks=use_repmixer_blocks, attend_to_padding=True)

    padded = blind(ids, attention_mask=mask).last_hidden_state[1, :3]
    torch.testing.assert_close(padded, blind(alone).last_hidden_state[0], atol=1e-5, rtol=1e-4)
    other_padding = ids.masked_fill(mask == 0, 77)
    seen = feeling(other_padding).last_hidden_state - feeling(ids).last_hidden_state
    assert seen[1, :3].abs().max() > 1e-3


@torch.no_grad()
def test_a_long_position_table_is_interpolated_to_the_context():
    model = text_model(max_position_embeddings=77, context_length=32)
    table = model.embeddings.position_embedding.position_embedding

    rows = model.position_rows(5)

    expected = F.interpolate(table, (32, 32), mode="bilinear", align_corners=False)[0, :, :5]
    torch.testing.assert_close(rows, expected)
    assert not torch.allclose(rows, table[0, :, :5])  # truncation would give other features


def test_a_phrase_that_does_not_fit_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"17 tokens do not fit the context of 16.*truncat"):
        text_model()(torch.zeros(1, 17, dtype=torch.long))


def test_a_context_beyond_the_table_is_an_error():
    with pytest.raises(StrictDataclassError, match=r"context_length=32 needs a position table"):
        EfficientSam3TextConfig(max_position_embeddings=16, context_length=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near_full_precision(dtype: torch.dtype):
    model, (ids, mask) = text_model(), ids_and_mask()
    expected = model(ids, attention_mask=mask).last_hidden_state

    output = model.to(dtype)(ids, attention_mask=mask).last_hidden_state

    assert output.dtype == dtype
    assert (output.float() - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_hidden_states_are_returned_on_request():
    output = text_model()(ids_and_mask()[0], output_hidden_states=True)

    assert len(output.hidden_states) == TINY_TEXT["num_hidden_layers"] + 1
