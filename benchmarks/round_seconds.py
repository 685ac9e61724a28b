"""Where the seconds of a deployed round go: each step of a message's way, with its time.

    python -m benchmarks.round_seconds [--rounds 8] [--steps 1] [--ask 1.0]

A SuperLink and two SuperNodes on loopback, two clients, the digits network, hardly any training.
Every process notes the time of what it does: ServerApp and ClientApp by a staged app that wraps
this package's, a SuperNode by the lines that it logs. Of each round but the first the table
follows the client whose update came last, so that the steps add up to the round; it has their mean
and range over the rounds. Then the CPU time that a node spends while it only waits.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from fed_diffusion.config import load_config
from fed_diffusion.engines.flower import stage_app
from tests.deployment import SCRIPTS, Deployment

OFF = {"samples": 0, "every": 0, "reference": "none", "denoise": False}
IDLE_S = 20.0
ASK = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
NOTE = """
import json, os, time
def note(what, **about):
    with open(os.environ["FED_TIMES"], "a") as file:
        file.write(json.dumps({"what": what, **about}) + "\\n")
"""
CLIENT = f"""
import time
imported = time.time()
{NOTE}
from flwr.clientapp import ClientApp
from client_app import honest
app = ClientApp()
app.query()(honest.hello)
@app.train()
def train(message, context):
    called, about = time.time(), message.content["about"]
    which = {{key: about[key] for key in ("round", "client")}}
    reply = honest.train(message, context)
    done, trained = time.time(), reply.content["metrics"]["seconds"]
    # psutil knows the start of the clock to a second only
    ticks = int(open("/proc/self/stat").read().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    started = time.time() - age
    note("client", **which, started=started, imported=imported, called=called, done=done,
         trained=trained)
    return reply
"""
SERVER = f"""
import time
{NOTE}
from server_app import honest
from server_app.exchange import Exchange
app = honest.app
send, receive = Exchange._send, Exchange._receive
def _send(self, task):
    send(self, task)
    note("sent", round=task.round, client=task.client, at=time.time())
def _receive(self, reply, sent):
    came = time.time()
    receive(self, reply, sent)
    round = self._experiment.coordinator.round + 1
    note("received", round=round, client=sent.client, came=came, taken=time.time())
Exchange._send, Exchange._receive = _send, _receive
"""
STEPS = (
    ("the SuperNode asks the SuperLink (every 3 s)", "Flower", "sent", "asked"),
    ("it fetches the message", "Flower", "asked", "fetched"),
    ("SuperExec asks it for work, and starts a process", "Flower", "fetched", "started"),
    ("Python, Flower's imports, the app's files", "Flower", "started", "imported"),
    ("the app's own imports, the message", "both", "imported", "called"),
    ("training", "ours", "called", "trained"),
    ("the warm worker, but for training", "ours", "trained", "done"),
    ("the process hands over, the SuperNode looks (every 0.5 s)", "Flower", "done", "sending"),
    ("the SuperNode sends the reply", "Flower", "sending", "replied"),
    ("the server sees it, and fetches it", "both", "replied", "came"),
    ("it is added to the sums", "ours", "came", "taken"),
    ("the round is closed, and the next one sent", "ours", "taken", "next"),
)


class Timed(Deployment):
    """A deployment whose SuperNodes' lines are noted with the time at which they come."""

    def __init__(self, home: Path, ask: str) -> None:
        super().__init__(home)
        self.times = self.home / "times.jsonl"
        self.environment |= {"FED_TIMES": str(self.times), ASK: ask}
        self.nodes_said: dict[tuple[int, int], dict[str, float]] = {}

    def spawn(self, name, *arguments, log=None):
        if name != "flower-supernode":
            return super().spawn(name, *arguments, log=log)
        process = subprocess.Popen(
            [sys.executable, SCRIPTS / name, *arguments],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(process, int(log[-1])), daemon=True).start()
        return process

    def _read(self, process, client: int) -> None:
        words = {"Receiving: train": "asked", "Received succ": "fetched"}
        words |= {"Sending: train": "sending", "Sent succ": "replied"}
        round = 0
        for line in process.stdout:
            if found := re.search(r"ROUND (\d+)", line):
                round = int(found[1])
            for word, name in words.items():
                if word in line:
                    self.nodes_said.setdefault((round, client), {})[name] = time.time()


def measured(folder: Path, rounds: int, steps: int, ask: str) -> tuple[list[dict], float, float]:
    """The times of the last client of each round, seconds a round, and a waiting node's CPU."""
    settings = {f"evaluation.{key}": value for key, value in OFF.items()} | {"local.steps": steps}
    pairs = " ".join(f"{key}={value}" for key, value in settings.items())
    app, run = folder / "app", folder / "run"
    app.mkdir()
    stage_app(app, load_config("digits"))
    for side, text in (("client_app", CLIENT), ("server_app", SERVER)):
        (app / side / "app.py").rename(app / side / "honest.py")
        (app / side / "app.py").write_text(text)
    with Timed(folder / "flwr", ask) as flower:
        for partition in range(2):
            flower.start_node(partition, 2)
        flower.wait_for_nodes(2)
        config = f"preset='digits' clients=2 rounds={rounds} run-dir='{run}' set='{pairs}'"
        printed = flower.run(config, timeout=1800, app=app)
        if not (run / "results.json").exists():
            raise SystemExit(printed)
        node = psutil.Process(flower.nodes[0].pid)
        waiting = [node, *(p for p in node.children() if "superexec" in " ".join(p.cmdline()))]
        before = sum(sum(process.cpu_times()[:2]) for process in waiting)
        time.sleep(IDLE_S)
        idle = (sum(sum(process.cpu_times()[:2]) for process in waiting) - before) / IDLE_S
        said = flower.nodes_said
        lines = [json.loads(line) for line in flower.times.read_text().splitlines()]
    return ways(lines, said, rounds), statistics.median(seconds_of(run)), idle


def seconds_of(run: Path) -> list[float]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in found[1:]]


def ways(lines: list[dict], said: dict, rounds: int) -> list[dict]:
    """For each round but the first and the last: when its last update was where."""
    found: dict[tuple[int, int], dict[str, float]] = {key: dict(at) for key, at in said.items()}
    for line in lines:
        about = found.setdefault((line["round"], line["client"]), {})
        about |= {"sent": line["at"]} if line["what"] == "sent" else line
    chosen = []
    for round in range(2, rounds):
        last = max((found[round, client] for client in (0, 1)), key=lambda at: at["taken"])
        last["trained"] += last["called"]
        last["next"] = min(found[round + 1, client]["sent"] for client in (0, 1))
        chosen.append(last)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--ask", default="1.0", help=f"{ASK}; Flower's default is 1.0")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found, seconds, idle = measured(
            Path(name), arguments.rounds, arguments.steps, arguments.ask
        )
    print("| step | whose | seconds | range |\n|---|---|---|---|")
    for step, whose, since, until in (*STEPS, ("a round", "", "sent", "next")):
        took = [at[until] - at[since] for at in found]
        spread = f"{min(took):.2f} to {max(took):.2f}"
        print(f"| {step} | {whose} | {statistics.mean(took):.2f} | {spread} |")
    print(f"\nmedian of metrics.jsonl: {seconds:.2f} s")
    print(f"a node that waits: {100 * idle:.1f} % of a core")


if __name__ == "__main__":
    main()
