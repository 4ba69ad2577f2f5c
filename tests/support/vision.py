"""Tiny vision-language models and their processors, built from configurations."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.smolvlm import processing_smolvlm as smolvlm
from transformers.utils.import_utils import is_torchvision_available

from tests.support.tiny import WORDS

MARKS = [
    "<image>", "<video>", "<vs>", "<ve>", "<fake_token_around_image>", "<end_of_utterance>",
    "<global-img>", *[f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)],
]  # fmt: skip
VOCABULARY = ["<pad>", "<eos>", "<unk>", "user", "assistant", "system", *WORDS, *MARKS]
NUMBER = {word: i for i, word in enumerate(VOCABULARY)}
SIZE = len(VOCABULARY)
PLACEHOLDER = {"qwen": "<vs><image><ve>", "gemma3": "<vs>"}  # in a chat; others write <image>

TEXT = {
    "vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.2,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN_IDS = {
    "image_token_id": NUMBER["<image>"], "video_token_id": NUMBER["<video>"],
    "vision_start_token_id": NUMBER["<vs>"], "vision_end_token_id": NUMBER["<ve>"],
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def square_tower(**others: Any) -> dict[str, Any]:
    """A tower of 4 x 4 patches of an image of 16 x 16."""
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4, **others,
    }  # fmt: skip


def make_qwen2_vl(**sizes: Any) -> hf.PreTrainedModel:
    text = {**TEXT, "rope_parameters": ROPE, **sizes}
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": text["hidden_size"], "num_heads": 2,
        "mlp_ratio": 2, "patch_size": 4, "initializer_range": 0.2,
    }  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS
        )
    )


def make_qwen2_5_vl(**sizes: Any) -> hf.PreTrainedModel:
    text = {**TEXT, "rope_parameters": ROPE, **sizes}
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": text["hidden_size"],
        "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "window_size": 16,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS
        )
    )


def make_qwen3_vl(**sizes: Any) -> hf.PreTrainedModel:
    rope = {**ROPE, "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope, **sizes}
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": text["hidden_size"],
        "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0], "initializer_range": 0.2,
    }  # fmt: skip
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS
        )
    )


def make_idefics2(**sizes: Any) -> hf.PreTrainedModel:
    resampler = {
        "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 2,
        "resampler_head_dim": 16, "num_key_value_heads": 1, "hidden_size": 32,
    }  # fmt: skip
    text = {**TEXT, "model_type": "mistral", "sliding_window": None, **sizes}
    return hf.Idefics2ForConditionalGeneration(
        hf.Idefics2Config(
            text_config=text, vision_config=square_tower(), image_token_id=NUMBER["<image>"],
            perceiver_config={**resampler, "hidden_size": text["hidden_size"]},
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def make_internvl(**sizes: Any) -> hf.PreTrainedModel:
    tower = {**square_tower(), "image_size": [16, 16], "patch_size": [4, 4]}
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            text_config={**TEXT, "model_type": "qwen2", **sizes}, vision_config=tower,
            image_token_id=NUMBER["<image>"], image_seq_length=4, tie_word_embeddings=False,
        )
    )  # fmt: skip


def make_idefics3(**sizes: Any) -> hf.PreTrainedModel:
    return hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(
            text_config={**TEXT, "model_type": "llama", **sizes}, vision_config=square_tower(),
            image_token_id=NUMBER["<image>"], scale_factor=2, pad_token_id=0,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def make_smolvlm(**sizes: Any) -> hf.PreTrainedModel:
    return hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(
            text_config={**TEXT, "model_type": "llama", **sizes}, vision_config=square_tower(),
            image_token_id=NUMBER["<image>"], scale_factor=2, pad_token_id=0,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def make_llava(**sizes: Any) -> hf.PreTrainedModel:
    tower = square_tower(model_type="clip_vision_model", projection_dim=32)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config={**TEXT, "model_type": "llama", **sizes}, vision_config=tower,
            image_token_id=NUMBER["<image>"], vision_feature_layer=-1,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def make_llava_next(**sizes: Any) -> hf.PreTrainedModel:
    tower = square_tower(model_type="clip_vision_model", projection_dim=32)
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            text_config={**TEXT, "model_type": "llama", **sizes}, vision_config=tower,
            image_token_id=NUMBER["<image>"], vision_feature_layer=-1,
            image_grid_pinpoints=[[16, 32], [32, 16]], tie_word_embeddings=False,
        )
    )  # fmt: skip


def make_gemma3(**sizes: Any) -> hf.PreTrainedModel:
    text = {**TEXT, "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8, **sizes}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=text, vision_config=square_tower(), mm_tokens_per_image=4,
            image_token_id=NUMBER["<image>"], boi_token_id=NUMBER["<vs>"],
            eoi_token_id=NUMBER["<ve>"], initializer_range=0.2, tie_word_embeddings=False,
        )
    )  # fmt: skip


MODELS: dict[str, Callable[..., Any]] = {
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "idefics2": make_idefics2,
    "idefics3": make_idefics3,
    "smolvlm": make_smolvlm,
    "llava": make_llava,
    "llava_next": make_llava_next,
    "internvl": make_internvl,
    "gemma3": make_gemma3,
}


def make_vision_model(family: str, seed: int = 0, *, wide: bool = False) -> Any:
    """A random model of a family over VOCABULARY, in float32; `wide`: with heads of 32 numbers,
    which vLLM's attention on a CPU asks for."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 128, "head_dim": 32} if wide else {}
    if wide and family.startswith("qwen"):
        rope = {**ROPE, "mrope_section": [4, 4, 8]}
        sizes["rope_parameters"] = rope | ({"mrope_interleaved": True} if "3" in family else {})
    model = MODELS[family](**sizes)
    with torch.no_grad():  # towers that start at 0.02 would hardly be seen in the logits
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.std() < 0.1 and "lm_head" not in name:
                parameter.normal_(0, 0.15)
    return model.eval()


def chat_template(placeholder: str) -> str:
    return (
        "{% for m in messages %}{{ m['role'] + ' ' }}"
        "{% if m['content'] is string %}{{ m['content'] + ' ' }}{% else %}"
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}"
        f"{placeholder} "
        "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
    )


def make_vision_tokenizer() -> Any:
    core = Tokenizer(models.WordLevel(NUMBER, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, padding_side="left", pad_token="<pad>", eos_token="<eos>",
        unk_token="<unk>", additional_special_tokens=MARKS,
        extra_special_tokens={"image_token": "<image>", "boi_token": "<vs>", "eoi_token": "<ve>",
                              "video_token": "<video>", "context_image_token": "<image>",
                              "start_image_token": "<vs>", "end_image_token": "<ve>",
                              "image_boundary_token": "<fake_token_around_image>"},
    )  # fmt: skip


def _without_videos(processor: Any) -> Any:
    """The class for images alone: its videos would need torchvision."""

    def checked(self: Any, name: str, argument: Any) -> Any:
        if argument is not None:
            return processor.check_argument_for_proper_class(self, name, argument)

    return type(processor.__name__, (processor,), {"check_argument_for_proper_class": checked})


def make_processor(family: str) -> Any:
    """The processor of `make_vision_model(family)`: Pillow and tokenizers alone."""
    kind = "qwen" if family.startswith("qwen") else family
    tokenizer = make_vision_tokenizer()
    template = chat_template(PLACEHOLDER.get(kind, "<image>"))
    square = {"height": 16, "width": 16}
    if kind == "qwen":
        images = hf.Qwen2VLImageProcessorPil(
            patch_size=4, temporal_patch_size=2, merge_size=2,
            size={"shortest_edge": 64, "longest_edge": 1024},
        )  # fmt: skip
        name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
        processor = getattr(hf, f"{name}Processor")
        if is_torchvision_available():
            video = hf.Qwen3VLVideoProcessor if "3" in name else hf.Qwen2VLVideoProcessor
            return processor(images, tokenizer, video(), chat_template=template)
        return _without_videos(processor)(images, tokenizer, chat_template=template)
    if kind == "idefics2":
        images = hf.Idefics2ImageProcessorPil(
            size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False
        )
        return hf.Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    if kind == "internvl":
        images = hf.GotOcr2ImageProcessorPil(size=square, min_patches=1, max_patches=2)
        options = {"image_seq_length": 4, "chat_template": template}
        if is_torchvision_available():
            return hf.InternVLProcessor(images, tokenizer, hf.InternVLVideoProcessor(), **options)
        return _without_videos(hf.InternVLProcessor)(images, tokenizer, **options)
    if kind == "smolvlm":
        smolvlm.num2words = smolvlm.num2words or str  # it writes the numbers of videos alone
        images = hf.SmolVLMImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        )
        if is_torchvision_available():
            video = hf.SmolVLMVideoProcessor()
            return hf.SmolVLMProcessor(
                images, tokenizer, video, image_seq_len=4, chat_template=template
            )
        processor = _without_videos(hf.SmolVLMProcessor)
        made = processor(images, tokenizer, None, image_seq_len=4, chat_template=template)
        made.video_processor = SimpleNamespace(num_frames=1, fps=1)  # are asked for
        return made
    if kind == "idefics3":
        images = hf.Idefics3ImageProcessorPil(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        )
        return hf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    if kind == "llava":
        images = hf.CLIPImageProcessorPil(size=square, crop_size=square)
        return hf.LlavaProcessor(
            images, tokenizer, patch_size=4, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=template,
        )  # fmt: skip
    if kind == "llava_next":
        images = hf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size=square, image_grid_pinpoints=[[16, 32], [32, 16]]
        )
        return hf.LlavaNextProcessor(
            images, tokenizer, patch_size=4, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=template,
        )  # fmt: skip
    assert kind == "gemma3", family
    images = hf.Gemma3ImageProcessorPil(size=square)
    return hf.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)


def picture(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    """Coloured rectangles, another picture for each seed."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    image = Image.new("RGB", (width, height), (below(256), below(256), below(256)))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = below(width - 4), below(height - 4)
        draw.rectangle((x, y, x + 4, y + 4), fill=(below(256), below(256), below(256)))
    return image
