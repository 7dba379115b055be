"""Which fields of a config.json would make it another model than ours, and which mean nothing?

Names that other models give to mathematics of their own are refused unless they hold the value
that changes nothing.  A name nobody has heard of may be anything, and is told to people.
"""

from __future__ import annotations

import re
from typing import Any

from llm_serving.prepare.json_file import Fields

__all__ = ["refuse_other_mathematics", "unknown_fields"]

# field -> the values that change nothing; null and leaving it out always do
_OFF = (False, 0)
_INERT: dict[str, tuple[Any, ...]] = {
    "quantization_config": (),
    "auto_map": ({},),
    "is_encoder_decoder": (False,),
    "pretraining_tp": (0, 1),
    # experts
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "n_shared_experts": (0,),
    "moe_intermediate_size": (0,),
    # activation
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    # attention
    "use_sliding_window": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),  # in place of 1 / sqrt(head_dim)
    "query_pre_attn_scalar": (),
    "attn_scale": (),
    "attn_temperature_tuning": _OFF,
    "attn_output_gate": _OFF,
    "clip_qkv": (),
    "qkv_clip": (),
    "alibi": _OFF,
    "use_alibi": _OFF,
    # positions
    "use_mrope": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "rope_local_base_freq": (),
    "rope_interleave": _OFF,
    "rope_interleaved": _OFF,
    "rotary_pct": (1,),
    # norms and residuals
    "parallel_attn": _OFF,
    "parallel_residual": _OFF,
    "use_parallel_residual": _OFF,
    "post_norm": _OFF,
    "use_post_norm": _OFF,
    "sandwich_norm": _OFF,
    "use_sandwich_norm": _OFF,
    # scales
    "dim_model_base": (),  # the logits of MiniCPM
    "embedding_scale": (1,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "residual_scale": (1,),
    "scale_depth": (),  # over the root of the number of layers
    "scale_emb": (1,),
}
_INERT_PATTERNS: dict[str, tuple[Any, ...]] = {
    r"\w*soft_?cap(ping)?": _OFF,
    r"\w+_multiplier": (1,),
}
_QK_NORM = ("use_qk_norm", "qk_norm", "qk_layernorm", "qk_layernorms")

# The attributes of the four configurations in transformers 4 and 5: what is read here or sizes
# tensors, what concerns training and the library, what is a setting of generation
_READ = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim
    num_key_value_heads max_position_embeddings rms_norm_eps rope_theta rope_scaling
    rope_parameters partial_rotary_factor original_max_position_embeddings tie_word_embeddings
    attention_bias ffn_dim_multiplier multiple_of mlp_bias layer_types sliding_window
    max_window_layers architectures model_type dtype torch_dtype bos_token_id eos_token_id
"""
_LIBRARY = """
    attention_dropout hidden_dropout initializer_range use_cache output_attentions return_dict
    output_hidden_states chunk_size_feed_forward gradient_checkpointing pruned_heads torchscript
    use_bfloat16 tf_legacy_loss add_cross_attention cross_attention_hidden_size is_decoder
    tie_encoder_decoder id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix pad_token_id sep_token_id decoder_start_token_id
    name_or_path _name_or_path _commit_hash transformers_version attn_implementation
    _attn_implementation _attn_implementation_internal _attn_implementation_autoset
    _flash_attn_2_enabled unsloth_fixed unsloth_version
"""
_GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
_HARMLESS = frozenset(f"{_READ} {_LIBRARY} {_GENERATION}".split())


def refuse_other_mathematics(config: Fields, *, qk_norm: bool) -> None:
    """ConfigError, naming the field, unless all that is known to change results is switched off.

    qk_norm: has the architecture norms of queries and keys anyway?
    """
    for name, value in config.values.items():
        inert = _inert_values(name, qk_norm)
        if inert is not None and value is not None and value not in inert:
            raise config.unsupported(name, " or ".join(map(repr, inert)) or "leaving it out")


def unknown_fields(config: Fields) -> list[str]:
    """The names of which nothing is known, in the order of the file."""
    return [
        name
        for name in config.values
        if name not in _HARMLESS and _inert_values(name, qk_norm=False) is None
    ]


def _inert_values(name: str, qk_norm: bool) -> tuple[Any, ...] | None:
    if name in _HARMLESS:
        return None
    if name in _QK_NORM:
        return (qk_norm,)
    if name in _INERT:
        return _INERT[name]
    matching = (each for each in _INERT_PATTERNS if re.fullmatch(each, name))
    return _INERT_PATTERNS.get(next(matching, ""))
