"""Runs in one process that lose clients at a stage of a round, and how two runs compare."""

import torch

from fed_diffusion.engines.local import Exchange
from fed_diffusion.engines.pool import task_runner
from fed_diffusion.engines.secure import SecureRunner
from fed_diffusion.experiment import Experiment
from fed_diffusion.secure import messages as m

FAST = {"rounds": 1, "local__steps": 1, "evaluation__every": 0, "evaluation__grid": 1}


def run(config, path, lost=None, plain_without=(), said=None):
    """An experiment that loses clients before their answer of a stage; it was closed in order.

    `plain_without` names clients that are lost where nothing is secret, or round -> such clients.
    `said` is how many images each client's node named when it joined.
    """
    experiment = Experiment(config, path)
    experiment.coordinator.participation.images |= said or {}

    class Losing(SecureRunner):
        def _answer(self, task, trained=None):
            if lost and lost.get(task.client) == m.stage_of(task):
                return OSError("its node is gone")
            return super()._answer(task, trained)

    rounds = range(1, config.rounds + 1)
    by_round = isinstance(plain_without, dict)
    gone = plain_without if by_round else dict.fromkeys(rounds, plain_without)
    with task_runner(config, experiment.dataset, 1) as runner:

        def without(tasks):
            for task in tasks:
                if task.client in gone.get(task.round, ()):
                    yield task, OSError("its node is gone")
                else:
                    yield from runner(iter([task]))

        answers = Losing(experiment.setup, runner) if config.secure.aggregation else without
        experiment.train(Exchange(experiment, answers))
    return experiment


def same(one, other):
    groups = one.coordinator.tensors(), other.coordinator.tensors()
    return all(
        torch.equal(value, groups[1][group][name])
        for group, values in groups[0].items()
        for name, value in values.items()
    )
