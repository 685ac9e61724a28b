"""A client's answer to any task of a run that aggregates securely."""

from __future__ import annotations

from fed_diffusion.client.worker import Worker
from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.secure import messages as m
from fed_diffusion.secure.member import Members
from fed_diffusion.secure.messages import Stage


def answer(worker: Worker, task: Task, memory: bytes | None) -> tuple[Update, bytes]:
    """Return the answer to a task of any exchange, and what its client is to remember then.

    Raises
    ------
    UpdateError, PlanError
        The task asks for an update without a mask, or does not go with what was agreed on.
    """
    stage = m.stage_of(task)
    if stage is None:
        raise UpdateError(
            "the run has secure.aggregation = true, and this task asks for an update that nothing "
            "hides"
        )
    members = Members.of(worker.setup)
    if stage == Stage.VECTORS:
        return members.mask(task, worker.run(m.plain(task)), memory)
    return members.answer(task, memory)
