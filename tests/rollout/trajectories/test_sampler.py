"""What becomes of conversations whose tools fail, hang or say too much, or whose calls are none."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest

from rloo_fast.data.seeds import step_seed
from rloo_fast.records import Rollout, Sampling, Strand, Trajectory
from rloo_fast.rollout.stops import Stops
from rloo_fast.rollout.trajectories import Language, Limits, TrajectorySampler, trajectory_rows
from rloo_fast.rollout.trajectories.history import RewrittenContext
from rloo_fast.rollout.trajectories.sampler import RoundFailed
from rloo_fast.rollout.trajectories.template import TurnTemplate
from tests.rollout.trajectories.test_tokens import sampled
from tests.support.chats import (
    ADD,
    Adds,
    Result,
    call_text,
    chat_tokenizer,
    language_of,
    loose_ids,
    question,
)

TOKENIZER = chat_tokenizer("Qwen2.5")
END = TOKENIZER.eos_token_id
CALL = call_text("Qwen2.5", 2, 3)


def ids_of(text: str, *, ends: bool = True) -> list[int]:
    return loose_ids(TOKENIZER, text, 2) + ([END] if ends else [])


class Turns:
    """An engine whose next turn of each row is the next of its script; no log-probs."""

    def __init__(self, script: dict[int, list[list[int]]], logps: bool = True):
        self.script, self.logps = {row: [*turns] for row, turns in script.items()}, logps
        self.seeds, self.rooms, self.sizes = [], [], []

    def __call__(self, prompt_ids, sampling, seeds):
        self.seeds.append([*seeds])
        self.rooms.append([sampling.num_new(len(ids)) for ids in prompt_ids])
        self.sizes.append(len(prompt_ids))
        ids = []
        for prompt in prompt_ids:
            text = TOKENIZER.decode(prompt)
            ids.append(self.script[int(text.split("question ")[1][0])].pop(0))
        return Rollout(
            ids,
            ["stop" if row[-1:] == [END] else "length" for row in ids],
            [[-0.5] * len(row) for row in ids] if self.logps else None,
            weights_version=7,
        )


def run(turns, tools=None, *, everyone=lambda value: [value], stops=(), language=None, **limits):
    engine = turns if isinstance(turns, Turns) else Turns(turns)
    rows = sorted(engine.script)
    tools = tools or [Adds() for _ in rows]
    prompts = [question(TOKENIZER, f"question {row} ?", [ADD]) for row in rows]
    sampling = Sampling(1.0, 1.0, 0, None, 1.0, 1000, (END,), stop_strings=stops)
    sampler = TrajectorySampler(
        language or language_of(TOKENIZER),
        Limits(**{"max_tokens": 1000, **limits}),
        Stops(sampling, TOKENIZER),
        everyone,
    )
    rollout = sampler(engine, prompts, tools, sampling, [100 + row for row in rows])
    return rollout, rollout.trajectories, prompts


def test_a_tool_that_fails_tells_the_model_so_and_is_counted():
    failed = Adds(Result("{'error': 'no'}", failed=True))
    rollout, (one,), _ = run({0: [ids_of(CALL), ids_of("Sorry.")]}, [failed])
    assert (one.num_calls, one.num_failures, one.ended) == (1, 1, "answer")
    assert one.messages[1] == {"role": "tool", "name": "add", "content": "{'error': 'no'}"}
    assert rollout.finish_reasons == ["stop"]


def test_a_failure_may_end_the_trajectory():
    failed = Adds(Result("{'error': 'no'}", failed=True, ends=True))
    rollout, (one,), _ = run({0: [ids_of(CALL)]}, [failed])
    assert (one.num_turns, one.ended) == (1, "failure")
    assert [m["role"] for m in one.messages] == ["assistant", "tool"]
    assert rollout.completion_ids == [ids_of(CALL)]  # what the tool said is nobody's to read
    assert rollout.finish_reasons == ["stop"]


def test_a_trajectory_ends_when_its_time_is_up_though_its_tool_hangs():
    start = time.monotonic()
    script = {0: [ids_of(CALL)], 1: [ids_of("Five.")]}
    rollout, (one, other), _ = run(script, [Adds(Future()), Adds()], seconds=0.3)
    assert time.monotonic() - start < 5
    assert (one.ended, other.ended) == ("time", "answer")
    assert one.seconds >= 0.2
    assert rollout.finish_reasons == ["length", "stop"]
    assert rollout.completion_ids[0] == ids_of(CALL)


@pytest.mark.parametrize(
    "text",
    ["<tool_call>\n{'name': add}\n</tool_call>", "<tool_call>\n[3, 4]\n</tool_call>",
     "<tool_call>{\"name\": 3}</tool_call>", "</tool_call>", "<tool_call>"],
)  # fmt: skip
def test_a_call_that_cannot_be_read_is_an_answer(text):
    tools = Adds()
    _, (one,), _ = run({0: [ids_of("Look: " + text)]}, [tools])
    assert tools.calls == []
    assert one.ended == "answer"
    assert one.messages[0]["role"] == "assistant"
    assert "tool_calls" not in one.messages[0]
    assert one.messages[0]["content"].startswith("Look:")


def test_several_calls_of_a_turn_answer_in_their_order():
    slow, quick = Future(), Future()
    quick.set_result(Result("quick"))
    futures = [slow, quick]

    class Two(Adds):
        def start(self, name, arguments):
            return futures.pop(0)

    threading.Timer(0.2, lambda: slow.set_result(Result("slow"))).start()
    _, (one,), _ = run({0: [ids_of(CALL + "\n" + CALL), ids_of("Both.")]}, [Two()])
    assert [m["content"] for m in one.messages[1:3]] == ["slow", "quick"]
    text = TOKENIZER.decode(one.strands[0].ids)
    assert text.count("<|im_start|>user") == 2  # both in one message, as the template has it
    assert one.num_calls == 2


def test_max_tool_calling_iterations():
    rollout, (one,), _ = run({0: [ids_of(CALL)] * 5}, max_rounds=2)
    assert (one.num_turns, one.num_calls, one.ended) == (3, 2, "calls")
    assert one.messages[-1]["tool_calls"]
    assert rollout.finish_reasons == ["stop"]
    _, (one,), _ = run({0: [ids_of(CALL)] * 5}, max_rounds=0)
    assert (one.num_turns, one.ended) == (1, "calls")


def test_tokens_of_tools_take_room():
    """As in TRL: a turn has what they leave of max_completion_length."""
    engine = Turns({0: [ids_of(CALL), ids_of("It is five.")]})
    _, (whole,), prompts = run(engine)
    behind = len(whole.strands[0].ids) - len(prompts[0].ids)
    said = behind - whole.num_sampled
    first = len(ids_of(CALL))
    assert engine.rooms == [[1000], [1000 - first - said]]
    # no room for a token behind it: what the tool said is taken back
    rollout, (one,), _ = run({0: [ids_of(CALL)]}, max_tokens=first + said)
    assert (one.ended, rollout.finish_reasons) == ("length", ["length"])
    assert [m["role"] for m in one.messages] == ["assistant"]
    assert rollout.completion_ids == [ids_of(CALL)]
    # for two: an engine that says more is cut
    rollout, (one,), _ = run({0: [ids_of(CALL), ids_of("Five.")]}, max_tokens=first + said + 2)
    assert (one.ended, one.num_turns, rollout.finish_reasons) == ("length", 2, ["length"])
    assert len(rollout.completion_ids[0]) == first + said + 2
    assert one.num_sampled == first + 2 == len(rollout.logps[0])


def test_a_turn_that_was_cut_calls_nothing():
    tools = Adds()
    _, (one,), _ = run({0: [ids_of(CALL, ends=False)]}, [tools])
    assert (one.ended, tools.calls) == ("length", [])


def test_a_stop_string_ends_a_turn_and_the_template_closes_it():
    """The model did not write what ends a turn, so it is a part of what is new."""
    script = {0: [ids_of(CALL + " and more"), ids_of("Five.")]}
    _, (one,), prompts = run(script, stops=("</tool_call>",))
    (strand,) = one.strands
    text = TOKENIZER.decode(strand.ids[len(prompts[0].ids) :])
    assert "and more" not in text
    assert text.startswith(CALL + "<|im_end|>\n<|im_start|>user")
    assert strand.ids[strand.counted[-7]] != END
    turn = [strand.ids[place] for place in strand.counted]
    assert turn == ids_of(CALL, ends=False) + ids_of("Five.")


def test_each_turn_is_drawn_with_a_seed_of_its_own():
    engine = Turns({0: [ids_of(CALL), ids_of("5")], 1: [ids_of("Hm."), []]})
    run(engine)
    assert engine.seeds == [[100, 101], [step_seed(100, 1)]]


def test_versions_and_log_probs_are_of_sampled_tokens():
    rollout, (one,), _ = run({0: [ids_of(CALL), ids_of("Five.")]})
    assert rollout.weights_version == 7
    assert rollout.token_versions == [[7] * one.num_sampled]
    assert rollout.logps == [[-0.5] * one.num_sampled]
    rollout, _, _ = run(Turns({0: [ids_of(CALL), ids_of("Five.")]}, logps=False))
    assert rollout.logps is None


def together(parts):
    """Runs `parts[rank](everyone)` on a thread each, where everyone() waits for all of them."""
    barrier, values = threading.Barrier(len(parts), timeout=20), [None] * len(parts)
    results = [None] * len(parts)

    def process(rank):
        def everyone(value):
            values[rank] = value
            barrier.wait()
            found = [*values]
            barrier.wait()
            return found

        try:
            results[rank] = parts[rank](everyone)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_processes_ask_their_engines_equally_often():
    """As sharded weights and tensor-parallel engines need it; one that is done gives no prompts."""
    long, short = Turns({0: [ids_of(CALL)] * 3 + [ids_of("Done.")]}), Turns({1: [ids_of("Hm.")]})
    together([lambda each: run(long, everyone=each), lambda each: run(short, everyone=each)])
    assert long.sizes == [1, 1, 1, 1]
    assert short.sizes == [1, 0, 0, 0]


def test_what_one_process_raises_ends_the_others():
    class Broken(Turns):
        def __call__(self, prompt_ids, sampling, seeds):
            if self.sizes:
                raise RuntimeError("the engine is gone")
            return super().__call__(prompt_ids, sampling, seeds)

    broken, other = Broken({0: [ids_of(CALL)] * 2}), Turns({1: [ids_of(CALL)] * 4})
    first, second = together(
        [lambda each: run(broken, everyone=each), lambda each: run(other, everyone=each)]
    )
    assert isinstance(first, RuntimeError)
    assert isinstance(second, RoundFailed)
    assert "process 0 failed: RuntimeError: the engine is gone" in str(second)


def test_prompts_of_a_group_may_differ_from_where_an_environment_speaks():
    _, _, _, rollout, prompts = sampled("Qwen2.5")
    rows = trajectory_rows(
        rollout.trajectories, [0, 0, 0], [p.ids for p in prompts], [False, True, False]
    )
    common = rows.prompt_ids[0]
    assert rows.prompt_ids == [common] * 3
    assert TOKENIZER.decode(common).endswith("question ")
    for row, (one, prompt) in enumerate(zip(rollout.trajectories, prompts, strict=True)):
        assert common + rows.strand_ids[row][0] == one.strands[0].ids
        (counted,) = rows.counted[row]
        if row == 1:
            assert counted == []
            continue
        assert [place + len(common) for place in counted] == [*one.strands[0].counted]
        assert counted[0] + len(common) == len(prompt.ids)


def test_processes_agree_on_what_a_group_has_in_common():
    _, _, _, rollout, prompts = sampled("Qwen2.5")

    def rows_of(row):
        return lambda everyone: trajectory_rows(
            rollout.trajectories[row : row + 1], [0], [prompts[row].ids], [False], everyone
        )

    first, second = together([rows_of(0), rows_of(1)])
    assert first.prompt_ids == second.prompt_ids
    assert len(first.prompt_ids[0]) < len(prompts[0].ids)


def rows_from(group, prompts, starts, everyone=lambda value: [value]):
    return trajectory_rows(
        [Trajectory([Strand([*ids, 9], [len(ids)])], []) for ids in starts],
        [group] * len(prompts),
        prompts,
        [False] * len(prompts),
        everyone,
    )


def test_all_processes_refuse_what_one_does():
    """Those that went on would wait for the one that did not."""
    wrong = lambda everyone: rows_from(0, [[5, 6]], [[7, 6]], everyone)  # noqa: E731
    right = lambda everyone: rows_from(1, [[5, 6]], [[5, 6]], everyone)  # noqa: E731
    found = together([wrong, right])
    assert ["nothing in common" in str(one) for one in found] == [True, True]


def test_prompts_of_a_group_that_begin_with_different_tokens_share_nothing():
    prompts = [[5, 6], [5, 7], [8, 6]]
    rows = rows_from(0, prompts, prompts)
    assert rows.prompt_ids == [[5], [5], [8, 6]]
    assert rows.strand_ids == [[[6, 9]], [[7, 9]], [[9]]]
    assert rows.counted == [[[1]], [[1]], [[0]]]


def test_a_turn_that_was_cut_says_no_more_than_was_sampled():
    """Of reasoning that never ends, the token that would end the turn is not a part."""
    script = {0: [ids_of("<think>\nFour, or", ends=False)]}
    _, (one,), _ = run(script)
    assert one.messages == [{"role": "assistant", "content": "", "reasoning_content": "Four, or"}]


def test_a_template_that_changes_anything_but_turns_is_refused():
    tokenizer = chat_tokenizer("Qwen2.5")
    counting = "{{ role(m.role) }}{{ messages | length if m.role == 'user' else '' }}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ role(m.role) }}", counting)
    with pytest.raises(RewrittenContext, match="writes a part of the conversation anew"):
        run({0: [ids_of(CALL)]}, language=language_of(tokenizer))


def test_a_template_without_a_place_for_what_tools_say_is_refused():
    tokenizer = chat_tokenizer("Qwen2.5")
    only_users = "{{ m.content if m.role == 'user' }}"
    tokenizer.chat_template = "{% for m in messages %}" + only_users + "{% endfor %}"
    with pytest.raises(ValueError, match="leaves out the message of the tool"):
        TurnTemplate(tokenizer)


def test_a_tokenizer_that_says_nothing_of_calls_is_refused():
    tokenizer = chat_tokenizer("SmolLM2")
    tokenizer.response_template = None
    with pytest.raises(ValueError, match="nothing says how this model writes tool calls"):
        Language.of(tokenizer, {}, (END,))
