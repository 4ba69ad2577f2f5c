"""What sampling options do to the distribution that tokens are drawn from.

The names are those of transformers' GenerationConfig, of vLLM's SamplingParams and of the requests
to its server. A test goes through all that the installed versions have, so that each new one is
looked at; until then it counts as RESHAPING, which is safe.
"""

from __future__ import annotations

from typing import Any

# option -> the values that switch it off (as None does). These only take tokens away or force one,
# so that what is drawn is likelier than in the whole distribution, ...
CUTTING: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words": ([],),
    "bad_words_ids": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "allowed_token_ids": (),
    "structured_outputs": (),
    "response_format": (),
    "thinking_token_budget": (-1,),
    "do_sample": (True,),
}
# ... and these change logits or what they are computed from, or choose among whole completions, so
# that a log-prob may be off in either direction.
RESHAPING: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "logit_bias": ({},),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "watermarking": (False,),
    "dola_layers": (),
    "penalty_alpha": (0.0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "constraints": (),
    "force_words_ids": (),
    "use_beam_search": (False,),
    "assistant_ensemble_weight": (),
    "token_healing": (False,),
    "suffix": (),
    "truncate_prompt_tokens": (),
    "extra_args": ({},),  # of a server's own logits processors
    "vllm_xargs": ({},),
}
# These leave it as it is: what the trainer's log-probs know of as well, when a completion ends,
# what a search among beams does beside sampling, speculation that is exact, caches, outputs, ids.
NEUTRAL = {
    "temperature",  # the trainer's logits are divided by it too
    "max_new_tokens", "max_tokens", "max_length", "max_time", "eos_token_id", "ignore_eos",
    "stop_token_ids", "stop_strings", "stop", "include_stop_str_in_output",
    "include_stop_strings", "repetition_detection",
    "bos_token_id", "pad_token_id", "decoder_start_token_id",  # prompts are never empty
    "renormalize_logits",  # a softmax comes next
    "remove_invalid_values",  # logits that are not finite end the run in the trainer
    "length_penalty", "early_stopping", "low_memory",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size", "use_mtp",
    "speculation_type",
    "cache_implementation", "cache_config", "max_cache_len", "use_cache", "prefill_chunk_size",
    "compile_config", "disable_compile", "continuous_batching_config",
    "skip_reading_prefix_cache", "cache_salt", "kv_transfer_params", "ec_transfer_params",
    "num_return_sequences", "n", "seed", "transformers_version",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits",
    "logprobs", "prompt_logprobs", "prompt_logprob_start", "prompt_logprob_token_ids",
    "logprob_token_ids", "flat_logprobs", "detokenize", "skip_special_tokens",
    "spaces_between_special_tokens", "output_kind", "stream_interval", "skip_clone",
    "output_text_buffer_length", "routed_experts_prompt_start", "trace_decode_token_ids",
    "return_token_ids", "return_tokens_as_token_ids", "return_token_offsets", "return_prompt_text",
    "return_mm_kwargs", "mm_payload", "priority",
    "request_id", "session_id", "user", "stream", "stream_options", "echo", "model", "prompt",
    "prompt_embeds", "add_special_tokens", "truncation_side",
}  # fmt: skip


def in_use(fields: dict[str, Any], extra: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what cuts, what reshapes) among the settings that are switched on; `extra` wins.

    A name of `extra` that no table has counts as reshaping.
    """
    given = {**fields, **extra}
    unknown = dict.fromkeys(extra.keys() - CUTTING.keys() - RESHAPING.keys() - NEUTRAL, ())
    return _on(CUTTING, given), _on({**RESHAPING, **unknown}, given)


def _on(table: dict[str, tuple[Any, ...]], settings: dict[str, Any]) -> dict[str, Any]:
    values = {name: settings.get(name) for name in table}
    return {name: value for name, value in values.items() if value not in (None, *table[name])}
