"""Signals that end a run."""

import signal
import weakref

import pytest

from fed_diffusion.engines.local import run_in_process
from fed_diffusion.engines.signals import stop_signals_interrupt
from fed_diffusion.experiment import Experiment


class Gone:
    """Something that is dropped."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_python_drops_ends_the_run_before_its_next_round(tiny, tmp_path, number):
    experiment = Experiment(tiny(rounds=5, evaluation__every=0), tmp_path / "run")

    def dropped(line):
        gone = Gone()
        here = weakref.ref(gone, lambda _: signal.raise_signal(number))
        del gone  # what the callback raises is written to the standard error and goes on
        assert here() is None

    with stop_signals_interrupt(), pytest.raises(KeyboardInterrupt):
        run_in_process(experiment, processes=1, progress=dropped)
    assert experiment.coordinator.round == 1
    assert experiment.run.status()["state"] == "stopped"
