"""A few lives of soak.py: kills of one process or all of 1, 2 and 4, and the run that was left alone."""

import pytest
import soak
from test_faults import fork  # noqa: F401 (a fixture)


@pytest.mark.parametrize("number, world_size", [(0, 1), (1, 2), (2, 4)])
def test_a_life(number, world_size, tmp_path, fork):  # noqa: F811
    kills = soak.live(fork, tmp_path, number, seed=6, max_kills=3, world_sizes=(world_size,))
    assert kills, "another seed: this one kills nothing"
    assert {kill["world_size"] for kill in kills} == {world_size}
    assert not (tmp_path / f"life_{number}").exists()
