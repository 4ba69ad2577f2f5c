"""RLOOConfig beside TRL 1.16's: same fields, same defaults, and no field accepted and ignored.

Every field stands in exactly one table: REFUSED (the sentence that other values are answered with),
the functions `test_effect_of_<field>` of test_effects.py, ELSEWHERE (another test that shows
its effect), TRANSFORMERS (carried out by code of transformers' Trainer that we run) or ALWAYS_SO.
The names of the 2024 trainer have a file of their own, tests/parity/test_trl_2024.py.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from accelerate import ParallelismConfig
from packaging.version import Version

from rloo_fast import RLOOConfig
from rloo_fast.config.names_2024 import Names2024
from tests.config import test_effects

TRL_FIELDS = {f.name: f for f in dataclasses.fields(trl.RLOOConfig)}
OUR_FIELDS = {f.name: f for f in dataclasses.fields(RLOOConfig) if f.init}
OTHER_DEFAULTS = {  # field: why its default is not TRL's
    "disable_dropout": "dropout is noise in the KL and the ratio; the 2024 trainer had it off",
}


# --- the same fields and arguments


def default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@pytest.mark.parametrize("name", TRL_FIELDS)
def test_a_field_of_trl_is_here_with_its_default(name):
    same = default_of(OUR_FIELDS[name]) == default_of(TRL_FIELDS[name])
    assert same == (name not in OTHER_DEFAULTS)


def test_bf16_is_on_by_default_only_where_a_gpu_supports_it(tmp_path):
    supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    assert RLOOConfig(str(tmp_path)).bf16 == supported


# --- no field is ignored

REFUSED: dict[str, tuple[Any, str]] = {  # field: (a value, the sentence it is answered with)
    "accelerator_config": ({"split_batches": True}, "split_batches=True has no effect"),
    "auto_find_batch_size": (True, "halved by itself where memory runs out"),
    "average_tokens_across_devices": (False, "mean over the completions of all processes"),
    "batch_eval_metrics": (True, "keeps rewards only, no predictions"),
    "data_seed": (3, "shuffled by seed: set that"),
    "dataloader_drop_last": (True, "evaluation takes every prompt"),
    "dataloader_in_order": (False, "leave it True"),
    "dataloader_multiprocessing_context": ("spawn", "leave it out"),
    "dataloader_persistent_workers": (True, "leave it out"),
    "dataloader_prefetch_factor": (2, "leave it out"),
    "deepspeed": ({"zero_optimization": {"stage": 0}}, "stage 1, 2 or 3, got 0"),
    "ds3_gather_for_generation": (False, "use_vllm=True samples without"),
    "enable_jit_checkpoint": (True, "SIGTERM always saves a checkpoint"),
    "eval_accumulation_steps": (2, "keeps rewards only, no predictions"),
    "eval_do_concat_batches": (False, "keeps no predictions"),
    "eval_use_gather_object": (True, "keeps rewards only, no predictions"),
    "fsdp_config": ({"activation_checkpointing": True}, "no effect without fsdp=True"),
    "include_for_metrics": (["loss"], "keeps no predictions"),
    "include_num_input_tokens_seen": (True, "always counted, in the metric num_tokens"),
    "label_names": (["labels"], "RLOO has no labels"),
    "label_smoothing_factor": (0.1, "RLOO has no labels"),
    "length_column_name": ("tokens", "not grouped by length"),
    "neftune_noise_alpha": (5.0, "log-probs differ from the sampled"),
    "optim": ("lomo", "inside the backward pass"),
    "parallelism_config": (
        ParallelismConfig(tp_size=2),
        "does not support sequence-dim parallelism",
    ),
    "torch_empty_cache_steps": (5, "it is not in this version"),
    "train_sampling_strategy": ("group_by_length", "see shuffle_dataset"),
    "transformers_continuous_batching_config": ({"max_memory_percent": 0.5}, "has no effect here"),
    "use_cache": (True, "generation always does"),
    "use_transformers_continuous_batching": (True, "Set use_vllm=True"),
    "use_transformers_paged": (True, "Set use_vllm=True"),
    "vllm_group_port": (1, "has no effect here"),
}
ELSEWHERE = {  # field: the test that shows its effect
    "log_multimodal": "end_to_end/test_image_runs.py::test_trackers_get_the_images_of_prompts",
    "reference_head_fp8": "step/test_reference_fp8.py::test_effect_of_reference_head_fp8",
    "layout": "step/test_update.py::test_a_step_is_the_same_in_every_layout",
    "fsdp": "end_to_end/test_train_engines.py::test_two_processes_train_what_one_does",
    "max_tokens_per_micro_batch": "step/test_update.py::test_number_of_forwards",
    "torch_compile": "policy/test_compile.py::test_no_compilation_after_the_first_steps",
    "torch_compile_backend": "policy/test_compile.py::test_no_compilation_after_the_first_steps",
    "torch_compile_mode": "policy/test_compile.py::test_inductor_with_a_mode_trains_alike",
    "fp16": "step/test_nonfinite.py::"
    "test_fp16_overflows_end_the_run_only_once_the_loss_scale_is_down",
    "merge_adapter": "models/test_merge.py::test_policy_and_reference_start_from_the_sum",
    "max_prompt_length": "data/test_prompt_lengths.py::test_a_run_trains_on_the_rest",
    "skip_unusable_rows": "data/test_skipping.py::"
    "test_such_a_row_of_a_stream_is_skipped_and_counted",
    "max_grad_norm": "parity/test_trl.py::test_loss_gradients_and_weights_equal_trl",
    "max_nonfinite_steps": "step/test_nonfinite.py::"
    "test_too_many_such_steps_in_a_row_end_the_run",
    "dynamic_sampling": "step/test_dynamic.py::"
    "test_every_group_of_a_batch_has_signal_and_prompts_come_in_order",
    "max_sampling_rounds": "step/test_dynamic.py::"
    "test_after_the_last_round_the_batch_is_trained_as_it_is",
    "rollout_filter": "end_to_end/test_dynamic_sampling.py::"
    "test_a_filter_that_fails_ends_the_run_saved",
    "curriculum": "end_to_end/test_dynamic_sampling.py::"
    "test_a_curriculum_alone_takes_every_group_once",
    "missing_eos_penalty": "parity/test_trl_2024.py::test_metrics_of_the_rollout",
    "normalize_rewards": "parity/test_trl_2024.py::test_loss_and_gradient_of_every_step",
    "num_sample_generations": "parity/test_trl_2024.py::test_tables_of_a_run_are_printed",
    "report_to": "end_to_end/test_train_options.py::test_tensorboard_gets_the_metrics",
    "rollout_forward_batch_size": "parity/test_trl_2024.py::"
    "test_local_rollout_forward_batch_size_limits_rows",
    "save_total_limit": "checkpoint/test_writer.py::"
    "test_nothing_but_the_limited_number_of_checkpoints_is_left",
    "stop_token_id": "parity/test_trl_2024.py::test_stop_token_id_ends_completions_beside_eos",
    "stop": "rollout/test_ended.py::test_rewards_see_what_is_kept_of_a_stop_string",
    "include_stop_str_in_output": "rollout/test_ended.py::"
    "test_rewards_see_what_is_kept_of_a_stop_string",
    "advantage": "parity/test_grpo.py::test_loss_gradients_and_weights_equal_trl",
    "loss": "parity/test_grpo.py::test_loss_gradients_and_weights_equal_trl",
    "use_bias_correction_kl": "parity/test_grpo.py::test_loss_gradients_and_weights_equal_trl",
    "whiten_rewards": "parity/test_trl_2024.py::test_loss_and_gradient_of_every_step",
    "truncated_importance_sampling": "objective/test_importance_sampling.py::"
    "test_gradients_are_those_of_the_formula",
    "importance_sampling_cap": "objective/test_importance_sampling.py::"
    "test_what_is_logged_of_the_weights",
    "logp_diff_warn": "weight_sync/test_sampler_check.py::"
    "test_a_small_difference_warns_the_first_tenth_and_hundredth_time",
    "logp_diff_stop": "weight_sync/test_sampler_check.py::test_a_stop_of_zero_is_never",
    "overlap_rewards": "rewards/test_overlap.py::"
    "test_without_overlap_there_is_one_call_after_generation",
    "reward_over_limit": "rewards/test_over_limit.py::"
    "test_a_run_goes_on_and_counts_what_was_over_the_limit",
    "reward_processes": "rewards/test_processes.py::"
    "test_groups_are_scored_in_two_processes_at_the_same_time_during_generation",
    **dict.fromkeys(
        (
            "reward_model_label", "reward_model_output", "reward_model_position",
            "reward_model_dtype",
        ),
        "rewards/test_models.py::test_the_settings_of_a_run_reach_its_reward_model",
    ),
    "reward_model_offload": "rewards/test_models.py::"
    "test_an_offloaded_model_scores_once_the_engine_is_asleep",
    "use_vllm": "end_to_end/test_train_vllm.py::test_sampler_and_trainer_agree_in_every_step",
    "rollout_engine": "rollout/test_registry.py::"
    "test_a_run_trains_with_an_engine_of_the_users_own",
    "vllm_lora": "end_to_end/test_train_vllm.py::test_an_adapter_is_trained_unmerged_in_the_engine",
    "weight_sync_bucket_mib": "rollout/test_build.py::test_weights_are_sent_in_buckets",
    **dict.fromkeys(
        ("max_staleness", "weight_sync_steps", "queue_maxsize"),
        "step/test_ahead.py::"
        "test_no_token_is_older_than_the_bound_and_prompts_keep_their_order",
    ),
    "max_tool_calling_iterations": "rollout/trajectories/test_sampler.py::"
    "test_max_tool_calling_iterations",
    "tool_failure": "tools/test_tool_set.py::"
    "test_a_failure_ends_the_trajectory_where_the_run_says_so",
    "tool_threads": "tools/test_tool_set.py::"
    "test_more_calls_than_threads_hang_and_the_next_is_answered",
    "tool_timeout_s": "tools/test_tool_set.py::"
    "test_a_call_that_hangs_fails_in_time_and_others_go_on",
    "trajectory_timeout_s": "rollout/trajectories/test_sampler.py::"
    "test_a_trajectory_ends_when_its_time_is_up_though_its_tool_hangs",
    "max_inflight_tasks": "rollout/test_flight.py::"
    "test_groups_start_whole_and_in_order_as_far_as_there_is_room",
    **dict.fromkeys(
        (
            "vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port",
            "vllm_server_timeout", "vllm_weight_transfer",
        ),
        "rollout/test_build.py::test_settings_of_the_server",
    ),
    **dict.fromkeys(
        (
            "vllm_enable_sleep_mode", "vllm_engine_kwargs", "vllm_gpu_memory_utilization",
            "vllm_max_model_length", "vllm_model_impl", "vllm_structured_outputs_regex",
            "vllm_tensor_parallel_size",
        ),
        "rollout/test_build.py::test_settings_of_the_engine_in_process",
    ),
}  # fmt: skip
# carried out by transformers: the run, the optimizer, logs, evaluation, checkpoints, the Hub, DDP
CARRIED_OUT = """
    output_dir num_train_epochs max_steps use_cpu tf32 debug skip_memory_metrics full_determinism
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim_args optim_target_modules weight_decay
    adam_beta1 adam_beta2 adam_epsilon
    logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica
    log_on_each_node disable_tqdm run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start bf16_full_eval fp16_full_eval
    load_best_model_at_end metric_for_best_model greater_is_better
    save_strategy save_steps save_only_model save_on_each_node ignore_data_skip
    restore_callback_states_from_checkpoint
    push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout
"""
TRANSFORMERS = CARRIED_OUT.split()
ALWAYS_SO = {  # field: why neither value of it can be told from the other
    "prediction_loss_only": "evaluation never keeps predictions",
    "dataloader_pin_memory": "the loaders yield rows of text: there is no tensor to pin",
    "do_train": "a flag for scripts, which transformers' Trainer does not read either",
    "do_eval": "as do_train",
    "do_predict": "as do_train",
    "resume_from_checkpoint": "as do_train; rloo-fast train reads it",
    "stop_token": "its only value, 'eos', is what happens without it",
    "local_rank": "transformers takes the rank from the environment",
}


TABLES_OF = (5, 23)  # the transformers release whose fields the tables list


def test_every_field_stands_in_one_table():
    prefix = "test_effect_of_"
    shown = [n.removeprefix(prefix) for n in dir(test_effects) if n.startswith(prefix)]
    tables = [*REFUSED, *shown, *ELSEWHERE, *TRANSFORMERS, *ALWAYS_SO]
    assert len(tables) == len(set(tables))
    fields = set(OUR_FIELDS) - {f.name for f in dataclasses.fields(Names2024)}
    release = Version(transformers.__version__).release[:2]
    if release >= TABLES_OF:  # an older one lacks some of the fields
        assert not set(tables) - fields
    unlisted = sorted(fields - set(tables))
    if unlisted and release > TABLES_OF:
        pytest.skip(f"transformers {transformers.__version__} has new fields: {unlisted}")
    assert not unlisted


@pytest.mark.parametrize("test", sorted({*ELSEWHERE.values()}))
def test_a_test_that_a_table_names_is_there(test):
    file, name = test.split("::")
    assert f"def {name}(" in (Path(__file__).parents[1] / file).read_text()


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_is_not_offered_is_refused(name, tmp_path):
    value, sentence = REFUSED[name]
    workers = {"dataloader_num_workers": 1} if name.startswith("dataloader_p") else {}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        RLOOConfig(str(tmp_path), **{name: value}, **workers)


OTHER_ENGINE = {  # settings that do nothing together, and why
    "no vLLM": ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode", "use_vllm is False"),
    "two of them": (
        {"vllm_mode": "server", "vllm_server_port": 1},
        "vllm_mode and vllm_server_port",
        "use_vllm is False",
    ),
    "server's in process": (
        {"use_vllm": True, "vllm_server_port": 1},
        "vllm_server_port",
        'vllm_mode is "colocate"',
    ),
    "engine's over HTTP": (
        {"use_vllm": True, "vllm_mode": "server", "vllm_gpu_memory_utilization": 0.5},
        "vllm_gpu_memory_utilization",
        "the server decides it",
    ),
    "transformers' cache": (
        {"use_vllm": True, "cache_implementation": "static"},
        "cache_implementation",
        "vLLM has its own cache",
    ),
}


@pytest.mark.parametrize("case", OTHER_ENGINE)
def test_a_setting_of_another_engine_is_refused(case, tmp_path):
    fields, names, why = OTHER_ENGINE[case]
    with pytest.raises(ValueError, match=f"^{names} has no effect here, as {why}: leave it out"):
        RLOOConfig(str(tmp_path), **fields)


def test_nccl_needs_a_trainer_on_a_gpu(tmp_path):
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_weight_transfer": "nccl"}
    with pytest.raises(ValueError, match="sends from a GPU, and use_cpu is True"):
        RLOOConfig(str(tmp_path), use_cpu=True, **server)
    with pytest.raises(ValueError, match="'auto', 'nccl', 'gloo' or 'http'"):
        RLOOConfig(str(tmp_path), **server | {"vllm_weight_transfer": "ipc"})


def test_engines_are_shared_by_a_divisor_of_the_processes(tmp_path):
    with pytest.raises(ValueError, match="must divide the number of processes"):
        RLOOConfig(str(tmp_path), use_vllm=True, vllm_tensor_parallel_size=2)


@pytest.mark.parametrize("name", ["max_tokens", "stop_token_ids", "seed", "logprobs"])
def test_vllm_settings_that_are_said_elsewhere_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"generation_kwargs may not set {name}"):
        RLOOConfig(str(tmp_path), use_vllm=True, generation_kwargs={name: 1})


@pytest.mark.parametrize("optim", ["adalomo", "galore_adamw_layerwise", "schedule_free_adamw"])
def test_other_optimizers_that_do_not_fit_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=f"optim='{optim}' is refused"):
        RLOOConfig(str(tmp_path), optim=optim)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_generations": 1}, "num_generations must be >= 2"),
        ({"num_generations": "4"}, "num_generations must be >= 2 .*, got '4'"),
        ({"max_completion_length": None}, "max_completion_length must be an integer >= 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": None}, "temperature must be > 0, got None"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"min_p": 2.0}, r"min_p must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0"),
        ({"beta": -0.1}, "beta must be >= 0"),
        ({"beta": float("nan")}, "beta must be >= 0"),
        ({"epsilon": -0.1}, "epsilon must be >= 0"),
        ({"ref_model_mixup_alpha": 1.5}, r"ref_model_mixup_alpha must be in \[0, 1\]"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be an integer >= 1"),
        ({"num_generations_eval": 0}, "num_generations_eval must be an integer >= 1"),
        ({"log_format": "json"}, "log_format must be 'dict' or 'line', got 'json'"),
        ({"num_completions_to_print": 0}, "num_completions_to_print must be an integer >= 1"),
        ({"reward_timeout_s": 0}, "reward_timeout_s must be > 0"),
        (
            {"reward_timeout_s": 1, "reward_over_limit": "zero"},
            "reward_over_limit must be 'error', 'none' or a finite number",
        ),
        ({"reward_over_limit": 0}, "reward_over_limit=0 needs reward_timeout_s"),
        ({"reward_weights": "1, 2"}, "reward_weights must be a list of finite numbers"),
        ({"reward_weights": [1.0, float("inf")]}, "reward_weights must be a list of finite"),
        ({"reward_clip_range": (1, -1)}, "reward_clip_range must be .* min < max"),
        ({"reward_clip_range": "wide"}, "reward_clip_range must be .*, got 'wide'"),
        ({"pad_to_multiple_of": "wide"}, "pad_to_multiple_of must be 'auto' or an integer"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be an integer"),
        ({"model_init_kwargs": "dtype"}, "model_init_kwargs must be a dict, .*got 'dtype'"),
        ({"generation_kwargs": {"temprature": 1}}, "'temprature' is not a sampling argument"),
        ({"generation_kwargs": {"top_p": 0.0}}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"generation_kwargs": {"temperature": 0.5}}, "may not set temperature.*: set temperature"),
        ({"generation_kwargs": {"max_new_tokens": 5}}, "set max_completion_length"),
        ({"generation_kwargs": {"eos_token_id": 5}}, "set stop_token_id"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "set num_generations"),
        ({"stop": ["</a>", ""]}, "stop must be a list of texts, none of them empty, got ''"),
        ({"stop": 3}, "stop must be a text or a list of texts, got 3"),
        ({"generation_kwargs": {"stop": [3]}}, "stop must be a list of texts, .*got 3"),
        (
            {"stop": ["a"], "generation_kwargs": {"stop_strings": "b"}},
            r"given twice, and differ: stop=\['a'\], generation_kwargs\['stop_strings'\]=\['b'\]",
        ),
        ({"generation_kwargs": {"return_dict_in_generate": True}}, "is not a sampling argument"),
        ({"cache_implementation": "big"}, r"Invalid `cache_implementation` \(big\)"),
        ({"liger_kernel_config": {"rope": True}}, "no effect without use_liger_kernel=True"),
        ({"beta": 0.0, "sync_ref_model": True}, "set beta > 0 or sync_ref_model=False"),
        ({"loss": "ppo"}, r"loss must be one of \('rloo', 'grpo', .*\), or one .*NAME, got 'ppo'"),
        ({"advantage": "gae"}, r"advantage must be one of \('rloo', 'grpo', 'dr_grpo'\), got"),
        ({"use_bias_correction_kl": False}, "loss='rloo', whose KL is in the reward: leave it out"),
        ({"loss": "reinforce_pp", "advantage": "grpo"}, "the KL to go is not divided: choose"),
        ({"loss": "grpo", "token_level_kl": True}, "means loss='reinforce_pp', but that is 'grpo'"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(settings, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        RLOOConfig(str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("given", "clean"),
    [((-1, 2), [-1.0, 2.0]), (3, [-3.0, 3.0]), ([3], [-3.0, 3.0]), (None, None)],
    ids=str,
)
def test_a_reward_clip_range_may_be_a_pair_or_one_number(given, clean, tmp_path):
    assert RLOOConfig(str(tmp_path), reward_clip_range=given).reward_clip_range == clean


@pytest.mark.parametrize(
    ("given", "stop", "included"),
    [
        ({"stop": "</a>"}, ["</a>"], True),
        ({"stop": ["</a>", "b"], "include_stop_str_in_output": False}, ["</a>", "b"], False),
        ({"generation_kwargs": {"stop": "</a>"}}, ["</a>"], True),
        ({"generation_kwargs": {"stop_strings": ["</a>"], "top_k": 5}}, ["</a>"], True),
        (
            {"generation_kwargs": {"stop": ["</a>"], "include_stop_str_in_output": False}},
            ["</a>"], False,
        ),
        ({"stop": ["b"], "generation_kwargs": {"stop": ["b"]}}, ["b"], True),
        ({"stop": []}, None, True),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("use_vllm", [False, True])
def test_stop_strings_as_transformers_and_vllm_write_them(
    use_vllm, given, stop, included, tmp_path
):
    before = copy.deepcopy(given)
    args = RLOOConfig(str(tmp_path), use_vllm=use_vllm, **given)
    assert (args.stop, args.include_stop_str_in_output) == (stop, included)
    assert {*(args.generation_kwargs or {})} <= {"top_k"}
    assert given == before


@pytest.mark.parametrize("name", ["model_init_kwargs", "generation_kwargs", "chat_template_kwargs"])
def test_a_dict_may_be_given_as_json(name, tmp_path):
    assert getattr(RLOOConfig(str(tmp_path), **{name: '{"top_k": 3}'}), name) == {"top_k": 3}


# --- sizes


@pytest.mark.parametrize(
    ("settings", "steps", "size"),
    [
        ({}, 1, 8),
        ({"gradient_accumulation_steps": 3}, 3, 24),
        ({"steps_per_generation": 2}, 2, 16),
        ({"generation_batch_size": 32}, 4, 32),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 4}, 2, 16),
        ({"steps_per_generation": 2, "generation_batch_size": 16}, 2, 16),
    ],
    ids=str,
)
def test_sizes_of_a_generation_batch(settings, steps, size, tmp_path):
    config = RLOOConfig(str(tmp_path), per_device_train_batch_size=8, **settings)
    assert (config.steps_per_generation, config.generation_batch_size) == (steps, size)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"num_generations": 3},
            r"generation_batch_size \(8\) must be divisible by num_generations \(3\)",
        ),
        (
            {"generation_batch_size": 12},
            r"\(12\) must be divisible by the global batch size \(8: per_device_train",
        ),
        (
            {"steps_per_generation": 2, "generation_batch_size": 8},
            "means 16 completions, but generation_batch_size is 8: set one of the two",
        ),
        (
            {"eval_strategy": "steps", "per_device_eval_batch_size": 3},
            r"The global eval batch size \(3 \* 1\) must be divisible by",
        ),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(settings, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        RLOOConfig(str(tmp_path), per_device_train_batch_size=8, **settings)
