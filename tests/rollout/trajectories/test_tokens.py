"""Every trained token is the one that was sampled, with the log-prob that it was sampled with.

`python -m tests.rollout.trajectories.test_tokens` prints the table: per chat template and layout,
turns, strands and trained tokens, how many of these are not the sampled ids, and the largest
difference between the trainer's log-prob and the sampler's.
"""

from __future__ import annotations

import pytest
import torch

from rloo_fast.batching.layouts import LAYOUTS
from rloo_fast.policy.forward import Policy
from rloo_fast.records import Sampling
from rloo_fast.rollout.stops import Stops
from rloo_fast.rollout.trajectories.conversation import Limits
from rloo_fast.rollout.trajectories.rows import trajectory_rows
from rloo_fast.rollout.trajectories.sampler import TrajectorySampler
from tests.policy.test_forward import micro_batch
from tests.support.batches import generation_batch
from tests.support.chats import (
    TEMPLATES,
    VOCAB,
    Adds,
    ScriptedEngine,
    call_text,
    chat_tokenizer,
    generate_by,
    language_of,
    loose_ids,
    question,
)
from tests.support.tiny import make_model

FORKS = {  # strands of a trajectory of three turns
    "Qwen3, reasoning of the last turn": 3,
    "Qwen3, none asked for": 3,
    "QwQ, opened and dropped": 3,
}
MAX_TOKENS = 2000


def scripted_turns(name: str, tokenizer, row: int) -> list[list[int]]:
    """Three turns: a call, a call with spaces of its own, and the answer; in tokens that no
    tokenizer would give."""
    thought = "" if name in ("Llama 3", "SmolLM2", "Qwen3, none asked for") else "I add them.\n"
    if thought and name != "QwQ, opened and dropped":
        thought = "<think>\n" + thought
    thought += "</think>\n\n" if thought else ""
    before = "" if name == "Llama 3" else "Let me see: the number.\n"
    texts = [
        thought + before + call_text(name, row, 2),
        thought + call_text(name, row + 2, 7, odd=True),
        thought + f"It is {row + 9}.",
    ]
    end = [tokenizer.eos_token_id]
    return [loose_ids(tokenizer, text, 1 + (row + t) % 3) + end for t, text in enumerate(texts)]


def sampled(name: str, model=None, rows: int = 3, tools=None, **limits):
    """(engine, tools, turns, rollout, prompts) of scripted trajectories."""
    tokenizer = chat_tokenizer(name)
    model = model or make_model(vocab_size=VOCAB, max_position_embeddings=4096).eval()
    turns = {row: scripted_turns(name, tokenizer, row) for row in range(rows)}
    engine = ScriptedEngine(model, tokenizer, {row: [*t] for row, t in turns.items()})
    tools = tools or [Adds() for _ in range(rows)]
    prompts = [question(tokenizer, f"question {row} ?", tools[row].schemas) for row in range(rows)]
    sampling = Sampling(1.0, 1.0, 0, None, 1.0, MAX_TOKENS, (tokenizer.eos_token_id,))
    sampler = TrajectorySampler(
        language_of(tokenizer),
        Limits(**{"max_tokens": MAX_TOKENS, **limits}),
        Stops(sampling, tokenizer),
    )
    rollout = sampler(generate_by(engine), prompts, tools, sampling, [*range(rows)])
    return engine, tools, turns, rollout, prompts


def batch_of(rollout, prompts, groups=None):
    """The generation batch that trains these trajectories."""
    groups = groups or [0] * len(prompts)
    rows = trajectory_rows(
        rollout.trajectories, groups, [p.ids for p in prompts], [False] * len(prompts)
    )
    return generation_batch(
        rows.prompt_ids,
        rollout.completion_ids,
        num_generations=len(prompts),
        num_tokens=rollout.num_sampled,
        groups=groups,
        strand_ids=rows.strand_ids,
        counted=rows.counted,
        sampler_logps=torch.tensor([x for row in rollout.logps for x in row]),
    )


def compared(name: str, layout: str, model=None):
    """Of scripted trajectories: (trajectories, turns, strands, trained tokens, of these not the
    sampled ids, the largest |trainer - sampler| log-prob)."""
    model = model or make_model(vocab_size=VOCAB, max_position_embeddings=4096).eval()
    _, _, turns, rollout, prompts = sampled(name, model)
    batch = batch_of(rollout, prompts)
    made = micro_batch(layout, batch)
    drawn = [token for row in made.rows for turn in turns[row] for token in turn]
    with torch.no_grad():
        logps = Policy(model, temperature=1.0).logps(made).logps
    targets = made.targets.tolist()
    wrong = sum(a != b for a, b in zip(targets, drawn, strict=True))
    return (
        len(prompts),
        sum(one.num_turns for one in rollout.trajectories),
        sum(len(one.strands) for one in rollout.trajectories),
        len(targets),
        wrong,
        (logps - batch.sampler_logps).abs().max().item(),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_trained_token_is_the_sampled_one(name, layout):
    count, turns, strands, tokens, wrong, off = compared(name, layout)
    assert (count, turns, strands) == (3, 9, 3 * FORKS.get(name, 1))
    assert tokens > 200
    assert wrong == 0
    assert off < 1e-4


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_continues_what_its_template_writes(name):
    """The prompt of each turn is, as text, the conversation so far as the template has it."""
    engine, tools, _, rollout, prompts = sampled(name)
    tokenizer = chat_tokenizer(name)
    assert [one.calls for one in tools] == [
        [("add", {"a": row, "b": 2}), ("add", {"a": row + 2, "b": 7})] for row in range(3)
    ]
    language = language_of(tokenizer)
    for row, one in enumerate(rollout.trajectories):
        assert [m["role"] for m in one.messages] == ["assistant", "tool"] * 2 + ["assistant"]
        said = [m["content"] for m in one.messages if m["role"] == "tool"]
        assert said == [str(row + 2), str(row + 9)]
        for number in range(3):
            before = [
                language.answers.as_written(m, _said(m, name)) if m["role"] == "assistant" else m
                for m in one.messages[: 2 * number]
            ]
            wanted = language.template.render(
                [*prompts[row].text, *before], tools[row].schemas, opens_turn=True
            )
            asked = tokenizer.decode(engine.asked[number][row])
            assert "".join(asked.split()) == "".join(wanted.split())


def _said(message, name):
    """A turn's text, for templates that take it whole."""
    calls = message.get("tool_calls") or []
    thought = message.get("reasoning_content")
    text = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    text += message["content"]
    for call in calls:
        arguments = call["function"]["arguments"]
        text += call_text(name, arguments["a"], arguments["b"])
    return text


@pytest.mark.parametrize("name", FORKS)
def test_a_rewritten_history_keeps_the_sampled_tokens_that_it_still_has(name):
    _, _, turns, rollout, prompts = sampled(name)
    tokenizer = chat_tokenizer(name)
    thought_end = tokenizer.convert_tokens_to_ids("</think>")
    for row, one in enumerate(rollout.trajectories):
        first, second, third = one.strands
        assert [first.ids[place] for place in first.counted] == turns[row][0]
        assert [second.ids[place] for place in second.counted] == turns[row][1]
        assert [third.ids[place] for place in third.counted] == turns[row][2]
        spoken = turns[row][0]
        if thought_end in spoken:
            spoken = spoken[spoken.index(thought_end) + 1 :]
            while not tokenizer.decode(spoken[:1]).strip():
                spoken = spoken[1:]
        size = len(spoken)
        places = range(len(second.ids) - size)
        assert any(second.ids[p : p + size] == spoken for p in places), "not its own tokens"
        assert thought_end not in second.ids[len(prompts[row].ids) : second.counted[0] - 8]


def test_the_fork_is_at_the_token_where_the_histories_part():
    _, _, _, rollout, prompts = sampled("Qwen3, reasoning of the last turn")
    tokenizer = chat_tokenizer("Qwen2.5")
    first, second, _ = rollout.trajectories[0].strands
    common = next(i for i, (a, b) in enumerate(zip(first.ids, second.ids, strict=False)) if a != b)
    assert common == len(prompts[0].ids)
    assert tokenizer.decode(first.ids[common : common + 1]) == "<think>"
    # the opened reasoning is a part of the prompt, which the rows then share up to it
    _, _, _, rollout, prompts = sampled("QwQ, opened and dropped")
    rows = trajectory_rows(rollout.trajectories, [0, 0, 1], [p.ids for p in prompts], [False] * 3)
    assert tokenizer.decode(rows.strand_ids[2][0][:1]) == "<think>"
    assert tokenizer.decode(rows.prompt_ids[2]).endswith("<|im_start|>assistant\n")
    assert rows.prompt_ids[0] == rows.prompt_ids[1] != rows.prompt_ids[2]


def main() -> None:
    print(f"{'template':36}{'layout':>14}{'turns':>7}{'strands':>9}{'tokens':>8}{'other ids':>11}"
          f"{'max |dlogp|':>14}")  # fmt: skip
    for name in TEMPLATES:
        for layout in LAYOUTS:
            _, turns, strands, tokens, wrong, off = compared(name, layout)
            print(f"{name:36}{layout:>14}{turns:7}{strands:9}{tokens:8}{wrong:11}{off:14.1e}")


if __name__ == "__main__":
    main()
