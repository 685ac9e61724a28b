"""Memory and start-up of image folders: 50,000 PNG files of 64x64 pixels on two processes.

    python benchmarks/images.py [--images 50000] [--side 64] [--processes 2]

Each process makes a `Worker`, as those of both engines do, and looks at every image. Memory is the
proportional set size (PSS): a page that two processes share counts half for each. What a process
takes with a handful of images is taken off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

WORKER = """
import json, sys, time
from fed_diffusion.client.worker import Worker
from fed_diffusion.config import load_config
from fed_diffusion.data import load_dataset
config = load_config("photos", {"data.dir": sys.argv[1], "data.resize": int(sys.argv[2])})
began, used = time.perf_counter(), time.process_time()
dataset = load_dataset(config.data)
loaded, used = time.perf_counter() - began, time.process_time() - used
worker = Worker(config, dataset)
total = sum(int(part.sum()) for part in worker.images._images.split(1024))
print(json.dumps({"loaded": loaded, "used": used, "total": total}), flush=True)
sys.stdin.readline()
pss = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("Pss:"))
print(int(pss.split()[1]) * 1024, flush=True)
sys.stdin.readline()
"""


def make(folder: Path, images: int, side: int) -> None:
    """Smooth colour gradients with a little noise: as large on the disk as small photographs."""
    draw = np.random.default_rng(0)
    ramp = np.linspace(0, 1, side)
    noise = draw.integers(0, 8, (side, side, 3))
    for i in range(images):
        slopes = draw.uniform(-120, 120, (2, 3))
        pixels = 128 + ramp[:, None, None] * slopes[0] + ramp[None, :, None] * slopes[1] + noise
        path = folder / f"{i:06d}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)


def measure(folder: Path, side: int, processes: int) -> tuple[float, float, float]:
    """The slowest load, in seconds of wall and of CPU time, and the PSS of all processes."""
    command = [sys.executable, "-c", WORKER, str(folder), str(side)]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(processes)
    ]
    lines = [json.loads(process.stdout.readline()) for process in started]
    assert len({line["total"] for line in lines}) == 1
    sizes = []
    for process in started:  # all of them have their images by now
        process.stdin.write("\n")
        process.stdin.flush()
    sizes = [int(process.stdout.readline()) for process in started]
    for process in started:
        process.communicate("\n")
    wall, used = (max(line[key] for line in lines) for key in ("loaded", "used"))
    return wall, used, float(sum(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["FED_DIFFUSION_CACHE"] = f"{home}/cache"
        os.environ["FED_DIFFUSION_IMAGE_CACHE_GB"] = "500"
        few, many = Path(home, "few"), Path(home, "many")
        for folder, count in ((few, 16), (many, arguments.images)):
            folder.mkdir()
            began = time.perf_counter()
            make(folder, count, arguments.side)
        print(f"{arguments.images} files made in {time.perf_counter() - began:.1f} s", flush=True)
        *_, idle = measure(few, arguments.side, arguments.processes)
        first, first_cpu, _ = measure(many, arguments.side, arguments.processes)
        second, second_cpu, taken = measure(many, arguments.side, arguments.processes)
    copy = 3 * arguments.side**2 * arguments.images
    print(f"start-up: {first:.2f} s, then {second:.2f} s ({second / first:.3f} of it)")
    print(f"CPU: {first_cpu:.2f} s, then {second_cpu:.2f} s ({second_cpu / first_cpu:.3f} of it)")
    print(
        f"memory of {arguments.processes} processes above {idle / 1e6:.0f} MB without images: "
        f"{(taken - idle) / 1e6:.0f} MB, {(taken - idle) / copy:.3f} of the {copy / 1e6:.0f} MB "
        "that one copy takes"
    )


if __name__ == "__main__":
    main()
