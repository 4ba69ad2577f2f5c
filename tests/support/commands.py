"""`rloo-fast train` in tests: the shortest command, a trainer that only records, a tiny model."""

from __future__ import annotations

from types import SimpleNamespace

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rloo_fast import cli
from rloo_fast.cli.arguments import TrainArguments, build, gather
from rloo_fast.cli.options import options_of
from rloo_fast.config.rloo_config import RLOOConfig

OPTIONS = options_of(TrainArguments, RLOOConfig)
THREE = ["--model_name_or_path", "model", "--dataset_name", "p.jsonl", "--reward_funcs", "r.py:f"]


class FakeTrainer:
    """Records how it was made and called; stands in where no model is to be loaded."""

    made: list[FakeTrainer]
    failed_step: int | None = None  # of the last save

    def __init__(self, **arguments):
        self.arguments, self.calls = arguments, {}
        log = [{"reward": 0.25}, {"reward": 0.5, "throughput/completion_tokens_per_s": 1234.4}]
        self.state = SimpleNamespace(global_step=7, log_history=[*log, {"train_loss": 0.0}])
        self.accelerator = SimpleNamespace(end_training=lambda: None)
        self.checkpoints = SimpleNamespace(failed_step=self.failed_step)
        self.made.append(self)

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.__setitem__(name, (args, kwargs))


def parsed(*argv: str) -> tuple[TrainArguments, RLOOConfig]:
    return build(gather([*THREE, *argv], OPTIONS))


def recipe(folder, text: str) -> list[str]:
    (folder / "recipe.yaml").write_text(text)
    return ["--config", "recipe.yaml"]


def refusal(capsys, *argv: str) -> str:
    """The one line that `rloo-fast train` ends with for wrong arguments."""
    capsys.readouterr()
    assert cli.main(["train", *argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("rloo-fast: error: ")


def tiny_llama(path) -> str:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "vocab_size": 32, "pad_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(path)
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)
    return str(path)
