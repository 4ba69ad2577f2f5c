"""A vision-language model learns to count: `python examples/count_squares.py --seed 0`.

Pillow draws one to four squares of random places and colours, and the reward is 1 for the right
number as the first word. Without --model_name_or_path the model is a tiny LLaVA with random
weights; a real one is loaded with its processor, and needs a GPU.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from typing import Any

import torch
import transformers as hf
from datasets import Dataset
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.rewards import completion_text

NUMBERS = ["1", "2", "3", "4"]
WORDS = ["<pad>", "<eos>", "<unk>", "<image>", "user", "assistant", "how", "many", "squares?"]
VOCABULARY = WORDS + NUMBERS
SIDE, CELL = 32, 8  # pixels of an image, and of a place for a square in it
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% for part in m['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def draw(count: int, rng: random.Random) -> Image.Image:
    """`count` squares, each in a cell of its own."""
    image = Image.new("RGB", (SIDE, SIDE), "black")
    pen = ImageDraw.Draw(image)
    cells = [(x, y) for x in range(0, SIDE, CELL) for y in range(0, SIDE, CELL)]
    for x, y in rng.sample(cells, count):
        color = tuple(rng.randint(128, 255) for _ in range(3))
        pen.rectangle((x + 1, y + 1, x + CELL - 2, y + CELL - 2), fill=color)
    return image


def questions(number: int, seed: int) -> Dataset:
    rng = random.Random(seed)
    rows = []
    for i in range(number):
        count = i % len(NUMBERS) + 1
        prompt = [{"role": "user", "content": "how many squares?"}]
        rows.append({"prompt": prompt, "image": draw(count, rng), "answer": str(count)})
    return Dataset.from_list(rows)


def counted(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 if the first word is the answer."""
    first = [(completion_text(c).split() or [""])[0] for c in completions]
    return [float(word == gold) for word, gold in zip(first, answer, strict=True)]


def tiny_llava(seed: int) -> tuple[Any, Any]:
    """(model, processor) with random weights: about 200,000, 16 tokens for an image."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size=size, crop_size=size), tokenizer, patch_size=CELL,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    layers = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "initializer_range": 0.1,
    }  # fmt: skip
    text = {**layers, "model_type": "llama", "vocab_size": len(VOCABULARY),
            "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
            "bos_token_id": None, "eos_token_id": 1}  # fmt: skip
    tower = {**layers, "model_type": "clip_vision_model", "image_size": SIDE, "patch_size": CELL,
             "projection_dim": 64}  # fmt: skip
    torch.manual_seed(seed)
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=text, vision_config=tower, image_token_id=WORDS.index("<image>"),
            vision_feature_layer=-1, tie_word_embeddings=False,
        )
    )  # fmt: skip
    return model, processor


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="default: a tiny model with random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=200)
    options = parser.parse_args(argv)
    model, processor = options.model_name_or_path, None
    if model is None:
        model, processor = tiny_llava(options.seed)
    with tempfile.TemporaryDirectory() as directory:
        args = RLOOConfig(
            output_dir=directory, seed=options.seed, max_steps=options.max_steps,
            num_generations=8, per_device_train_batch_size=96, max_completion_length=1,
            learning_rate=1e-3, lr_scheduler_type="linear",
            beta=0.1,  # without a KL a policy that knows no number yet settles on one of them
            gradient_checkpointing=options.model_name_or_path is not None,
            eval_strategy="steps", eval_steps=max(options.max_steps // 6, 1), eval_on_start=True,
            num_generations_eval=1, per_device_eval_batch_size=200, logging_strategy="no",
            save_strategy="no", report_to="none", bf16=options.model_name_or_path is not None,
            use_cpu=options.model_name_or_path is None,
        )  # fmt: skip
        trainer = RLOOTrainer(
            model=model, reward_funcs=counted, args=args,
            train_dataset=questions(2000, seed=1), eval_dataset=questions(200, seed=2),
            processing_class=processor,
        )  # fmt: skip
        trainer.train()
    found = {log["step"]: log["eval_reward"] for log in trainer.state.log_history
             if "eval_reward" in log}  # fmt: skip
    for step, share in found.items():
        print(f"step {step:4}: {share:.2f} of 200 held-out images counted right")
    return list(found.values())


if __name__ == "__main__":
    main()
