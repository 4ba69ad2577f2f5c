"""Seeds of single draws."""

from __future__ import annotations

import subprocess
import sys

from rloo_fast.data.seeds import step_seed


def test_every_place_has_a_seed_of_its_own():
    places = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1, 0, 0)]
    seeds = {step_seed(seed, *place) for seed in range(20) for place in places}
    assert len(seeds) == 20 * len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_another_process_makes_the_same_seed():
    code = "from rloo_fast.data.seeds import step_seed; print(step_seed(42, 3, 1))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(shown.stdout) == step_seed(42, 3, 1)
