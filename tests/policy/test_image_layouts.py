"""Layouts with images: every row's log-probs are those of the row run alone by the model itself.

`python -m tests.policy.test_image_layouts` prints the table: family x layout -> largest difference.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from rloo_fast.batching.layouts import LAYOUTS
from rloo_fast.batching.micro_batches import make_micro_batch
from rloo_fast.data.images import with_images
from rloo_fast.models.vision import ImageReader
from rloo_fast.policy.forward import Policy
from rloo_fast.policy.layout_probe import choose_layout, runs_images_once
from rloo_fast.records import PER_TOKEN_INPUTS, Prompt
from tests.support.batches import generation_batch
from tests.support.vision import MODELS, make_processor, make_vision_model, picture

K = 3
TOLERANCE = 1e-5
TWO_WAY = ["gemma3"]  # an image's tokens see each other, both ways


def message_lists() -> list[tuple[list[dict], list]]:
    """(messages, their images): one image, none, and two of several sizes."""

    def chat(text, *images):
        return with_images([{"role": "user", "content": text}], list(images)), list(images)

    return [
        chat("w1 w2 w3", picture(1)),
        chat("w4"),
        chat("w5 w6", picture(2, 24), picture(3)),
    ]


def prompts(reader: ImageReader) -> list:
    return [reader.chat(messages, {}) for messages, _ in message_lists()]


def batch_of(reader: ImageReader):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 7, (3 * K,), generator=generator).tolist()
    completions = [torch.randint(6, 32, (n,), generator=generator).tolist() for n in lengths]
    rows = [prompt for prompt in prompts(reader) for _ in range(K)]
    return generation_batch(
        [ids for ids, _ in rows], completions, num_generations=K, inputs=[more for _, more in rows]
    )


def alone(model, batch) -> torch.Tensor:  # -> (N,)
    """Each row by the model's own forward, which finds the positions for itself."""
    found = []
    for ids, completion, inputs in zip(
        batch.prompt_ids, batch.completion_ids, batch.inputs, strict=True
    ):
        given = {name: value for name, value in inputs.items() if name != "position_ids"}
        for name in PER_TOKEN_INPUTS:
            if name in given:
                given[name] = torch.cat([given[name], torch.zeros(len(completion) - 1).long()])[
                    None
                ]
        line = torch.tensor([ids + completion[:-1]])
        with torch.no_grad():
            out = model(input_ids=line, attention_mask=torch.ones_like(line), **given)
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None
        logps = out.logits[0, len(ids) - 1 :].log_softmax(-1)
        found.append(logps.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


def difference(family: str, layout: str, *, images_once: bool = False) -> float:
    model = make_vision_model(family)
    batch = batch_of(ImageReader(make_processor(family), model))
    units = [list(range(start, start + K)) for start in (0, K, 2 * K)]
    micro_batch = make_micro_batch(
        batch, units, LAYOUTS[layout], device=torch.device("cpu"), pad_token_id=0,
        images_once=images_once,
    )  # fmt: skip
    with torch.no_grad():
        logps = Policy(model, temperature=1.0).logps(micro_batch).logps
    return float((logps - alone(model, batch)).abs().max())


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
@pytest.mark.parametrize("family", MODELS)
def test_rows_are_as_if_run_alone(family, layout):
    off = difference(family, layout)
    if layout != "padded" and family in TWO_WAY:
        assert off > 0.1  # which the probe must find
    else:
        assert off < TOLERANCE


@pytest.mark.parametrize("family", MODELS)
def test_the_probe_looks_at_images(family):
    model = make_vision_model(family)
    seen = Prompt("", *_trial(ImageReader(make_processor(family), model)))
    policy = Policy(model, temperature=1.0)
    layout, why = choose_layout("auto", policy, model, Accelerator(cpu=True), seen)
    assert layout == ("padded" if family in TWO_WAY else "shared_prefix"), why
    if family in TWO_WAY:
        assert "log-probs were off" in why


def _trial(reader):
    ids, inputs = reader.trial({})
    assert "pixel_values" in inputs
    return ids, {}, inputs


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", MODELS)
def test_an_image_that_is_run_once_is_seen_by_every_line(family, layout):
    if layout == "packed" and family in TWO_WAY:
        pytest.skip("not run so")
    assert difference(family, layout, images_once=True) < TOLERANCE


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "idefics3"])
def test_the_tower_runs_an_image_once_for_a_group(family, monkeypatch):
    """In every layout, and its gradients are those of a tower that runs it for each completion."""
    model = make_vision_model(family)
    batch = batch_of(ImageReader(make_processor(family), model))
    own, ran = type(model.model).get_image_features, []

    def counted(self, pixel_values, *args, **kwargs):
        ran.append(pixel_values.numel())
        return own(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "get_image_features", counted)
    sizes, gradients = [], []
    for layout, once in [("shared_prefix", False), ("padded", True), ("padded", False)]:
        ran.clear()
        micro_batch = make_micro_batch(
            batch, [[0, 1, 2], [3, 4, 5], [6, 7, 8]], LAYOUTS[layout], images_once=once,
            device=torch.device("cpu"), pad_token_id=0,
        )  # fmt: skip
        model.zero_grad()
        Policy(model, temperature=1.0).logps(micro_batch).logps.sum().backward()
        sizes.append(sum(ran))
        gradients.append({n: p.grad for n, p in model.named_parameters() if "vis" in n})
    assert sizes[0] == sizes[1] == sizes[2] / K
    assert "get_image_features" not in vars(model.model)
    for name, found in gradients[1].items():
        if found is not None:
            assert (found - gradients[2][name]).abs().max() <= 1e-5 * found.abs().max() + 1e-5


@pytest.mark.parametrize("family", MODELS)
def test_a_trial_says_whether_images_are_run_once(family):
    model = make_vision_model(family)
    seen = Prompt("", *_trial(ImageReader(make_processor(family), model)))
    policy = Policy(model, temperature=1.0)
    once, said = runs_images_once("padded", policy, model, Accelerator(cpu=True), seen)
    assert once, said
    assert runs_images_once("shared_prefix", policy, model, Accelerator(cpu=True), seen) == (
        False, "",
    )  # fmt: skip


def test_features_of_another_kind_are_not_repeated(monkeypatch):
    model = make_vision_model("llava")
    seen = Prompt("", *_trial(ImageReader(make_processor("llava"), model)))
    own = model.model.get_image_features

    def longer(*args, **kwargs):
        out = own(*args, **kwargs)
        out.pooler_output = [torch.cat([part, part]) for part in out.pooler_output]
        return out

    monkeypatch.setattr(model.model, "get_image_features", longer)
    policy = Policy(model, temperature=1.0)
    once, said = runs_images_once("padded", policy, model, Accelerator(cpu=True), seen)
    assert not once
    assert "an image is run for every completion, as a trial run failed" in said


def main() -> None:
    print(f"{'family':12}" + "".join(f"{name:>15}" for name in LAYOUTS))
    for family in MODELS:
        found = (difference(family, name) for name in LAYOUTS)
        print(f"{family:12}" + "".join(f"{off:15.1e}" for off in found), flush=True)


if __name__ == "__main__":
    main()
