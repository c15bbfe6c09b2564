"""How weights are called in Meta's and upstream's files, and how in ours: tables, no code.

Released keys go through them in this order; `renaming.py` is what reads them.

`SPELLINGS`  the key forms of all releases become one, that of Meta's `sam3.pt` without prefix;
`DROPS`      keys that our models have no use for, each with the reason;
`MODULES`    one name of Meta's becomes one of ours. The rows of a module match, as a whole, what
             lies between its prefix and a closing `.weight`, `.bias` or batch-norm statistic.

A target may hold one mark that says how the tensor changes; without one it stays as it is:

`{q,k,v}_proj`  cut into three equal parts along its first dimension, one for each letter;
`^T`            transposed;
`[3]`           row 3 of a joint table;
`[patches]`     without the position of the class token, which stands first.
"""

from typing import NamedTuple

Rows = tuple[tuple[str, str], ...]  # (pattern of the source, replacement)


class Drop(NamedTuple):
    """Names of no use: in files with a name that starts like `where`, all that match `names`.

    They are kept beside the weights for the way back, unless they are another model's left-overs.
    """

    where: str
    names: str
    reason: str
    is_kept_aside: bool = True


class Module(NamedTuple):
    """How the names below one prefix translate."""

    source: str
    target: str
    rows: Rows


SPELLINGS: Rows = (
    # complete releases say detector., trainer checkpoints do not
    (r"^detector\.", ""),
    # the image model as built from code holds the tracker inside its point-and-box predictor
    (r"^inst_interactive_predictor\.model\.", "tracker."),
    # files of December 2025
    (r"^(backbone\.vision_backbone\.trunk\.model\.)student_trunk\.", r"\1"),
    # an image trunk alone
    (r"^model\.(?=(backbone\.model|head)\.)", "backbone.vision_backbone.trunk.model."),
    # SAM 3.1, which has a neck for points and boxes beside one for video
    (r"^(backbone\.vision_backbone\.)interactive_convs\.", r"\1sam2_convs."),
    (r"^tracker\.model\.", "tracker."),
    # torch's fused attention projections, so that they end like every other weight
    (r"\.in_proj_(?=(weight|bias)$)", ".in_proj."),
)

DROPS = (
    Drop(
        where="backbone.vision_backbone.trunk.model.",
        names=r"backbone\.vision_backbone\.trunk\.(?!model\.).+",
        reason="left over from the teacher's ViT, which the student trunk replaces",
        is_kept_aside=False,
    ),
    Drop(
        where="backbone.vision_backbone.trunk.blocks.",
        names=r"backbone\.vision_backbone\.trunk\.blocks\.\d+\.attn\.freqs_cis",
        reason="rotary table, which the model computes from its configuration",
    ),
    Drop(
        where="backbone.vision_backbone.propagation_convs.",
        names=r"backbone\.vision_backbone\.propagation_convs\..+",
        reason="neck of SAM 3.1's multiplex video tracker, which has no counterpart here",
    ),
    Drop(
        where="tracker.interactiv",
        names=r"tracker\.(?!interactiv).+",
        reason="part of SAM 3.1's multiplex video tracker, which has no counterpart here",
    ),
)


def _mlp_rows(source: str, target: str, layers: tuple[str, ...]) -> Rows:
    """Rows of an MLP whose `layers.0`, `layers.1`, ... have names of their own in transformers."""
    return tuple(
        (rf"{source}\.layers\.{i}", rf"{target}.{layer}") for i, layer in enumerate(layers)
    )


TWO_LAYERS = ("layer1", "layer2")
THREE_LAYERS = ("layer1", "layer2", "layer3")
IN_AND_OUT = ("proj_in", "layers.0", "proj_out")

# a transformer layer of the geometry and DETR encoders: attention to itself, then to the other side
ENCODER_LAYER: Rows = (
    (r"(\d+)\.self_attn\.in_proj", r"\1.self_attn.{q,k,v}_proj"),
    (r"(\d+)\.self_attn\.out_proj", r"\1.self_attn.o_proj"),
    (r"(\d+)\.cross_attn_image\.in_proj", r"\1.cross_attn.{q,k,v}_proj"),
    (r"(\d+)\.cross_attn_image\.out_proj", r"\1.cross_attn.o_proj"),
    (r"(\d+)\.linear([12])", r"\1.mlp.fc\2"),
    (r"(\d+)\.norm([123])", r"\1.layer_norm\2"),
)


# SAM 3's own vision transformer
VIT: Rows = (
    (r"pos_embed", r"embeddings.position_embeddings[patches]"),
    (r"patch_embed\.proj", r"embeddings.patch_embeddings.projection"),
    (r"ln_pre", r"layer_norm"),
    (r"blocks\.(\d+)\.norm([12])", r"layers.\1.layer_norm\2"),
    (r"blocks\.(\d+)\.attn\.qkv", r"layers.\1.attention.{q,k,v}_proj"),
    (r"blocks\.(\d+)\.attn\.proj", r"layers.\1.attention.o_proj"),
    (r"blocks\.(\d+)\.mlp\.fc([12])", r"layers.\1.mlp.fc\2"),
)

# timm keeps the stem's residual blocks apart from its convolution
EFFICIENTVIT: Rows = (
    (r"input_stem\.op_list\.0\.(.+)", r"stem.in_conv.\1"),
    *((rf"input_stem\.op_list\.{i}\.(.+)", rf"stem.res{i - 1}.\1") for i in range(1, 4)),
    (r"stages\.(\d+)\.op_list\.(.+)", r"stages.\1.blocks.\2"),
)

# timm downsamples at the start of a stage, the reference at its end
TINYVIT: Rows = (
    (r"patch_embed\.seq\.0\.c", r"patch_embed.conv1.conv"),
    (r"patch_embed\.seq\.0\.bn", r"patch_embed.conv1.bn"),
    (r"patch_embed\.seq\.2\.c", r"patch_embed.conv2.conv"),
    (r"patch_embed\.seq\.2\.bn", r"patch_embed.conv2.bn"),
    *(
        (rf"layers\.{i}\.downsample\.(.+)\.c", rf"stages.{i + 1}.downsample.\1.conv")
        for i in range(3)
    ),
    *((rf"layers\.{i}\.downsample\.(.+)", rf"stages.{i + 1}.downsample.\1") for i in range(3)),
    (r"layers\.(\d+)\.blocks\.(.+)\.c", r"stages.\1.blocks.\2.conv"),
    (r"layers\.(\d+)\.blocks\.(.+)", r"stages.\1.blocks.\2"),
)

# after `_nest_repvit` has turned the flat list of blocks into stages
REPVIT: Rows = (
    (r"features\.0\.0\.(.+)", r"stem.conv1.\1"),
    (r"features\.0\.2\.(.+)", r"stem.conv2.\1"),
    (r"(stages\.\d\.downsample)\.token_mixer\.0\.(.+)", r"\1.spatial_downsample.\2"),
    (r"(stages\.\d\.downsample)\.token_mixer\.2\.(.+)", r"\1.channel_downsample.\2"),
    (r"(stages\.\d\.downsample)\.channel_mixer\.m\.0\.(.+)", r"\1.ffn.conv1.\2"),
    (r"(stages\.\d\.downsample)\.channel_mixer\.m\.2\.(.+)", r"\1.ffn.conv2.\2"),
    (r"(stages\..+)\.token_mixer\.0\.(.+)", r"\1.token_mixer.\2"),
    (r"(stages\..+)\.token_mixer\.1\.(.+)", r"\1.se.\2"),
    (r"(stages\..+)\.channel_mixer\.m\.0\.(.+)", r"\1.channel_mixer.conv1.\2"),
    (r"(stages\..+)\.channel_mixer\.m\.2\.(.+)", r"\1.channel_mixer.conv2.\2"),
)

# 1x1 convolution, batch norm and 3x3 convolution behind a student trunk
STUDENT_HEAD: Rows = ((r"([013])", r"\1"),)

NECK: Rows = (
    (r"(\d)\.dconv_2x2(_0)?", r"\1.scale_layers.0"),
    (r"(\d)\.dconv_2x2_1", r"\1.scale_layers.2"),  # the GELU between them is 1
    (r"(\d)\.conv_1x1", r"\1.proj1"),
    (r"(\d)\.conv_3x3", r"\1.proj2"),
)


# SAM 3's own, a CLIP text tower
CLIP_TEXT: Rows = (
    (r"encoder\.token_embedding", r"text_encoder.text_model.embeddings.token_embedding"),
    (
        r"encoder\.positional_embedding",
        r"text_encoder.text_model.embeddings.position_embedding.weight",
    ),
    (
        r"encoder\.transformer\.resblocks\.(\d+)\.attn\.in_proj",
        r"text_encoder.text_model.encoder.layers.\1.self_attn.{q,k,v}_proj",
    ),
    (
        r"encoder\.transformer\.resblocks\.(\d+)\.attn\.out_proj",
        r"text_encoder.text_model.encoder.layers.\1.self_attn.out_proj",
    ),
    (
        r"encoder\.transformer\.resblocks\.(\d+)\.ln_([12])",
        r"text_encoder.text_model.encoder.layers.\1.layer_norm\2",
    ),
    (
        r"encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_fc",
        r"text_encoder.text_model.encoder.layers.\1.mlp.fc1",
    ),
    (
        r"encoder\.transformer\.resblocks\.(\d+)\.mlp\.c_proj",
        r"text_encoder.text_model.encoder.layers.\1.mlp.fc2",
    ),
    (r"encoder\.ln_final", r"text_encoder.text_model.final_layer_norm"),
    (r"encoder\.text_projection", r"text_encoder.text_projection.weight^T"),
    (r"resizer", r"text_projection"),
)

# the position table keeps its rows, whether 16, 32 or 77: how it is read is the model's business
MOBILECLIP_TEXT: Rows = (
    (r"encoder\.embedding_layer", r"text_encoder.embeddings.token_embedding"),
    (
        r"encoder\.positional_embedding\.pos_embed\.pos_embed",
        r"text_encoder.embeddings.position_embedding.position_embedding",
    ),
    (
        r"encoder\.transformer\.(\d+)\.pre_norm_mha\.1\.qkv_proj",
        r"text_encoder.layers.\1.self_attn.{q,k,v}_proj",
    ),
    (
        r"encoder\.transformer\.(\d+)\.pre_norm_mha\.1\.out_proj",
        r"text_encoder.layers.\1.self_attn.out_proj",
    ),
    (r"encoder\.transformer\.(\d+)\.pre_norm_mha\.0", r"text_encoder.layers.\1.layer_norm1"),
    (r"encoder\.transformer\.(\d+)\.pre_norm_ffn\.0", r"text_encoder.layers.\1.layer_norm2"),
    (r"encoder\.transformer\.(\d+)\.pre_norm_ffn\.1", r"text_encoder.layers.\1.mlp.fc1"),
    (r"encoder\.transformer\.(\d+)\.pre_norm_ffn\.4", r"text_encoder.layers.\1.mlp.fc2"),
    (
        r"encoder\.transformer\.(\d+)\.token_mixer\.norm\.rbr_skip",
        r"text_encoder.layers.\1.token_mixer.reference_batchnorm",
    ),
    (
        r"encoder\.transformer\.(\d+)\.token_mixer\.mixer\.rbr_skip",
        r"text_encoder.layers.\1.token_mixer.mixer.batchnorm_skip",
    ),
    (
        r"encoder\.transformer\.(\d+)\.token_mixer\.mixer\.rbr_conv\.0\.conv",
        r"text_encoder.layers.\1.token_mixer.mixer.conv",
    ),
    (
        r"encoder\.transformer\.(\d+)\.token_mixer\.mixer\.rbr_conv\.0\.bn",
        r"text_encoder.layers.\1.token_mixer.mixer.batchnorm_conv",
    ),
    (
        r"encoder\.transformer\.(\d+)\.(token_mixer\.layer_scale|layer_scale)",
        r"text_encoder.layers.\1.\2",
    ),
    (
        r"encoder\.transformer\.(\d+)\.convffn\.conv\.conv",
        r"text_encoder.layers.\1.conv_feed_forward.depthwise_conv",
    ),
    (
        r"encoder\.transformer\.(\d+)\.convffn\.conv\.bn",
        r"text_encoder.layers.\1.conv_feed_forward.depthwise_batchnorm",
    ),
    (
        r"encoder\.transformer\.(\d+)\.convffn\.fc([12])",
        r"text_encoder.layers.\1.conv_feed_forward.mlp.fc\2",
    ),
    (r"encoder\.final_layer_norm", r"text_encoder.final_layer_norm"),
    (r"encoder\.projection_layer", r"text_encoder.projection.weight^T"),
    (r"projector", r"text_projection"),
)


# transformers leaves the points_* projections out, our model has them
GEOMETRY_ENCODER: Rows = (
    (r"(label_embed|cls_embed|final_proj)", r"\1"),
    (r"((points|boxes)_(direct|pool|pos_enc)_project)", r"\1"),
    (r"img_pre_norm", r"vision_layer_norm"),
    (r"norm", r"prompt_layer_norm"),
    (r"encode_norm", r"output_layer_norm"),
)

# norms are numbered in the order in which DETR wrote them, not in that of use
DETR_DECODER: Rows = (
    (r"layers\.(\d+)\.self_attn\.in_proj", r"layers.\1.self_attn.{q,k,v}_proj"),
    (r"layers\.(\d+)\.self_attn\.out_proj", r"layers.\1.self_attn.o_proj"),
    (r"layers\.(\d+)\.norm2", r"layers.\1.self_attn_layer_norm"),
    (r"layers\.(\d+)\.ca_text\.in_proj", r"layers.\1.text_cross_attn.{q,k,v}_proj"),
    (r"layers\.(\d+)\.ca_text\.out_proj", r"layers.\1.text_cross_attn.o_proj"),
    (r"layers\.(\d+)\.catext_norm", r"layers.\1.text_cross_attn_layer_norm"),
    (r"layers\.(\d+)\.cross_attn\.in_proj", r"layers.\1.vision_cross_attn.{q,k,v}_proj"),
    (r"layers\.(\d+)\.cross_attn\.out_proj", r"layers.\1.vision_cross_attn.o_proj"),
    (r"layers\.(\d+)\.norm1", r"layers.\1.vision_cross_attn_layer_norm"),
    (r"layers\.(\d+)\.linear([12])", r"layers.\1.mlp.fc\2"),
    (r"layers\.(\d+)\.norm3", r"layers.\1.mlp_layer_norm"),
    (r"norm", r"output_layer_norm"),
    (r"(query_embed|reference_points|presence_token)", r"\1"),
    (r"presence_token_out_norm", r"presence_layer_norm"),
    *_mlp_rows("bbox_embed", "box_head", THREE_LAYERS),
    *_mlp_rows("presence_token_head", "presence_head", THREE_LAYERS),
    *_mlp_rows("ref_point_head", "ref_point_head", TWO_LAYERS),
    *_mlp_rows("boxRPB_embed_x", "box_rpb_embed_x", TWO_LAYERS),
    *_mlp_rows("boxRPB_embed_y", "box_rpb_embed_y", TWO_LAYERS),
)

MASK_DECODER: Rows = (
    (r"(pixel_decoder\.(conv_layers|norms)\.\d)", r"\1"),
    (r"mask_predictor\.mask_embed\.layers\.(\d)", r"mask_embedder.layers.\1"),
    (r"cross_attend_prompt\.in_proj", r"prompt_cross_attn.{q,k,v}_proj"),
    (r"cross_attend_prompt\.out_proj", r"prompt_cross_attn.o_proj"),
    (r"cross_attn_norm", r"prompt_cross_attn_norm"),
    (r"semantic_seg_head", r"semantic_projection"),
    (r"instance_seg_head", r"instance_projection"),
)

SCORING: Rows = (
    *_mlp_rows("prompt_mlp", "text_mlp", TWO_LAYERS),
    (r"prompt_mlp\.out_norm", r"text_mlp_out_norm"),
    (r"prompt_proj", r"text_proj"),
    (r"hs_proj", r"query_proj"),
)


TRACKER: Rows = (
    (r"maskmem_tpos_enc", r"memory_temporal_positional_encoding"),
    (r"(?:no_mem_embed|interactivity_no_mem_embed)", r"no_memory_embedding"),
    (r"no_mem_pos_enc", r"no_memory_positional_encoding"),
    (r"no_obj_ptr", r"no_object_pointer"),
    (r"no_obj_embed_spatial", r"occlusion_spatial_embedding_parameter"),
    (r"(?:interactive_)?mask_downsample", r"mask_downsample"),
    (r"obj_ptr_tpos_proj", r"temporal_positional_encoding_projection_layer"),
    *_mlp_rows("(?:interactive_)?obj_ptr_proj", "object_pointer_proj", IN_AND_OUT),
)

MEMORY_ATTENTION: Rows = (
    (r"layers\.(\d)\.(self_attn|cross_attn_image)\.([qkv])_proj", r"layers.\1.\2.\3_proj"),
    (r"layers\.(\d)\.(self_attn|cross_attn_image)\.out_proj", r"layers.\1.\2.o_proj"),
    (r"layers\.(\d)\.linear([12])", r"layers.\1.linear\2"),
    (r"layers\.(\d)\.norm([123])", r"layers.\1.layer_norm\2"),
    (r"norm", r"layer_norm"),
)

# the mask downsampler is a flat list: four times convolution, norm, GELU, then a convolution
MEMORY_ENCODER: Rows = (
    *(
        (rf"mask_downsampler\.encoder\.{3 * i}", rf"mask_downsampler.layers.{i}.conv")
        for i in range(4)
    ),
    *(
        (rf"mask_downsampler\.encoder\.{3 * i + 1}", rf"mask_downsampler.layers.{i}.layer_norm")
        for i in range(4)
    ),
    (r"mask_downsampler\.encoder\.12", r"mask_downsampler.final_conv"),
    (r"pix_feat_proj", r"feature_projection"),
    (r"fuser\.layers\.(\d)\.gamma", r"memory_fuser.layers.\1.scale"),
    (r"fuser\.layers\.(\d)\.dwconv", r"memory_fuser.layers.\1.depthwise_conv"),
    (r"fuser\.layers\.(\d)\.norm", r"memory_fuser.layers.\1.layer_norm"),
    (r"fuser\.layers\.(\d)\.pwconv([12])", r"memory_fuser.layers.\1.pointwise_conv\2"),
    (r"out_proj", r"projection"),
)

PROMPT_ENCODER: Rows = (
    (r"pe_layer\.positional_encoding_gaussian_matrix", r"shared_embedding.positional_embedding"),
    (r"point_embeddings\.(\d)", r"point_embed[\1]"),
    (r"(not_a_point_embed|no_mask_embed)", r"\1"),
    (r"mask_downscaling\.0", r"mask_embed.conv1"),
    (r"mask_downscaling\.1", r"mask_embed.layer_norm1"),
    (r"mask_downscaling\.3", r"mask_embed.conv2"),
    (r"mask_downscaling\.4", r"mask_embed.layer_norm2"),
    (r"mask_downscaling\.6", r"mask_embed.conv3"),
)

INTERACTIVE_MASK_DECODER: Rows = (
    (r"(iou_token|mask_tokens|obj_score_token|conv_s0|conv_s1)", r"\1"),
    (r"transformer\.(.+_attn|.+_attn_.+)\.([qkv])_proj", r"transformer.\1.\2_proj"),
    (r"transformer\.(.+_attn|.+_attn_.+)\.out_proj", r"transformer.\1.o_proj"),
    (r"transformer\.layers\.(\d)\.norm([1234])", r"transformer.layers.\1.layer_norm\2"),
    (r"transformer\.layers\.(\d)\.mlp\.lin1", r"transformer.layers.\1.mlp.proj_in"),
    (r"transformer\.layers\.(\d)\.mlp\.lin2", r"transformer.layers.\1.mlp.proj_out"),
    (r"transformer\.norm_final_attn", r"transformer.layer_norm_final_attn"),
    (r"output_upscaling\.0", r"upscale_conv1"),
    (r"output_upscaling\.1", r"upscale_layer_norm"),
    (r"output_upscaling\.3", r"upscale_conv2"),
    *_mlp_rows(r"output_hypernetworks_mlps\.(\d)", r"output_hypernetworks_mlps.\1", IN_AND_OUT),
    *_mlp_rows("iou_prediction_head", "iou_prediction_head", IN_AND_OUT),
    *_mlp_rows("pred_obj_score_head", "pred_obj_score_head", IN_AND_OUT),
)

# transformers keeps this random table in two places
TWINS = {
    "tracker_model.prompt_encoder.shared_embedding.positional_embedding": (
        "tracker_model.shared_image_embedding.positional_embedding"
    ),
}


VISION = "backbone.vision_backbone."
OUR_BACKBONE = "detector_model.vision_encoder.backbone."

MODULES = (
    Module(f"{VISION}trunk.model.backbone.model.", f"{OUR_BACKBONE}trunk.", EFFICIENTVIT),
    Module(f"{VISION}trunk.model.backbone.model.", f"{OUR_BACKBONE}trunk.", TINYVIT),
    Module(f"{VISION}trunk.model.backbone.model.", f"{OUR_BACKBONE}trunk.", REPVIT),
    Module(f"{VISION}trunk.model.head.", f"{OUR_BACKBONE}head.", STUDENT_HEAD),
    Module(f"{VISION}trunk.", OUR_BACKBONE, VIT),
    Module(f"{VISION}convs.", "detector_model.vision_encoder.neck.fpn_layers.", NECK),
    Module(f"{VISION}sam2_convs.", "tracker_neck.fpn_layers.", NECK),
    Module("backbone.language_backbone.", "detector_model.", CLIP_TEXT),
    Module("backbone.language_backbone.", "detector_model.", MOBILECLIP_TEXT),
    Module("geometry_encoder.encode.", "detector_model.geometry_encoder.layers.", ENCODER_LAYER),
    Module("geometry_encoder.", "detector_model.geometry_encoder.", GEOMETRY_ENCODER),
    Module("transformer.encoder.layers.", "detector_model.detr_encoder.layers.", ENCODER_LAYER),
    Module("transformer.decoder.", "detector_model.detr_decoder.", DETR_DECODER),
    Module("segmentation_head.", "detector_model.mask_decoder.", MASK_DECODER),
    Module("dot_prod_scoring.", "detector_model.dot_product_scoring.", SCORING),
    Module("tracker.transformer.encoder.", "tracker_model.memory_attention.", MEMORY_ATTENTION),
    Module("tracker.maskmem_backbone.", "tracker_model.memory_encoder.", MEMORY_ENCODER),
    Module("tracker.sam_prompt_encoder.", "tracker_model.prompt_encoder.", PROMPT_ENCODER),
    Module("tracker.sam_mask_decoder.", "tracker_model.mask_decoder.", INTERACTIVE_MASK_DECODER),
    Module("tracker.", "tracker_model.", TRACKER),
    # SAM 3.1 keeps the modules for points and boxes apart, under names of their own
    Module(
        "tracker.interactive_sam_prompt_encoder.", "tracker_model.prompt_encoder.", PROMPT_ENCODER
    ),
    Module(
        "tracker.interactive_sam_mask_decoder.",
        "tracker_model.mask_decoder.",
        INTERACTIVE_MASK_DECODER,
    ),
)
