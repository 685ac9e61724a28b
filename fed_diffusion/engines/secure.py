"""Secure aggregation in process: every client's half of the protocol, around what trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from fed_diffusion.build import Setup
from fed_diffusion.engines.pool import Runner
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.secure import messages as m
from fed_diffusion.secure.member import Members
from fed_diffusion.secure.messages import Stage


class SecureRunner:
    """A runner whose tasks are those of the protocol; it plays all clients.

    Nothing is hidden from a server in the same process: this is for trying out, and for tests.
    """

    def __init__(self, setup: Setup, run: Runner):
        self._run = run
        self._members = Members.of(setup)
        self._memory: dict[int, bytes] = {}

    def __call__(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Update | Exception]]:
        for stage, group in itertools.groupby(tasks, m.stage_of):
            if stage == Stage.VECTORS:
                yield from self._vectors(group)
                continue
            for task in group:
                yield task, self._answer(task)

    def _vectors(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Update | Exception]]:
        whole: dict[int, Task] = {}

        def plain() -> Iterator[Task]:
            for task in tasks:
                whole[task.client] = task
                yield m.plain(task)

        for trained, outcome in self._run(plain()):
            task = whole.pop(trained.client)
            yield task, self._answer(task, outcome) if isinstance(outcome, Update) else outcome

    def _answer(self, task: Task, trained: Update | None = None) -> Update | Exception:
        memory = self._memory.get(task.client)
        try:
            if trained is None:
                answer, memory = self._members.answer(task, memory)
            else:
                answer, memory = self._members.mask(task, trained, memory)
        except Exception as error:  # a client that fails costs its own update
            return error
        self._memory[task.client] = memory
        return answer
