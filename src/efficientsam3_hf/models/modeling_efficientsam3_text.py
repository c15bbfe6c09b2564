"""MobileCLIP text towers: transformers' modules, with the reference's treatment of padding."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import AutoModel
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import (
    Sam3LiteTextLayerScaledResidual,
    Sam3LiteTextRepMixerBlock,
    Sam3LiteTextTextAttention,
    Sam3LiteTextTextModel,
)
from transformers.utils.output_capturing import capture_outputs

from .checkpoint_layout import PartLoadingMixin
from .configuration_efficientsam3 import EfficientSam3TextConfig


class EfficientSam3TextModel(PartLoadingMixin, Sam3LiteTextTextModel):
    """Token ids to token features.

    Where padding is attended to, as in the released weights, a phrase is padded to the context
    length here, whatever its tokenizer did: features do not depend on how ids arrive.
    """

    config: EfficientSam3TextConfig
    config_class = EfficientSam3TextConfig
    main_input_name = "input_ids"
    input_modalities = ["text"]
    _can_record_outputs = {"attentions": Sam3LiteTextTextAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Sam3LiteTextLayerScaledResidual):  # transformers forgets it
            init.constant_(module.layer_scale, self.config.layer_scale_init_value)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.token_embedding = value

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling | tuple:
        length = input_ids.shape[1]
        self.check_length(length)
        if self.config.attend_to_padding:
            if attention_mask is not None:
                input_ids = input_ids.masked_fill(attention_mask == 0, self.config.pad_token_id)
            padding = self.config.context_length - length
            input_ids = F.pad(input_ids, (0, padding), value=self.config.pad_token_id)
            attention_mask = None

        embeddings = self.embeddings.token_embedding(input_ids)
        hidden_states = embeddings + self.position_rows(input_ids.shape[1]).to(embeddings.dtype)
        all_hidden_states = [hidden_states]
        attention_bias = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        for layer in self.layers:
            if isinstance(layer, Sam3LiteTextRepMixerBlock):
                hidden_states = mix_tokens(layer, hidden_states, attention_mask)
            else:
                hidden_states = layer(hidden_states, attention_mask=attention_bias, **kwargs)
            all_hidden_states.append(hidden_states)
        hidden_states = self.final_layer_norm(hidden_states)

        # The end token has the highest id of the vocabulary; padding after it does not.
        ends = input_ids.argmax(dim=-1)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states[:, :length],
            pooler_output=self.projection(hidden_states[rows, ends]),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )

    def check_length(self, length: int) -> None:
        """Raise if a phrase is longer than the context."""
        if length > self.config.context_length:
            raise ValueError(
                f"{length} tokens do not fit the context of {self.config.context_length}. The "
                "processor truncates phrases; call it instead of the bare tokenizer, or tokenize "
                f"with truncation=True, max_length={self.config.context_length}."
            )

    def position_rows(self, length: int) -> Tensor:
        """The first rows of the position table (1, length, channels), fitted to the context."""
        return self.embeddings.position_embedding(self.config.context_length)[:, :length]


def mix_tokens(
    block: Sam3LiteTextRepMixerBlock, hidden_states: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """A RepMixer block whose convolutions read zeros, not features, where the mask is 0."""
    if attention_mask is None:
        return block(hidden_states)
    valid = attention_mask[:, None, None, :].to(hidden_states.dtype)  # (batch, 1, 1, length)
    hidden_states = hidden_states.transpose(1, 2).unsqueeze(2) * valid
    hidden_states = block.token_mixer(hidden_states) * valid
    hidden_states = block.layer_scale_residual(
        hidden_states, block.conv_feed_forward(hidden_states)
    )
    return hidden_states.squeeze(2).transpose(1, 2)


AutoModel.register(EfficientSam3TextConfig, EfficientSam3TextModel, exist_ok=True)
