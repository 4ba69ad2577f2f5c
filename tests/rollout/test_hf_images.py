"""HFEngine with images: samples' log-probs are the model's own, an image is run once a group."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from rloo_fast.models.vision import ImageReader
from rloo_fast.rollout.engine import EngineError
from rloo_fast.rollout.hf import HFEngine
from tests.policy.test_image_layouts import K, alone, prompts
from tests.rollout import test_hf
from tests.support.batches import generation_batch
from tests.support.tiny import InjectedEngine
from tests.support.vision import MODELS, NUMBER, make_processor, make_vision_model

# a run's stop ids have the image's, which behind a prompt would stand for an image not there
SAMPLING = replace(test_hf.SAMPLING, stop_token_ids=(1, NUMBER["<image>"]))


def sample(engine, rows):
    engine.wake(("weights",))
    engine.load_weights(1, ())
    engine.wake(("kv_cache",))
    ids, inputs = [ids for ids, _ in rows], [more for _, more in rows]
    return engine.generate(ids, SAMPLING, list(range(len(rows))), version=1, inputs=inputs)


@pytest.mark.parametrize("family", MODELS)
def test_samples_are_drawn_from_the_model(family):
    model = make_vision_model(family)
    reader = ImageReader(make_processor(family), model)
    rows = [prompt for prompt in prompts(reader) for _ in range(K)]
    runs = []
    for shares in (True, False):
        engine = HFEngine(model, 0, autocast=nullcontext)
        engine.cache_can_be_copied = shares
        runs.append(sample(engine, rows))
        assert engine.cache_can_be_copied == shares
    assert runs[0].completion_ids == runs[1].completion_ids
    assert getattr(model.model, "rope_deltas", None) is None
    batch = generation_batch(
        [ids for ids, _ in rows], runs[0].completion_ids, inputs=[more for _, more in rows]
    )
    for run in runs:
        logps = torch.tensor([x for row in run.logps for x in row])
        assert torch.allclose(logps, alone(model, batch), atol=1e-5)


def test_rows_of_like_ids_with_other_images_are_other_prompts():
    model = make_vision_model("llava")
    reader = ImageReader(make_processor("llava"), model)
    ids, inputs = prompts(reader)[0]
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    rows = [(ids, inputs), (ids, other), (ids, inputs), (ids, other)]
    run = sample(HFEngine(model, 0, autocast=nullcontext), rows)
    batch = generation_batch([ids] * 4, run.completion_ids, inputs=[more for _, more in rows])
    logps = torch.tensor([x for row in run.logps for x in row])
    assert torch.allclose(logps, alone(model, batch), atol=1e-5)


def test_images_are_seen_once_for_all_samples_of_a_prompt(monkeypatch):
    model = make_vision_model("llava")
    reader = ImageReader(make_processor("llava"), model)
    rows = [prompts(reader)[0]] * K
    seen = []
    own = model.model.get_image_features

    def counted(pixel_values, **kwargs):
        seen.append(len(pixel_values))
        return own(pixel_values, **kwargs)

    monkeypatch.setattr(model.model, "get_image_features", counted)
    sample(HFEngine(model, 0, autocast=nullcontext), rows)
    assert seen == [1]


def test_an_engine_that_takes_no_images_says_so():
    class TextOnly(InjectedEngine):
        def _generate(self, *args):
            raise AssertionError

    with pytest.raises(EngineError, match="TextOnly takes no images"):
        sample(TextOnly(), [([5, 6], {})])
