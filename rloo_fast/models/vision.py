"""Vision-language models: their processors, and what of a prompt with images a model is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..records import PER_TOKEN_INPUTS, ImageInputs, Message
from .adapters import base_causal_lm
from .chat_templates import apply_template

if TYPE_CHECKING:
    from PIL.Image import Image

# what processors make beside token ids, as far as micro-batches know how to put it together
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes")
TEXT_INPUTS = ("input_ids", "attention_mask")


def is_vision_model(model: Any) -> bool:
    """Whether a model of transformers has an image tower beside its text."""
    return hasattr(base_causal_lm(model), "get_image_features")


def auto_class(name: str, *, with_images: bool, **kwargs: Any) -> Any:
    """The class of transformers that loads `name`: of a vision-language model whole, also for text
    alone where there is no class for that."""
    config = _config_of(name, **kwargs)
    takes_images = type(config) in AutoModelForImageTextToText._model_mapping
    takes_text = type(config) in AutoModelForCausalLM._model_mapping
    whole = takes_images and (with_images or not takes_text)
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def _config_of(name: str, **kwargs: Any) -> Any:
    """None where there is none: loading the model will say why."""
    known = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only")
    try:
        return AutoConfig.from_pretrained(name, **{k: kwargs[k] for k in known if k in kwargs})
    except Exception:
        return None


def check_takes_images(model: Any, processing_class: Any, *, images: bool, **kwargs: Any) -> None:
    """Raise ValueError, before a model is loaded, for a tokenizer or a text model and images, or a
    text model and a processor. `images`: the datasets have some. `kwargs`: of from_pretrained."""
    if isinstance(model, str):
        config = _config_of(model, **kwargs)
        takes = config is None or type(config) in AutoModelForImageTextToText._model_mapping
    else:
        takes = is_vision_model(model)
    if not takes:
        what = "the dataset has an image column" if images else "processing_class is a processor"
        named = repr(model) if isinstance(model, str) else type(base_causal_lm(model)).__name__
        raise ValueError(
            f"{what}, but the model {named} takes no images: give a vision-language model, or "
            "remove the column and pass a tokenizer."
        )
    if images and isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            "the dataset has an image column, but processing_class is a tokenizer: pass the "
            "model's processor, as AutoProcessor.from_pretrained(...), or remove the column."
        )


def find_processor(given: Any, model: Any, **kwargs: Any) -> ProcessorMixin:
    """The processor as given, or the one saved with the model. `kwargs`: of from_pretrained.

    Raises ValueError where there is none, or the model that was loaded takes no images.
    """
    check_takes_images(model, given, images=given is None)
    if given is None:
        name = getattr(model.config, "_name_or_path", "") or ""
        if not name:
            raise ValueError(
                "the model was built in memory, so that there is no processor saved with it: pass "
                "it as processing_class=..."
            )
        try:
            given = AutoProcessor.from_pretrained(name, **kwargs)
        except Exception as error:
            raise ValueError(
                f"no processor could be loaded for the model ({name!r}; "
                f"{type(error).__name__}: {error}): pass it as processing_class=..."
            ) from error
    if not isinstance(given, ProcessorMixin):
        raise ValueError(
            f"the dataset has an image column, but processing_class is {type(given).__name__}: "
            "pass the model's processor, as AutoProcessor.from_pretrained(...)."
        )
    return given


def image_token_of(config: Any) -> int | None:
    """The token in whose places a model puts what it makes of images."""
    ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((i for i in ids if isinstance(i, int)), None)


class ImageReader:
    """Prompts with images -> token ids, and what else the model's forward takes of them.

    `model`: for its image tokens and its positions; nothing of it is run.
    """

    def __init__(self, processor: ProcessorMixin, model: Any):
        self.processor: Any = processor
        base = base_causal_lm(model)
        self.kind = type(base).__name__
        image_token_id = image_token_of(base.config)
        if image_token_id is None:
            raise ValueError(
                f"the configuration of {self.kind} names no image_token_id, by which images find "
                "their places: such models are not offered."
            )
        self.image_token_id = image_token_id
        self._taken = {*inspect.signature(base.forward).parameters}
        self._rope_index: Any = getattr(getattr(base, "model", base), "get_rope_index", None)

    @property
    def has_template(self) -> bool:
        return bool(self.processor.chat_template or self.processor.tokenizer.chat_template)

    def chat(
        self, messages: Sequence[Message], kwargs: dict[str, Any]
    ) -> tuple[list[int], ImageInputs]:
        """Messages whose parts of type "image" hold their image, through the chat template."""
        kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs}
        return self._split(self._applied(messages, kwargs))

    def _applied(self, messages: Sequence[Message], kwargs: dict[str, Any]) -> Any:
        if not self.processor.chat_template:  # a processor does not look at its tokenizer's
            kwargs = {"chat_template": self.processor.tokenizer.chat_template, **kwargs}
        copied = [{**message} for message in messages]  # transformers writes into them
        return apply_template(self.processor, [copied], add_generation_prompt=True, **kwargs)

    def raw_ids(self, prompt: str | Sequence[Message], kwargs: dict[str, Any]) -> list[int]:
        """Token ids of a text, or of messages through the chat template, before the processor puts
        the tokens of images in their places."""
        tokenizer = self.processor.tokenizer
        if isinstance(prompt, str):
            return tokenizer(prompt).input_ids
        (text,) = self._applied(prompt, {"tokenize": False, **kwargs})
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return tokenizer(text, add_special_tokens=not begun).input_ids  # as in transformers

    def text(self, text: str, images: list[Image]) -> tuple[list[int], ImageInputs]:
        """A text in which the images have their tokens already. Raises ValueError for others."""
        mark = getattr(self.processor, "image_token", None)
        count = text.count(mark) if isinstance(mark, str) else 0
        if count != len(images):
            raise ValueError(
                f"it has {len(images)} images, but its text has the image token {mark!r} {count} "
                "times: write it once for each image, or make the prompt a list of messages."
            )
        encoded = self.processor(
            text=[text], images=[images] if images else None, return_tensors="pt"
        )
        return self._split(encoded)

    def in_colour(self, image: Image) -> Image:
        """In red, green and blue, as the processor would make it of another mode."""
        if image.mode == "RGB":
            return image
        convert = getattr(self.processor.image_processor, "convert_to_rgb", None)
        return image.convert("RGB") if convert is None else convert(image)

    def trial(self, kwargs: dict[str, Any]) -> tuple[list[int], ImageInputs]:
        """The same prompt each time, with an image of noise."""
        from PIL import Image

        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, (32, 48, 3), dtype=torch.uint8, generator=generator)
        image = Image.fromarray(noise.numpy())
        if not self.has_template and "chat_template" not in kwargs:
            return self.text(f"{self.processor.image_token} a", [image])
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "a"}]
        return self.chat([{"role": "user", "content": parts}], kwargs)

    def _split(self, encoded: Mapping[str, Any]) -> tuple[list[int], ImageInputs]:
        ids = encoded["input_ids"]
        others = {name: value for name, value in encoded.items() if name not in TEXT_INPUTS}
        for name in PER_TOKEN_INPUTS:  # not all models look at the types that a processor makes
            if name not in self._taken:
                others.pop(name, None)
        if foreign := sorted(others.keys() & {*IMAGE_INPUTS} - self._taken):
            raise ValueError(
                f"{type(self.processor).__name__} makes {', '.join(foreign)}, which {self.kind} "
                "does not take: pass the processor that belongs to the model."
            )
        if unknown := sorted(others.keys() - {*IMAGE_INPUTS, *PER_TOKEN_INPUTS}):
            raise ValueError(
                f"{type(self.processor).__name__} makes {', '.join(unknown)}, which micro-batches "
                "cannot put together: such models are not offered with images."
            )
        inputs: ImageInputs = {
            name: torch.as_tensor(value)[0] if name in PER_TOKEN_INPUTS else torch.as_tensor(value)
            for name, value in others.items()
        }
        if ids[0, -1] == self.image_token_id:
            raise ValueError("it ends with an image, where a text must end it: put text behind it.")
        if self._rope_index is not None:
            inputs["position_ids"] = self._positions(ids, inputs)
        return ids[0].tolist(), inputs

    def _positions(self, ids: Tensor, inputs: ImageInputs) -> Tensor:  # (1, L) -> (3, L)
        """Where a model counts its tokens in time, height and width."""
        length = ids.shape[1]
        if "pixel_values" not in inputs:
            return torch.arange(length).expand(3, length).clone()
        known = inspect.signature(self._rope_index).parameters
        given = {name: value for name, value in inputs.items() if name in known}
        given |= {name: given[name][None] for name in PER_TOKEN_INPUTS if name in given}
        positions, _ = self._rope_index(ids, **given, attention_mask=torch.ones_like(ids))
        return positions[-3:, 0].clone()
