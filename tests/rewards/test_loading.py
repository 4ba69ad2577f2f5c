"""Names of rewards, their arguments, and what may not be loaded."""

import pickle

import pytest

from rloo_fast.rewards import load_reward_functions
from rloo_fast.rewards.files import files_of
from tests.support.rewards import COMPLETIONS, IDS, PROMPTS, assert_same, returns, score


def test_function_in_a_module_and_in_a_file(tmp_path, monkeypatch):
    code = "def longer(completions, **kwargs):\n    return [len(c) for c in completions]\n"
    (tmp_path / "my_rewards_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["my_rewards_module:longer", f"{tmp_path / 'my_rewards_module.py'}:longer"]
    assert_same(score(names), [[3.0, 3.0], [5.0, 5.0], [4.0, 4.0]])


def test_functions_of_a_file_share_its_globals(tmp_path):
    file = tmp_path / "shared.py"
    file.write_text(
        "seen = []\n"
        "def first(**kwargs):\n    seen.append(7)\n    return [0.0] * 3\n"
        "def second(**kwargs):\n    return seen * 3\n"
    )
    assert_same(score([f"{file}:first", f"{file}:second"]), [[0.0, 7.0]] * 3)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("exact_mach", "Did you mean 'exact_match'"),
        ("accuracy_reward", "Did you mean 'accuracy'"),
        ("gpt2", "an existing directory with a reward model, or a hub id 'org/name'"),
        ("math.fabs", "written math:fabs"),
        ("./no/such/directory", "is not a reward"),
        ("", "'' is not a reward"),
        ("math:no_such", "no function 'no_such' there"),
        ("no_such_module_x:f", "could not be imported: ModuleNotFoundError"),
        ("no_such_file.py:f", "does not exist"),
    ],
)
def test_names_of_nothing_are_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_reward_functions(name)


def test_broken_file_is_refused_with_its_error(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match="could not be loaded: ZeroDivisionError"):
        load_reward_functions(f"{tmp_path}/broken.py:f")


def test_missing_function_lists_those_of_the_file(tmp_path):
    (tmp_path / "few.py").write_text("import math\ndef good(**kwargs): ...\nx = 1\n")
    with pytest.raises(ValueError, match=r"no function 'x' there. Its functions: good\."):
        load_reward_functions(f"{tmp_path}/few.py:x")


@pytest.mark.parametrize(
    ("value", "sentence"), [(3, "got int: 3"), ([], "At least one")], ids=["int", "empty"]
)
def test_what_is_no_reward_is_refused(value, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_reward_functions(value)


# --- arguments of rewards that are named, and what runs the model's programs

FILE = """
class Scaled:
    def __init__(self, scale=1.0):
        self.scale = scale
    def __call__(self, completions, **kwargs):
        return [self.scale * len(c) for c in completions]

def plus(completions, amount=0, *, offset=0, **kwargs):
    return [amount + offset] * len(completions)

class Runs(Scaled):
    executes_model_code = True

def runs(completions, **kwargs):
    return [0.0] * len(completions)
runs.executes_model_code = True
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "given.py").write_text(FILE)
    return str(tmp_path / "given.py")


def test_arguments_reach_functions_and_make_objects_of_classes(file):
    plus, scaled = f"{file}:plus", f"{file}:Scaled"
    kwargs = {plus: {"amount": 7, "offset": 1}, scaled: {"scale": 2}}
    rewards = load_reward_functions([plus, scaled], reward_kwargs=kwargs)
    assert rewards.names == ["plus", "Scaled"]
    assert_same(rewards(PROMPTS, COMPLETIONS, IDS, {}), [[8.0, 6.0], [8.0, 10.0], [8.0, 8.0]])


def test_a_class_without_arguments_is_made_an_object_too(file):
    assert_same(score(f"{file}:Scaled"), [[3.0], [5.0], [4.0]])


def test_what_has_arguments_can_go_to_worker_processes(file):
    names = [f"{file}:plus", f"{file}:Scaled"]
    kwargs = {names[0]: {"amount": 3}, names[1]: {"scale": 2}}
    rewards = load_reward_functions(names, reward_kwargs=kwargs, processes=1)  # pickled by then
    functions = [f.function for f in rewards.functions]
    assert list(files_of(functions).values()) == [file]
    again = pickle.loads(pickle.dumps(functions))
    assert [f(completions=["abc"]) for f in again] == [[3], [6]]


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"lenght": {}}, "reward_kwargs has 'lenght', but reward_funcs has 'length'"),
        ({"length": 200}, "dict of dicts.*'length' has 200"),
        ({"length": {"tagret": 2}}, r"takes no 'tagret'. It takes 'target', 'limit'\."),
        ({"length": {"target": 5, "limit": 5}}, "0 <= target < limit is needed, got 5 and 5"),
        ({"length": {"target": "5"}}, "'length' could not be made with reward_kwargs"),
        ({}, "missing 1 required positional argument: 'target'"),
    ],
    ids=["name", "no-dict", "argument", "range", "text", "missing"],
)
def test_wrong_arguments_are_refused_at_load(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_reward_functions(["length"], reward_kwargs=kwargs)


def test_arguments_for_objects_are_refused():
    with pytest.raises(ValueError, match=r"has no names, only objects \(use functools.partial\)"):
        load_reward_functions(returns([]), reward_kwargs={"fixed": {}})


def test_an_argument_that_is_a_column_as_well_is_refused(file):
    name = f"{file}:plus"
    with pytest.raises(ValueError, match="'plus' is given `amount` twice"):
        score(name, {"amount": [1, 2, 3]}, reward_kwargs={name: {"amount": 3}})


@pytest.mark.parametrize("name", ["Runs", "runs"])
def test_a_name_that_runs_the_models_programs_needs_the_flag(name, file):
    with pytest.raises(ValueError, match=rf"{name}' runs programs .* execute_model_code=True"):
        load_reward_functions(f"{file}:{name}")
    assert load_reward_functions(f"{file}:{name}", execute_model_code=True).names == [name]


def test_an_object_that_runs_the_models_programs_is_allowed_by_being_passed():
    function = returns([0.0] * 3)
    function.executes_model_code = True
    assert_same(score(function), [[0.0]] * 3)
