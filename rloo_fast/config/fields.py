"""The fields of RLOOConfig: transformers' TrainingArguments, TRL 1.16's RLOOConfig and our own.

Values as they were given; `rloo_config.py` checks them.
"""

# TRL's fields take None where transformers' do not
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from transformers import TrainingArguments

from ..batching.layouts import layouts_help
from ..objective.losses import ADVANTAGES, LOSSES, choices_help
from .documented import documented as _field
from .names_2024 import Names2024
from .sampling_ahead import SamplingAhead
from .server_address import server_urls
from .shares import DefaultShare
from .tool_use import ToolUse
from .which_prompts import WhichPrompts


@dataclass
class RLOOFields(Names2024, WhichPrompts, SamplingAhead, ToolUse, TrainingArguments):
    """Everything a run can be told, before it is checked."""

    _VALID_DICT_FIELDS: ClassVar = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
        "vllm_engine_kwargs",
        "reward_kwargs",
    ]

    # Training, where TRL's defaults differ from transformers'
    learning_rate: float = _field(1e-6, "Initial learning rate of AdamW.")
    logging_steps: float = _field(10, "Log every so many optimizer steps; below 1: share of all.")
    gradient_checkpointing: bool | None = _field(
        True, "Recompute activations in the backward pass: less memory, one more forward."
    )
    bf16: bool | None = _field(
        None, "bfloat16 autocast. Default: on where a GPU supports it, unless fp16 is set."
    )

    # Model
    model_init_kwargs: dict[str, Any] | str | None = _field(
        None, "Keyword arguments of AutoModelForCausalLM.from_pretrained (JSON on a command line)."
    )
    trust_remote_code: bool = _field(False, "Allow models and tokenizers that ship their own code.")
    merge_adapter: str | None = _field(
        None,
        "A PEFT adapter (directory or hub id) that is merged into the model before anything else: "
        "policy and reference start from the sum.",
    )
    router_aux_loss_coef: float | None = _field(
        None, "Weight of a mixture-of-experts model's load-balancing loss. Default: its config's."
    )
    disable_dropout: bool = _field(
        True, "Set every dropout of the model to 0, that of LoRA adapters too."
    )
    layout: str = _field(
        "auto",
        f"How completions are batched for the update: {layouts_help()} | auto (the first of these "
        "that the model supports) | one of your own, as module:name or file.py:name.",
    )
    max_tokens_per_micro_batch: int | None = _field(
        None,
        "Most tokens of a micro-batch, those that are run. Default: what "
        "per_device_train_batch_size rows as long as the batch's longest would have.",
    )

    # Data
    remove_unused_columns: bool | None = _field(
        False, "Drop every dataset column but `prompt`; reward functions then get no columns."
    )
    shuffle_dataset: bool | None = _field(True, "Shuffle the training prompts in every epoch.")
    max_prompt_length: int | None = _field(
        None, "Prompts of more tokens are left out of the datasets. Default: none is."
    )
    skip_unusable_rows: bool = _field(
        False,
        "Leave out rows that cannot be used (prompt missing, empty, too long, no text; a column "
        "missing), counted as rows_skipped. False: such a row ends the run, its steps saved.",
    )
    chat_template_kwargs: dict[str, Any] | str | None = _field(
        None, "Extra arguments of apply_chat_template for conversational prompts."
    )
    pad_to_multiple_of: int | str | None = _field(
        "auto",
        "Pad sequences to a multiple of this many tokens. auto: no padding beyond the batch.",
    )

    # Algorithm
    num_generations: int = _field(2, "K: completions sampled per prompt, at least 2.")
    num_generations_eval: int | None = _field(None, "K in evaluation. Default: num_generations.")
    beta: float = _field(0.05, "KL coefficient; 0: no reference model is kept.")
    advantage: str = _field(
        "rloo",
        f"What a completion is compared with: {choices_help(ADVANTAGES)}.",
    )
    loss: str = _field(
        "rloo",
        f"{choices_help(LOSSES)} | one of your own, as module:name or file.py:name.",
    )
    use_bias_correction_kl: bool = _field(
        True,
        "GRPO's losses: weight the KL term of a token by its ratio, which makes its gradient the "
        "reverse KL's, as TRL 1.16 does.",
    )
    num_iterations: int = _field(1, "Passes over every generation batch.")
    steps_per_generation: int | None = _field(
        None, "Micro-steps per generation batch. Default: gradient_accumulation_steps."
    )
    generation_batch_size: int | None = _field(
        None, "Completions sampled at a time, all processes. Default: from steps_per_generation."
    )
    epsilon: float = _field(0.2, "Lower clip of the ratio, and upper unless epsilon_high is set.")
    epsilon_high: float | None = _field(None, "Upper clip of the ratio.")
    reward_weights: list[float] | None = _field(None, "One weight per reward function. Default: 1.")
    reward_clip_range: list[float] | None = _field(
        None,
        "Clip the weighted reward to (min, max), before the KL penalty; one number c: (-c, c).",
    )
    normalize_advantages: bool = _field(
        False, "Advantages to mean 0, std 1 over the generation batch of all processes."
    )
    normalize_rewards: bool = _field(
        False,
        "Rewards to mean 0, std 1 over the generation batch of all processes, before the clip.",
    )
    whiten_rewards: bool = _field(
        False,
        "Scale rewards, less the KL where it is in them, to unit variance over the generation "
        "batch.",
    )
    missing_eos_penalty: float | None = _field(
        None,
        "Subtracted from the reward of a completion that was cut before it ended: by an EOS of "
        "tokenizer or model, stop_token_id or a stop string.",
    )
    mask_truncated_completions: bool = _field(
        False, "Completions cut at max_completion_length before they ended give no gradient."
    )
    sync_ref_model: bool = _field(
        False, "Move the reference model towards the policy every ref_model_sync_steps steps."
    )
    ref_model_mixup_alpha: float = _field(
        0.6, "reference <- alpha policy + (1 - alpha) reference (TR-DPO, arXiv:2404.09656)."
    )
    ref_model_sync_steps: int = _field(512, "Optimizer steps between two of those moves.")
    reference_head_fp8: bool = _field(
        False,
        "Multiply the reference's lm_head in fp8, on H100 or newer: its log-probs come sooner, and "
        "are off by about 0.02 nats per token.",
    )
    max_nonfinite_steps: int = _field(
        5, "A step whose loss or gradient is not finite is skipped; this many in a row end the run."
    )

    # Sampling
    max_completion_length: int = _field(512, "Longest completion, in tokens.")
    temperature: float = _field(1.0, "Sampling temperature; logits are divided by it in the loss.")
    top_p: float = _field(1.0, "Nucleus sampling: share of probability kept.")
    top_k: int = _field(0, "Keep the k most likely tokens; 0: all.")
    min_p: float | None = _field(
        None, "Keep tokens at least this likely relative to the likeliest."
    )
    repetition_penalty: float = _field(1.0, "Above 1: repeat less.")
    stop_token: str | None = _field(
        None, "'eos': completions end at the tokenizer's EOS token, as they do by default."
    )
    stop_token_id: int | None = _field(None, "Another token id that ends a completion.")
    stop: list[str] | None = _field(
        None,
        "Stop strings, such as </answer>: text that ends a completion, however it is split into "
        "tokens. generation_kwargs may say it too, as stop or stop_strings.",
    )
    include_stop_str_in_output: bool = _field(
        True,
        "A stop string is part of its completion: rewards see it, and it is trained on. False: "
        "text, tokens and log-probs end before it.",
    )
    generation_kwargs: dict[str, Any] | str | None = _field(
        None,
        "More arguments of transformers' GenerationConfig, or of vLLM's SamplingParams; they win "
        "over the fields here.",
    )
    cache_implementation: str | None = _field(None, "transformers' KV cache class for generation.")
    rollout_forward_batch_size: int | None = _field(
        None,
        "Rows per generate call, reward-model call and no-grad forward (there as many tokens as "
        "such rows may have). Default: all at a time in generation, else "
        "per_device_train_batch_size.",
    )
    ds3_gather_for_generation: bool = _field(
        True, "ZeRO-3: gather the weights for transformers' generate. Only True is offered."
    )

    # Rewards
    reward_kwargs: dict[str, Any] | str | None = _field(
        None, 'Arguments of reward functions, by name: {"length": {"target": 200}}.'
    )
    reward_model_label: int | str | None = _field(
        None, "Which of a reward model's labels is the reward, by number or name. Default: 0."
    )
    reward_model_output: str = _field(
        "logit", "The label's logit | its probability (softmax; sigmoid of a single label)."
    )
    reward_model_position: str = _field(
        "last",
        "Where a reward model reads its value: last (the last token of the text) | eos (an EOS is "
        "put behind each completion that ended with one, and read).",
    )
    reward_model_dtype: str | None = _field(
        None, "Type that reward models are loaded in. Default: as model_init_kwargs says."
    )
    reward_model_offload: bool = _field(
        False, "Reward models wait on the host, and score once the rollout engine is asleep."
    )
    execute_model_code: bool = _field(
        False,
        "Allow reward functions that run what the model wrote (`code`), in a sandbox of processes.",
    )
    reward_timeout_s: float | None = _field(None, "Longest a reward function may take, in seconds.")
    reward_over_limit: float | str | None = _field(
        "error",
        "What a completion gets that takes a reward function longer, or kills its process: error "
        "(the run ends) | a number, its reward | none (it is not scored). Other than error: with "
        "reward_processes.",
    )
    overlap_rewards: bool | None = _field(
        None,
        "Call the reward functions on finished prompts while others are still being sampled. "
        "False: once, on all completions of the process. Default: True with vLLM.",
    )
    reward_processes: int = _field(
        0, "Processes for the functions that are not async, so that they do not slow sampling down."
    )

    # Logging
    log_format: str = _field(
        "dict",
        "What a log looks like on the terminal: dict (all metrics, as transformers prints them) | "
        "line (those that matter, in one line). `rloo-fast train` takes line.",
    )
    log_completions: bool = _field(
        False,
        "Print samples with their rewards at every log: of the newest generation batch, or of the "
        "evaluation.",
    )
    log_completions_csv: bool = _field(
        False,
        "At every log, append the samples that log_completions would print to completions.csv in "
        "output_dir; it prints nothing itself.",
    )
    view_mib: int = _field(
        0,
        "Keep the completions of the steps in _view/ of output_dir, with log-prob, entropy, KL and "
        "sampler's difference of each token, for `rloo-fast view`: at most this many MiB; beyond, "
        "every second step is dropped. 0: none are kept. `rloo-fast train` takes 256.",
    )
    num_completions_to_print: int | None = _field(
        None, "How many of them, drawn at random. Default: all."
    )
    log_unique_prompts: bool = _field(False, "Only one sample per prompt in that table.")
    num_sample_generations: int | None = _field(
        None, "Print that table this many times in the run, evenly spread."
    )
    log_multimodal: bool = _field(
        True, "Put the images of prompts into the completions tables of wandb and trackio."
    )

    # Rollouts by vLLM
    use_vllm: bool = _field(False, "Sample with vLLM; False: with transformers' generate.")
    rollout_engine: str | None = _field(
        None,
        "The engine that samples, by name: transformers | vllm | vllm_server | one of your own, as "
        "module:name or file.py:name. Default: what use_vllm and vllm_mode say.",
    )
    vllm_mode: str = _field(
        "colocate",
        "colocate: the engine lives in the training processes and shares their GPUs | server: a "
        "running `vllm serve` is asked over HTTP.",
    )
    vllm_model_impl: str = _field(
        "vllm", "The engine's model code: vllm's own | transformers' | auto."
    )
    vllm_lora: str = _field(
        "merged",
        "How the engine gets LoRA: merged: all weights, each as W + scale B A | adapter: frozen "
        "weights once, after that A and B alone, which vLLM computes with unmerged. With "
        "vllm_enable_sleep_mode the frozen weights are sent each time.",
    )
    vllm_enable_sleep_mode: bool = _field(
        False,
        "Drop the engine's weights and KV cache while the policy is trained, and move optimizer "
        "state and reference model away while it samples, as far as memory asks for it.",
    )
    vllm_structured_outputs_regex: str | None = _field(
        None, "Completions must match this regular expression."
    )
    vllm_server_base_url: list[str] | None = _field(
        None,
        "Address of the server, or addresses of several, which share the prompts; then "
        "vllm_server_host and vllm_server_port do not count.",
    )
    vllm_server_host: str = _field("0.0.0.0", "Host of the server.")
    vllm_server_port: int = _field(8000, "Port of the server.")
    vllm_server_timeout: float = _field(240.0, "How long to wait for the server, in seconds.")
    vllm_group_port: int = _field(51216, "Not offered: the system gives free ports.")
    vllm_weight_transfer: str = _field(
        "auto",
        "How weights reach a server: nccl: from GPU to GPU, none of them shared | gloo: between "
        "hosts | http | auto: nccl where it can be, gloo between CPUs, else http.",
    )
    vllm_gpu_memory_utilization: float = _field(
        DefaultShare(0.3),
        "Share of the GPU's memory for the engine: weights and KV cache. Default: 0.3; with "
        "vllm_enable_sleep_mode what the completions of a rollout need, as far as it fits.",
    )
    vllm_max_model_length: int | None = _field(
        None,
        "Longest prompt plus completion, in tokens. Default: max_prompt_length, or the longest "
        "prompt of the datasets (of a stream: twice the longest of its first 256), plus "
        "max_completion_length.",
    )
    vllm_tensor_parallel_size: int = _field(1, "Processes that share one engine.")
    vllm_engine_kwargs: dict[str, Any] | str | None = _field(
        None,
        "More arguments of vllm.LLM; they win over the fields here, and over what follows from "
        "them, such as max_num_seqs: the completions that a process samples at a time.",
    )
    weight_sync_bucket_mib: int = _field(
        256, "Most MiB of weights in flight from the policy to the engine at a time."
    )
    use_transformers_continuous_batching: bool = _field(False, "Not offered yet.")
    transformers_continuous_batching_config: dict[str, Any] | str | None = _field(
        None, "Not offered yet."
    )
    use_transformers_paged: bool = _field(False, "Not offered yet.")

    # Sampler against trainer
    logp_diff_warn: float | None = _field(
        None,
        "Warn where sampler and trainer disagree on a token's log-prob by this much on average; 0: "
        "never. Default: 3 times what the run's first 5 steps show, until then 1e-3 in float32, "
        "0.05 below.",
    )
    logp_diff_stop: float | None = _field(
        None,
        "Save a checkpoint and stop there; 0: never. Default: 10 times what those steps show, "
        "until then 0.01 in float32, 0.5 below.",
    )
    truncated_importance_sampling: str | None = _field(
        None,
        "Weight the loss by min(trainer's probability / sampler's, importance_sampling_cap): per "
        "token | per sequence. Left out: no weights; in completions of older weights the ratio of "
        "the loss is to the sampler, clipped.",
    )
    importance_sampling_cap: float = _field(2.0, "Largest of those weights.")

    # gradient_accumulation_steps as asked for, while transformers' loop runs with 1; else 0
    _micro_steps_in_run: int = field(default=0, init=False, repr=False)

    # Sizes that follow from the fields, in completions and micro-steps (TRL's unit: one
    # per_device_train_batch_size of completions per process)

    @property
    def micro_steps_per_update(self) -> int:
        """gradient_accumulation_steps as configured, also during a run."""
        return self._micro_steps_in_run or self.gradient_accumulation_steps

    @contextmanager
    def accumulating_by_ourselves(self) -> Generator[None]:
        """Within, a step of transformers' loop is an optimizer step; its micro-steps are ours."""
        self._micro_steps_in_run = self.gradient_accumulation_steps
        self.gradient_accumulation_steps = 1
        try:
            yield
        finally:
            self.gradient_accumulation_steps = self._micro_steps_in_run
            self._micro_steps_in_run = 0

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and saved in a run, too: the fields as configured."""
        configured = {"gradient_accumulation_steps": self.micro_steps_per_update}
        return {**vars(self), **configured, "_micro_steps_in_run": 0}

    @property
    def num_processes(self) -> int:
        """transformers' `world_size`, which has no type."""
        return cast(Any, self).world_size

    @property
    def local_generation_size(self) -> int:
        """Completions of one generation batch on one process."""
        return self.per_device_train_batch_size * int(self.steps_per_generation or 1)

    @property
    def server_urls(self) -> list[str]:
        """Addresses of the rollout servers."""
        host, port = self.vllm_server_host, self.vllm_server_port
        return server_urls(self.vllm_server_base_url, host, port)

    @property
    def prompts_per_generation(self) -> int:
        """Prompts of one generation batch, all processes."""
        return int(self.generation_batch_size or 0) // self.num_generations

    def completions_per_prompt(self, mode: str) -> int:
        """K in "train", and in "eval"."""
        return (self.num_generations_eval if mode == "eval" else None) or self.num_generations

    @property
    def compile_options(self) -> dict[str, Any] | None:
        """Arguments of torch.compile, None without it."""
        if not self.torch_compile:
            return None
        return {"backend": self.torch_compile_backend, "mode": self.torch_compile_mode}


# the classes whose fields are ours, beside Names2024; the others are transformers'
OWN_PARTS = (RLOOFields, WhichPrompts, SamplingAhead, ToolUse)
