"""A script written for TRL, with its import changed: `python examples/trl_style.py`.

It teaches a model to write completions of six tokens. Without --model_name_or_path the model is a
tiny one with random weights, whose completions are random words of any length, and the reward rises
within seconds. For a real model, lower the learning rate: --learning_rate 1e-6.
"""

from __future__ import annotations

import argparse
import tempfile

from datasets import Dataset
from tiny_model import tiny_model
from transformers import PrinterCallback

from rloo_fast import RLOOConfig, RLOOTrainer  # was: from trl import RLOOConfig, RLOOTrainer

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "likes", "hears", "and", "or", "not", "two"]


def six_tokens(completion_ids, **kwargs):
    """0 for six tokens, EOS among them; 0.1 less for each one too many or too few."""
    return [-abs(len(ids) - 6) / 10 for ids in completion_ids]


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train; what the trainer logged."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", help="directory or hub id [a tiny new model]")
    parser.add_argument("--output_dir", help="where to save the model [nowhere]")
    parser.add_argument("--max_steps", type=int, default=120)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    options = parser.parse_args(argv)

    model, tokenizer = options.model_name_or_path, None
    if model is None:
        model, tokenizer = tiny_model(WORDS)
    prompts = [f"{subject} {verb}" for subject in ("the cat", "a dog") for verb in WORDS[5:8]]
    with tempfile.TemporaryDirectory() as temporary:
        trainer = RLOOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=six_tokens,
            args=RLOOConfig(
                output_dir=options.output_dir or temporary,
                num_generations=8,
                per_device_train_batch_size=64,
                max_completion_length=16,
                max_steps=options.max_steps,
                learning_rate=options.learning_rate,
                beta=0.0,
                bf16=False,
                logging_steps=options.max_steps // 6 or 1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts * 16]),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if options.output_dir:
            trainer.save_model()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    for log in logs:
        length = log["completions/mean_length"]
        print(f"step {log['step']:3d}  reward {log['reward']:.3f}  mean length {length:.1f} tokens")
    return logs


if __name__ == "__main__":
    main()
