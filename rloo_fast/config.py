"""RLOOConfig: transformers' TrainingArguments with the fields of TRL 1.16's RLOOConfig and our own.

Read once, checked once, before a model is loaded. Names of TRL's 2024 trainer: see `names_2024.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .names_2024 import Names2024


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text.replace("%", "%%")})


@dataclass
class RLOOConfig(Names2024, TrainingArguments):
    """Everything a run can be told. Defaults are TRL 1.16's except: dropout is off, and bf16 is
    chosen only where a GPU supports it. Raises ValueError with what to write for bad values.

    A batch is counted in completions: one optimizer step uses per_device_train_batch_size x
    gradient_accumulation_steps x number of processes of them; num_generations belong to one prompt.
    """

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
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
    model_init_kwargs: dict | str | None = _field(
        None, "Keyword arguments of AutoModelForCausalLM.from_pretrained (JSON on a command line)."
    )
    trust_remote_code: bool = _field(False, "Allow models and tokenizers that ship their own code.")
    router_aux_loss_coef: float | None = _field(
        None, "Weight of a mixture-of-experts model's load-balancing loss. Default: its config's."
    )
    disable_dropout: bool = _field(True, "Set every dropout of the model to 0.")
    layout: str = _field(
        "auto", "How completions are batched for the update: auto | padded. auto picks the best."
    )

    # Data
    remove_unused_columns: bool | None = _field(
        False, "Drop every dataset column but `prompt`; reward functions then get no columns."
    )
    shuffle_dataset: bool | None = _field(True, "Shuffle the training prompts in every epoch.")
    chat_template_kwargs: dict | str | None = _field(
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
        False, "Scale KL-penalised rewards to unit variance over the generation batch."
    )
    token_level_kl: bool = _field(
        False, "KL penalty per token as reward-to-go, token-level ratios (REINFORCE++, eq. 1)."
    )
    missing_eos_penalty: float | None = _field(
        None, "Subtracted from the reward of a completion that has no EOS token."
    )
    mask_truncated_completions: bool = _field(
        False, "Completions cut at max_completion_length give no gradient."
    )
    sync_ref_model: bool = _field(
        False, "Move the reference model towards the policy every ref_model_sync_steps steps."
    )
    ref_model_mixup_alpha: float = _field(
        0.6, "reference <- alpha policy + (1 - alpha) reference (TR-DPO, arXiv:2404.09656)."
    )
    ref_model_sync_steps: int = _field(512, "Optimizer steps between two of those moves.")
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
    generation_kwargs: dict | str | None = _field(
        None, "More arguments of transformers' GenerationConfig; they win over the fields here."
    )
    cache_implementation: str | None = _field(None, "transformers' KV cache class for generation.")
    rollout_forward_batch_size: int | None = _field(
        None,
        "Rows per generate call, no-grad forward and reward-model call. Default: all rows at a "
        "time in generation, per_device_train_batch_size in forwards.",
    )
    ds3_gather_for_generation: bool = _field(
        True, "ZeRO-3: gather the weights for generation. Only True is offered."
    )

    # Rewards
    reward_timeout_s: float | None = _field(None, "Longest a reward function may take, in seconds.")

    # Logging
    log_completions: bool = _field(False, "Print samples with their rewards at every log.")
    num_completions_to_print: int | None = _field(None, "How many of them. Default: all.")
    log_unique_prompts: bool = _field(False, "Only one sample per prompt in that table.")
    num_sample_generations: int | None = _field(
        None, "Print that table this many times in the run, evenly spread."
    )
    log_multimodal: bool = _field(True, "Only True is offered: there are no images to leave out.")

    # Generation engines that are not in this version: named here so that a TRL script's choice is
    # answered with a sentence (see `_refuse`), never ignored
    use_vllm: bool = _field(False, "Not offered yet.")
    vllm_mode: str = _field("colocate", "Not offered yet.")
    vllm_model_impl: str = _field("vllm", "Not offered yet.")
    vllm_enable_sleep_mode: bool = _field(False, "Not offered yet.")
    vllm_structured_outputs_regex: str | None = _field(None, "Not offered yet.")
    vllm_server_base_url: str | None = _field(None, "Not offered yet.")
    vllm_server_host: str = _field("0.0.0.0", "Not offered yet.")
    vllm_server_port: int = _field(8000, "Not offered yet.")
    vllm_server_timeout: float = _field(240.0, "Not offered yet.")
    vllm_group_port: int = _field(51216, "Not offered yet.")
    vllm_gpu_memory_utilization: float = _field(0.3, "Not offered yet.")
    vllm_max_model_length: int | None = _field(None, "Not offered yet.")
    vllm_tensor_parallel_size: int = _field(1, "Not offered yet.")
    use_transformers_continuous_batching: bool = _field(False, "Not offered yet.")
    transformers_continuous_batching_config: dict | str | None = _field(None, "Not offered yet.")
    use_transformers_paged: bool = _field(False, "Not offered yet.")

    def __post_init__(self) -> None:
        self.apply_names_2024()
        for engine in ("deepspeed", "fsdp"):
            if getattr(self, engine):
                raise ValueError(
                    f"{engine} is not in this version: train with one process, or several with "
                    "`accelerate launch --multi_gpu`."
                )
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        if hasattr(self, "activation_checkpointing") and self.activation_checkpointing is None:
            # transformers >= 5.20 calls it so and warns about the old name
            self.activation_checkpointing = self.gradient_checkpointing
            if self.activation_checkpointing_kwargs is None:
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()
        self._clean()
        self._check_ranges()
        self._refuse()
        self._batch_sizes()

    # Sizes that follow from the fields, in completions and micro-steps (TRL's unit: one
    # per_device_train_batch_size of completions per process)

    @property
    def micro_steps_per_update(self) -> int:
        """gradient_accumulation_steps as configured (the Trainer itself is run with 1)."""
        return self._micro_steps_per_update

    @property
    def local_generation_size(self) -> int:
        """Completions of one generation batch on one process."""
        return self.per_device_train_batch_size * int(self.steps_per_generation or 1)

    @property
    def prompts_per_generation(self) -> int:
        """Prompts of one generation batch, all processes."""
        return int(self.generation_batch_size or 0) // self.num_generations

    def _clean(self) -> None:
        clip = self.reward_clip_range
        if isinstance(clip, (int, float)):
            clip = [clip]
        if clip is not None:
            clip = [float(c) for c in clip]
            clip = [-clip[0], clip[0]] if len(clip) == 1 else clip
            if len(clip) != 2 or not clip[0] < clip[1]:
                raise ValueError(
                    f"reward_clip_range must be (min, max) with min < max, or one number c > 0 for "
                    f"(-c, c), got {self.reward_clip_range}."
                )
        self.reward_clip_range = clip
        pad = self.pad_to_multiple_of
        if isinstance(pad, str):
            pad = None if pad.lower() in ("auto", "none", "null") else int(pad)
        self.pad_to_multiple_of = pad

    def _check_ranges(self) -> None:
        def need(ok: bool, sentence: str) -> None:
            if not ok:
                raise ValueError(sentence)

        k = self.num_generations
        need(
            k is not None and k >= 2,
            f"num_generations must be >= 2 for a leave-one-out baseline, got {k}.",
        )
        need(self.temperature > 0, f"temperature must be > 0, got {self.temperature}.")
        need(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}.")
        need(self.top_k is None or self.top_k >= 0, f"top_k must be >= 0, got {self.top_k}.")
        need(self.beta >= 0, f"beta must be >= 0, got {self.beta}.")
        need(self.num_iterations >= 1, f"num_iterations must be >= 1, got {self.num_iterations}.")
        need(
            self.max_completion_length >= 1,
            f"max_completion_length must be >= 1 token, got {self.max_completion_length}.",
        )
        need(self.epsilon >= 0, f"epsilon must be >= 0, got {self.epsilon}.")
        need(
            self.max_nonfinite_steps >= 1,
            f"max_nonfinite_steps must be >= 1, got {self.max_nonfinite_steps}.",
        )
        need(
            self.layout in ("auto", "padded"),
            f"layout must be 'auto' or 'padded', got {self.layout!r}.",
        )
        need(
            self.stop_token in (None, "eos"),
            f"stop_token must be 'eos', got {self.stop_token!r}; write the id of another token as "
            "stop_token_id.",
        )
        need(
            not self.sync_ref_model or self.beta > 0,
            "sync_ref_model=True needs a reference model, which beta=0 does not keep: set beta > 0 "
            "or sync_ref_model=False.",
        )

    def _refuse(self) -> None:
        """Settings that this version does not carry out: a sentence each, with what to write."""
        if self.use_vllm:
            raise ValueError(
                "use_vllm=True: rollouts by vLLM are not in this version. Leave use_vllm=False: "
                "completions are then sampled with transformers' generate."
            )
        if self.use_transformers_continuous_batching or self.use_transformers_paged:
            raise ValueError(
                "use_transformers_continuous_batching=True is not in this version. Leave it False: "
                "completions are then sampled with transformers' generate."
            )
        for name, spec in self.__dataclass_fields__.items():
            if name.startswith(("vllm_", "transformers_continuous_")) and (
                getattr(self, name) != spec.default
            ):
                raise ValueError(
                    f"{name} has no effect here, as its engine is not in this version: leave it out."
                )
        refused = {  # field: (values that are fine, why the others are not)
            "auto_find_batch_size": (
                (False,),
                "it would split groups; lower per_device_train_batch_size and raise "
                "gradient_accumulation_steps by the same factor, which does not change the result",
            ),
            "label_smoothing_factor": ((0.0,), "RLOO has no labels; leave it at 0"),
            "ds3_gather_for_generation": ((True,), "ZeRO-3 is not in this version; leave it True"),
            "log_multimodal": ((True,), "there are no images here; leave it True"),
            "torch_compile": ((False,), "it is not in this version; leave it False"),
            "neftune_noise_alpha": (
                (None, 0.0),
                "noise in the embeddings makes the update's log-probs differ from the sampled "
                "ones; leave it out",
            ),
            "train_sampling_strategy": (("random",), "see shuffle_dataset; leave it out"),
        }
        for name, (fine, why) in refused.items():
            value = getattr(self, name, fine[0])  # not every transformers version has every field
            if value not in fine:
                raise ValueError(f"{name}={value!r} is refused: {why}.")
        parallel = getattr(self, "parallelism_config", None)
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError(
                "context and sequence parallelism (cp_size, sp_size > 1) are not in this version: "
                "set both to 1."
            )

    def _batch_sizes(self) -> None:
        # the trainer works through the micro-steps itself and runs transformers' loop with 1; a
        # pickled config keeps the number that was asked for
        if not hasattr(self, "_micro_steps_per_update"):
            self._micro_steps_per_update = self.gradient_accumulation_steps
        per_micro_step = self.per_device_train_batch_size * self.world_size
        steps, size = self.steps_per_generation, self.generation_batch_size
        if steps is not None and size is not None and size != steps * per_micro_step:
            raise ValueError(
                f"steps_per_generation={steps} means {steps * per_micro_step} completions, but "
                f"generation_batch_size is {size}: set one of the two."
            )
        if steps is None:
            if size is not None and size % per_micro_step:
                raise ValueError(
                    f"generation_batch_size must be a multiple of per_device_train_batch_size x "
                    f"processes = {per_micro_step}, got {size}."
                )
            steps = size // per_micro_step if size is not None else self.micro_steps_per_update
        self.steps_per_generation = steps
        self.generation_batch_size = steps * per_micro_step
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"generation_batch_size ({self.generation_batch_size} completions: per device "
                f"{self.per_device_train_batch_size} x {steps} micro-steps x {self.world_size} "
                f"processes) must be a multiple of num_generations ({self.num_generations}), so "
                "that it holds whole groups."
            )
        self._eval_batch_size()
        self._episodes()

    def _eval_batch_size(self) -> None:
        if self.eval_strategy == "no":
            return
        k = self.num_generations_eval or self.num_generations
        rows = self.per_device_eval_batch_size * self.world_size
        if rows % k:
            raise ValueError(
                f"per_device_eval_batch_size x processes ({rows}) must be a multiple of the "
                f"completions per prompt in evaluation ({k})."
            )

    def _episodes(self) -> None:
        """total_episodes (completions) -> max_steps (optimizer steps), as the 2024 trainer
        counted."""
        if self.total_episodes is None:
            return
        batches = math.ceil(self.total_episodes / int(self.generation_batch_size or 1))
        micro_steps = batches * self.num_iterations * int(self.steps_per_generation or 1)
        steps = math.ceil(micro_steps / self.micro_steps_per_update)
        if self.max_steps not in (-1, steps):
            raise ValueError(
                f"total_episodes={self.total_episodes} means {steps} optimizer steps, but max_steps "
                f"is {self.max_steps}: set one of the two."
            )
        self.max_steps = steps
