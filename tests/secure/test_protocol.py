"""The whole protocol between both halves, on made-up updates: exact sums, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_diffusion.protocol.errors import UpdateError
from fed_diffusion.secure import member
from fed_diffusion.secure import messages as m
from fed_diffusion.secure.messages import Stage
from fed_diffusion.secure.opening import Opening, Unopened
from fed_diffusion.secure.plan import PlanError
from tests.secure.federation import Federation
from tests.secure.test_keys import UNIFORM, chi_squared

STAGES = st.sampled_from([None, *Stage])


@settings(max_examples=25)
@given(
    st.lists(STAGES, min_size=3, max_size=7),
    st.sampled_from(["full", "random", "topk", "balanced"]),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_whoever_is_lost_at_whichever_stage_the_sum_of_the_others_is_exact(
    fates, kind, least, seed
):
    clients = len(fates)
    keeps = [1.0 if kind == "full" or c % 3 == 0 else 0.4 + 0.1 * (c % 2) for c in range(clients)]
    run = Federation(
        clients, keeps=keeps, seed=seed, **{"pruning.kind": kind, "secure.least": least}
    )
    lost = {client: fate for client, fate in enumerate(fates) if fate}
    there = [c for c in range(clients) if lost.get(c) not in (Stage.KEYS, Stage.SHARES)]
    left = [c for c in there if lost.get(c) != Stage.VECTORS]
    silent = [c for c in range(clients) if lost.get(c) in (Stage.KEYS,)]
    holders = clients - len(silent)
    answering = [c for c in left if lost.get(c) != Stage.OPEN]
    try:
        gathering = run.attempt(lost)
        mean, withheld = run.opened(gathering)
    except (Unopened, PlanError):
        assert len(left) < least or len(answering) <= holders / 2
        return
    assert len(left) >= least
    assert len(answering) > holders / 2
    expected = run.plain(left)
    among, survivors = run.kept(there), run.kept(left)
    hidden, gone = 0, len(there) - len(left)
    same = len({str(run.masks[c]) for c in there}) == 1
    for name, value in mean.result().items():
        cover = torch.zeros(value.shape, dtype=torch.bool)
        if least > 1:
            cover = among[name] < least + (0 if same and kind == "full" else gone)
        shown = torch.where(cover, run.theta[name], expected.result()[name])
        assert torch.equal(value, shown)
        assert (survivors[name][~cover & (survivors[name] > 0)] >= least).all()
        hidden += int((cover & (survivors[name] > 0)).sum())
    assert withheld == hidden
    if not hidden:
        assert mean.coverage.trainers() == expected.coverage.trainers()


def vector_of(seen, client):
    """What a server has received as a client's vector."""
    (found,) = [
        update for update in seen if m.stage_of(update) == Stage.VECTORS and update.client == client
    ]
    return m.part_of(found, m.VECTOR)


def test_a_masked_vector_is_uniform_and_shares_nothing_with_another_of_the_same_update():
    run, seen, means = Federation(4, sizes=((300, 40),)), [], []
    for _ in range(2):
        gathering = run.attempt()
        seen.append(vector_of(run.seen, 1))
        means.append(run.opened(gathering)[0].result()["t0"])
    words = [np.frombuffer(vector, np.uint64) for vector in seen]
    assert all(chi_squared(vector) < UNIFORM for vector in seen)
    assert chi_squared((words[0] - words[1]).tobytes()) < UNIFORM
    # the update itself is nothing like it, and the result is the same
    bare = np.frombuffer(run.updates[1].payload.arrays["t0"].data, np.float32)
    assert chi_squared((bare.astype(float) * 2**40).astype(np.int64).tobytes()) > 10 * UNIFORM
    assert torch.equal(means[0], means[1])


def test_the_sum_without_its_last_missing_share_is_still_uniform():
    run = Federation(5, sizes=((300, 40),))
    gathering = run.attempt(lost=dict.fromkeys((0, 1, 2), Stage.OPEN))
    with pytest.raises(Unopened, match="3 shares of client 0's secrets are needed"):
        run.opened(gathering)
    assert chi_squared(gathering._sums["t0", 0].numpy().tobytes()) < UNIFORM


def test_a_coordinate_of_too_few_stays_uniform_at_the_server_after_all_is_opened(monkeypatch):
    run = Federation(6, sizes=((300, 40),), keeps=[0.5] * 6)
    gathering, before = run.attempt(lost={5: Stage.VECTORS}), {}
    unmask = Opening.unmask

    def look(self, client, seed, pairs):
        masks = unmask(self, client, seed, pairs)
        before.update({word[0]: sums.clone() for word, sums in self.sums.items()})
        return masks

    monkeypatch.setattr(Opening, "unmask", look)
    mean, withheld = run.opened(gathering)
    among, survivors = run.kept(range(6))["t0"], run.kept(range(5))["t0"]
    sent = among >= 3
    hidden = sent & (among < 4) & (survivors > 0)
    assert int(hidden.sum()) > 2000
    assert withheld == int(((among < 4) & (survivors > 0)).sum())
    assert chi_squared(before["t0"][hidden].numpy().tobytes()) < UNIFORM
    assert not before["t0"][~sent].any()  # these were never sent
    assert torch.equal(mean.result()["t0"][hidden], run.theta["t0"][hidden])


def spoil(client, stage, part, spoiled):
    """An answer of one client in which one part is another one."""

    def change(update):
        if update.client == client and m.stage_of(update) == stage:
            array = update.payload.arrays[m.PREFIX + part]
            update.payload.arrays[m.PREFIX + part] = type(array)(
                array.dtype, array.shape, spoiled(array.data)
            )
        return update

    return change


def test_a_holder_that_gives_wrong_shares_is_named_and_the_sum_is_opened_all_the_same():
    run = Federation(5)
    gathering = run.attempt(change=spoil(3, Stage.OPEN, m.OPENED, lambda data: bytes(len(data))))
    mean, _ = run.opened(gathering)
    assert torch.equal(mean.result()["t0"], run.plain(range(5)).result()["t0"])
    (fault,) = gathering.faults
    assert (fault.client, fault.surely) == (3, True)


def test_a_holder_that_gives_a_wrong_share_where_every_one_is_needed_is_named():
    run = Federation(4)
    wrong = spoil(3, Stage.OPEN, m.OPENED, lambda data: bytes(len(data)))
    gathering = run.attempt(lost={0: Stage.OPEN}, change=wrong)
    with pytest.raises(Unopened, match="2 of them as they were made"):
        run.opened(gathering)
    assert [(fault.client, fault.surely) for fault in gathering.faults] == [(3, True)]


@pytest.mark.parametrize("part", [m.SEALED_SHARES, m.HASHES])
def test_a_client_whose_shares_nobody_can_use_is_named_and_there_is_no_sum(part):
    run = Federation(5)
    gathering = run.attempt(change=spoil(2, Stage.SHARES, part, lambda data: bytes(len(data))))
    with pytest.raises(Unopened, match="client 2's secrets"):
        run.opened(gathering)
    assert [(fault.client, fault.surely) for fault in gathering.faults] == [(2, True)]


def test_a_client_whose_shares_are_of_no_secret_is_named_and_there_is_no_sum(monkeypatch):
    run = Federation(5)
    answer = run.members.answer

    def scattered(secret, shares, needed):
        return [at.to_bytes(33) for at in range(shares)][::-1]  # on no line through the secret

    def spoiled(task, memory):
        with monkeypatch.context() as patch:
            if task.client == 2:
                patch.setattr(member, "split", scattered)
            return answer(task, memory)

    run.members.answer = spoiled
    gathering = run.attempt()
    with pytest.raises(Unopened, match="client 2's secrets"):
        run.opened(gathering)
    assert [(fault.client, fault.surely) for fault in gathering.faults] == [(2, True)]


def test_of_two_that_say_the_opposite_both_are_named_and_neither_is_found_guilty():
    run = Federation(3)
    complaint = spoil(1, Stage.VECTORS, m.COMPLAINTS, lambda data: m.client_list([0]))
    gathering = run.attempt(lost={2: Stage.OPEN}, change=lambda update: late(complaint(update)))
    with pytest.raises(Unopened, match="client 0's secrets"):
        run.opened(gathering)
    assert [(fault.client, fault.surely) for fault in gathering.faults] == [(0, False), (1, False)]


def late(update):
    """Client 1 gives no share of client 0, as one that could not open it."""
    if update.client == 1 and m.stage_of(update) == Stage.OPEN:
        array = update.payload.arrays[m.PREFIX + m.OPENED]
        changed = bytes(33) + array.data[33:]
        update.payload.arrays[m.PREFIX + m.OPENED] = replace(array, data=changed)
    return update


def test_a_vector_of_another_length_is_refused():
    run = Federation(4)
    with pytest.raises(UpdateError, match=r"its vector has \d+ bytes, and its mask implies \d+"):
        run.attempt(change=spoil(1, Stage.VECTORS, m.VECTOR, lambda data: data[:-8]))


def test_a_server_that_tells_one_client_another_plan_is_found_out_before_any_vector():
    run = Federation(4)
    gathering, memory = run.gathering(), {}

    def ask(stage, client, parts, take):
        task = m.task(stage, 1, client, parts)
        answer, memory[client] = run.members.answer(task, memory.get(client))
        take(answer)

    for client in range(4):
        ask(Stage.KEYS, client, {}, gathering.take_keys)
    gathering.agree()
    honest = gathering.plan
    for client in range(4):
        plan = replace(honest, workers=9) if client == 2 else honest
        ask(Stage.SHARES, client, {m.PLAN: plan.to_json()}, gathering.take_shares)
    gathering.meet()
    for client in range(4):
        parts = gathering.vector_parts(client)
        task = m.task(Stage.VECTORS, 1, client, parts, run.task_payload(client))
        answer, after = run.members.mask(task, run.updates[client], memory[client])
        assert b"seal" not in after  # nothing of the attempt can be opened any more
        with pytest.raises(UpdateError, match="after those of 1"):
            run.members.answer(m.task(Stage.KEYS, 1, client, {}), after)
        assert m.PREFIX + m.VECTOR not in answer.payload.arrays
        with pytest.raises(UpdateError, match="another plan of the round"):
            gathering.take_vector(answer, 1, run.masks[client])
    gathering.name_odd()
    named = [(fault.client, fault.surely) for fault in gathering.faults]
    assert (2, True) in named
    assert all(not surely for client, surely in named if client != 2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"least": 1}, "another secure.least"),
        ({"threshold": 0.9}, "or secure.threshold"),
        ({"degree": 2}, "2 neighbours for each, and 4 are due"),
        ({"round": 2}, "another round"),
    ],
)
def test_a_plan_that_is_not_the_runs_is_refused(change, why):
    run = Federation(5, keeps=[0.5] * 5)
    gathering, memory = run.gathering(), {}
    for client in range(5):
        answer, memory[client] = run.members.answer(m.task(Stage.KEYS, 1, client, {}), None)
        gathering.take_keys(answer)
    gathering.agree()
    text = replace(gathering.plan, **change).to_json()
    with pytest.raises(PlanError, match=why):
        run.members.answer(m.task(Stage.SHARES, 1, 0, {m.PLAN: text}), memory[0])
    with pytest.raises(PlanError, match="cannot be read"):
        run.members.answer(m.task(Stage.SHARES, 1, 0, {m.PLAN: b"[1]"}), memory[0])


def test_no_client_sends_a_vector_that_fewer_than_least_would_hide():
    run = Federation(4)
    gathering, memory = run.gathering(), {}
    for stage, parts, take in (
        (Stage.KEYS, lambda client: {}, gathering.take_keys),
        (Stage.SHARES, gathering.share_parts, gathering.take_shares),
    ):
        for client in range(4):
            task = m.task(stage, 1, client, parts(client))
            answer, memory[client] = run.members.answer(task, memory.get(client))
            take(answer)
        if stage == Stage.KEYS:
            gathering.agree()
    gathering.meet()
    alone = gathering.vector_parts(0) | {m.HERE: m.client_list([0, 1])}
    alone[m.SEALED_SHARES] = alone[m.SEALED_SHARES][: m.sealed_size(gathering.plan)]
    alone[m.HASHES] = alone[m.HASHES][: 32 * gathering.plan.secrets]
    task = m.task(Stage.VECTORS, 1, 0, alone, run.task_payload(0))
    with pytest.raises(PlanError, match=r"2 clients share masks, and .* secure\.least = 3"):
        run.members.mask(task, run.updates[0], memory[0])


def test_no_client_opens_a_sum_of_fewer_than_least_or_anything_twice():
    run = Federation(5)
    kept, answer = {}, run.members.answer

    def keep(task, memory):
        if m.stage_of(task) == Stage.OPEN:
            kept[task.client] = memory
        return answer(task, memory)

    run.members.answer = keep
    run.attempt()
    two = m.task(Stage.OPEN, 1, 0, {m.LEFT: m.client_list([0, 1])})
    with pytest.raises(PlanError, match=r"fewer than secure\.least = 3"):
        answer(two, kept[0])
    _, after = answer(m.task(Stage.OPEN, 1, 0, {m.LEFT: m.client_list([0, 1, 2])}), kept[0])
    with pytest.raises(UpdateError, match="knows nothing"):
        answer(two, after)


def test_an_attempt_that_was_opened_neither_begins_nor_goes_on_again():
    """Else a client would send a second vector, of which no account of privacy knows."""
    run, told, left = Federation(3), [], {}
    answer, mask = run.members.answer, run.members.mask

    def keep(task, *rest):
        told.append(task)
        said, left[task.client] = whole(task)(task, *rest)
        return said, left[task.client]

    def whole(task):
        return mask if m.stage_of(task) == Stage.VECTORS else answer

    run.members.answer = run.members.mask = keep
    run.attempt()
    keys = m.task(Stage.KEYS, 1, 0, {}, attempt=0)
    for late in [keys, *(task for task in told if task.client == 0)]:
        rest = (run.updates[0],) if m.stage_of(late) == Stage.VECTORS else ()
        with pytest.raises(UpdateError, match=r"after those of 1|attempt 0|attempt 1 any more"):
            whole(late)(late, *rest, left[0])
    assert b"seal" not in left[0]
    answer(m.task(Stage.KEYS, 1, 0, {}, attempt=2), left[0])


def test_what_a_client_remembers_follows_from_no_seed_of_the_run():
    task = m.task(Stage.KEYS, 1, 0, {})
    answers = [Federation(3, seed=0).members.answer(task, None) for _ in range(2)]
    assert answers[0][0].payload.arrays != answers[1][0].payload.arrays
    assert answers[0][1] != answers[1][1]


@pytest.mark.parametrize("stage", list(Stage))
def test_a_message_of_an_attempt_that_is_over_changes_nothing_that_a_client_remembers(stage):
    run, shares, told = Federation(3), m.PREFIX + m.SEALED_SHARES, {}
    answer, mask = run.members.answer, run.members.mask

    def keep(task, *rest):
        told.setdefault(m.stage_of(task), task)
        return (mask if m.stage_of(task) == Stage.VECTORS else answer)(task, *rest)

    run.members.answer = run.members.mask = keep
    run.attempt()
    assert {m.attempt_of(task) for task in told.values()} == {1}
    _, newer = answer(m.task(Stage.KEYS, 1, 0, {}, attempt=2), None)
    late = told[stage]
    with pytest.raises(UpdateError, match=r"attempt 1: it knows attempt 2|after those of 2"):
        mask(late, run.updates[0], newer) if shares in late.payload.arrays else answer(late, newer)
    _, newest = answer(m.task(Stage.KEYS, 1, 0, {}, attempt=3), newer)
    assert newest != newer
