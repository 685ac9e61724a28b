"""From resources to a keep ratio."""

import resource
import subprocess
import sys

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_diffusion.build import Setup
from fed_diffusion.client.budget import demand, sub_network
from fed_diffusion.config import load_config
from fed_diffusion.masks.budget import (
    MARGIN,
    TRAINING_SHARE,
    Budget,
    BudgetError,
    Demand,
    Probe,
    choose,
    memory_allowed,
)

LADDER = (1.0, 0.75, 0.5, 0.25, 0.125)


def linear(memory=(50.0, 2.0), seconds=(0.1, 0.01)):
    """A machine on which the linear model is exact."""
    demands = {keep: Demand(400 * keep, 600 * keep, 1000 * keep) for keep in LADDER}
    takes = {
        keep: Probe(memory[0] + memory[1] * d.memory, seconds[0] + seconds[1] * d.work)
        for keep, d in demands.items()
    }
    return demands, takes


@given(cap=st.floats(300, 3000), deadline=st.floats(5, 200), steps=st.integers(1, 10))
def test_the_largest_ratio_that_fits_is_taken(cap, deadline, steps):
    demands, takes = linear()
    probes = {keep: takes[keep] for keep in (0.125, 0.25)}
    fits = [
        keep
        for keep in LADDER
        if MARGIN * takes[keep].memory <= cap
        and MARGIN * steps * takes[keep].seconds <= TRAINING_SHARE * deadline
    ]
    if not fits:
        with pytest.raises(BudgetError, match=r"keep = 0\.125"):
            choose(demands, probes, cap, steps, deadline)
        return
    budget = choose(demands, probes, cap, steps, deadline)
    assert budget.keep == max(fits)
    assert budget.memory == pytest.approx(MARGIN * takes[budget.keep].memory)
    assert budget.seconds == pytest.approx(MARGIN * steps * takes[budget.keep].seconds)
    assert (budget.limit == "none") == (budget.keep == 1.0)


def test_it_says_what_stood_in_the_way_of_more():
    demands, takes = linear()
    probes = {keep: takes[keep] for keep in (0.125, 0.25)}
    assert choose(demands, probes, 1e9, 1, 1e9).limit == "none"
    assert choose(demands, probes, 1200, 1, 1e9).limit == "memory"
    assert choose(demands, probes, 1e9, 1, 8).limit == "time"
    assert choose(demands, probes, 1200, 1, 6).limit in ("memory", "time", "memory and time")
    numbers = choose(demands, probes, 1200, 1, 1e9).to_metrics()
    assert numbers["keep"] < 1
    assert numbers["budget.limit"] == 1


def test_a_probe_of_one_size_is_taken_as_proportional():
    demands, takes = linear(memory=(0.0, 2.0), seconds=(0.0, 0.01))
    budget = choose(demands, {0.125: takes[0.125]}, 1e9, 1, 1e9)
    assert budget == Budget(1.0, "none", *(pytest.approx(v) for v in (2300.0, 1e9)), 11.5, 8e8)


def test_the_demand_is_what_the_shapes_say():
    config = load_config(
        "digits", {"pruning.kind": "channels", "local.batch": 4, "local.state": "fresh"}
    )
    setup = Setup.of(config)
    whole, layout = setup.skeleton, setup.layout
    needs = {keep: demand(setup, sub_network(whole, layout, keep, "meta")) for keep in (1.0, 0.5)}
    assert needs[1.0].parameters == 20 * layout.parameters
    assert needs[0.5].parameters == 20 * layout.kept(layout.counts(0.5))
    assert needs[0.5].activations < needs[1.0].activations
    doubled = config.model_copy(update={"local": config.local.model_copy(update={"batch": 8})})
    twice = demand(Setup.of(doubled), sub_network(whole, layout, 1.0, "meta"))
    assert twice.work == pytest.approx(2 * needs[1.0].work, rel=0.01)
    assert twice.activations == pytest.approx(2 * needs[1.0].activations, rel=0.05)


def test_a_stated_cap_is_on_the_resident_memory():
    used = psutil.Process().memory_info().rss
    assert memory_allowed((used + 50e6) / 1e6) == pytest.approx(50e6, abs=5e6)
    assert memory_allowed(1.0) == 0.0


def test_the_machines_free_memory_is_the_most():
    assert memory_allowed() <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory on Linux")
def test_a_limit_on_the_process_is_seen():
    script = (
        "from fed_diffusion.masks.budget import memory_allowed; import resource, psutil;"
        "data = psutil.Process().memory_info().data;"
        "resource.setrlimit(resource.RLIMIT_DATA, (data + 200_000_000,) * 2);"
        "print(memory_allowed())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 100e6 < float(done.stdout) <= 200e6
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
