"""What secure aggregation costs: seconds and bytes of a client and of the server, and plain ones.

    python benchmarks/secure.py [--clients 10 50 200] [--masks full random] [--measured 2]

Nothing is trained. All clients make keys and share their secrets; `--measured` of them make a
masked vector of a network of 23.8 M parameters, which the server adds and unmasks. A client's
seconds are of all it does beside training, on one core: seconds of CPU, which other processes
do not change. The server's are those of one client, with nobody lost. Bytes up are of the first
three exchanges (the fourth has 33 for each neighbour); plain ones are 8 for each kept coordinate
(whole numbers) and 4 (fp32). The peak is of this process, above what it held with the network.
--small takes a network of a few thousand parameters, to try the program out.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from fed_diffusion.aggregation.mean import MaskedMean
from fed_diffusion.build import Setup
from fed_diffusion.common.memory import peak_memory
from fed_diffusion.config import load_config
from fed_diffusion.masks.families import derive
from fed_diffusion.masks.mask import Masks, kept_values
from fed_diffusion.masks.plan import plan_round
from fed_diffusion.protocol.codecs import cast
from fed_diffusion.protocol.messages import Task, Update
from fed_diffusion.protocol.wire import Payload, Wire, cast_theta, decode_update, encode_task
from fed_diffusion.secure import messages as m
from fed_diffusion.secure.gathering import Gathering
from fed_diffusion.secure.member import Members
from fed_diffusion.secure.messages import Stage

MASKS: dict[str, dict[str, Any]] = {
    "full": {"pruning.kind": "full"},
    "random": {"pruning.kind": "random", "pruning.keep": 0.75},
    "topk": {"pruning.kind": "topk", "pruning.keep": 0.75},
    "channels": {"pruning.kind": "channels", "pruning.keep": 0.75},
}


class Case:
    """One number of clients under one kind of masks."""

    def __init__(self, clients: int, kind: str, small: bool):
        own = {"clients": clients, "secure.aggregation": True, "theory.every": None}
        own["local.state"] = "fresh"
        sizes: dict[str, Any] = {"model.widths": [8, 16]} if small else {}
        preset = "digits" if small else "cifar10"
        self.config = config = load_config(preset, own | sizes | MASKS[kind])
        setup = Setup.of(config)
        self.theta, self.layout, self.family = setup.theta(), setup.layout, setup.family
        keeps = dict.fromkeys(range(clients), 1.0 if kind == "full" else 0.75)
        planned = self.family, config.pruning.kind, 1, keeps, self.theta, self.layout
        self.recipes = plan_round(*planned)
        self.wire = Wire(config.wire, config.pruning, config.local, self.family, config.seed)
        self.casts = cast_theta(self.theta, self.wire, 1)
        self.members = Members.of(setup)

    def masks_of(self, client: int) -> Masks:
        """A client's masks."""
        return derive(self.family, self.recipes[client], self.theta, self.layout)

    def update(self, client: int) -> Update:
        """theta itself as an update of a client."""
        kept = kept_values(self.theta, self.masks_of(client))
        arrays = {name: cast(value, "fp32", False, None).pack() for name, value in kept.items()}
        return Update(1, client, Payload(arrays, {"examples": 1}))

    def measure(self, measured: int) -> dict[str, float]:
        """Seconds and bytes of one client, and of the server for one."""
        clients = list(self.recipes)
        gathering = Gathering(
            1, self.config.secure, self.theta, self.recipes, self.masks_of, len(clients), 1
        )
        memory: dict[int, bytes] = {}
        seconds = dict.fromkeys(clients, 0.0)
        up = down = server = 0.0

        def ask(task: Task) -> Update:
            nonlocal up, down
            began = time.process_time()
            if m.stage_of(task) == Stage.VECTORS:
                plain = self.update(task.client)
                began = time.process_time()
                answer, kept = self.members.mask(task, plain, memory[task.client])
            else:
                answer, kept = self.members.answer(task, memory.get(task.client))  # type: ignore[assignment]
            seconds[task.client] += time.process_time() - began
            memory[task.client] = kept
            if task.client == 0:
                up += answer.payload.nbytes
                down += task.payload.nbytes
            return answer

        for client in clients:
            gathering.take_keys(ask(m.task(Stage.KEYS, 1, client, {})))
        gathering.agree()
        for client in clients:
            parts = gathering.share_parts(client)
            gathering.take_shares(ask(m.task(Stage.SHARES, 1, client, parts)))
        gathering.meet()
        gathering.weights |= dict.fromkeys(clients, 1)  # as if all vectors had come
        for client in clients[:measured]:
            masks = self.masks_of(client)
            payload = encode_task(self.casts, self.recipes[client], masks)
            task = m.task(Stage.VECTORS, 1, client, gathering.vector_parts(client), payload)
            answer = ask(task)
            began = time.process_time()
            gathering.take_vector(answer, 1, masks)
            seed = bytes.fromhex(json.loads(memory[client])["seed"])
            gathering.opening().unmask(client, seed, {})
            server += time.process_time() - began
        kept = sum(value.numel() for value in kept_values(self.theta, self.masks_of(0)).values())
        mean, plain_server = MaskedMean(self.theta, len(clients)), 0.0
        for client in clients[:measured]:
            update, masks = self.update(client), self.masks_of(client)
            began = time.process_time()
            mean.add(decode_update(update.payload.arrays, self.theta, masks, self.wire), masks)
            plain_server += time.process_time() - began
        return {
            "neighbours": len(gathering.plan.neighbours[0]),
            "client s": sum(seconds[c] for c in clients[:measured]) / measured,
            "server s": server / measured,
            "plain server s": plain_server / measured,
            "up MB": up / 1e6,
            "x int64": up / (8 * kept),
            "x fp32": up / (4 * kept),
            "down MB": down / 1e6,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=["full", "random"])
    parser.add_argument("--measured", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for kind in given.masks:
        for clients in given.clients:
            case = Case(clients, kind, given.small)
            with peak_memory(torch.device("cpu")) as peak:
                found = case.measure(min(given.measured, clients))
                found["peak MB"] = peak() / 2**20
            figures = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
            print(f"{kind:9} {clients:4} clients  {figures}", flush=True)


if __name__ == "__main__":
    main()
