"""torch_compile=True: the backbone of the update is compiled for a few sizes, and not again."""

from __future__ import annotations

import pytest
import torch

from tests.step.test_update import assert_same_gradient, train
from tests.support.tiny import make_model

RAGGED = {"gradient_accumulation_steps": 3, "max_steps": 6, "max_tokens_per_micro_batch": 256}


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch_compile_backend="aot_eager" is given."""
    torch._dynamo.reset()
    compile_graph, seen = torch._dynamo.lookup_backend("aot_eager"), []  # pyright: ignore

    def counted(graph, inputs, **kwargs):
        seen.append(graph)
        return compile_graph(graph, inputs, **kwargs)

    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "aot_eager", counted)
    yield seen
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_compilation_after_the_first_steps(layout, checkpointing, graphs, tmp_path):
    """Every step has other lengths; the number of compilations stays as it is after the first."""
    after = []

    def note(trainer):
        from transformers import TrainerCallback

        class Note(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                after.append(len(graphs))

        trainer.add_callback(Note())

    fields = {**RAGGED, "layout": layout, "gradient_checkpointing": checkpointing}
    compiled = train(
        tmp_path, before=note, torch_compile=True, torch_compile_backend="aot_eager", **fields
    )
    assert after[0] > 0
    assert after[-1] == after[1]
    plain = train(tmp_path, **fields)
    assert_same_gradient(compiled.gradient, plain.gradient)
    assert_same_gradient(compiled.model.state_dict(), plain.model.state_dict())
    lengths = {log["update/tokens_run"] for log in plain.logs}
    sizes = {log["update/tokens_run"] for log in compiled.logs}
    assert len(lengths) > len(sizes)


@pytest.mark.slow
def test_inductor_with_a_mode_trains_alike(tmp_path):
    small = {"num_hidden_layers": 1}
    compiled = train(tmp_path, model=make_model(**small), beta=0.0, torch_compile_mode="default")
    assert compiled.args.torch_compile
    assert compiled.args.torch_compile_backend == "inductor"
    plain = train(tmp_path, model=make_model(**small), beta=0.0)
    assert_same_gradient(compiled.gradient, plain.gradient)


def test_generation_is_not_compiled(graphs, tmp_path):
    """Its shapes change token by token."""
    from rloo_fast.rollout import HFEngine

    def engine(_):
        return HFEngine(model, 0, autocast=torch.no_grad)

    model = make_model()
    train(tmp_path, model=model, engine=engine, torch_compile_backend="aot_eager", beta=0.0)
    assert len(graphs) <= 2
