"""Print the versions that the project is tested with, as pip's constraints: `make constraints`.

All that the image installs, direct or not, but for what torch brings of an accelerator's libraries:
those depend on the index that torch comes from, and torch names their exact versions itself.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
ACCELERATORS = ("nvidia-", "cuda-", "triton")


def main() -> None:
    """A line for each distribution, in the order of the alphabet."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    # as in the Dockerfile: nobody simulates there, so without Ray
    lines = [line.replace("flwr[simulation]", "flwr") for line in project["dependencies"]]
    wanted = [Requirement(line) for line in lines]
    found: dict[str, str] = {}
    while wanted:
        asked = wanted.pop()
        name = asked.name.lower().replace("_", "-")
        if name.startswith(ACCELERATORS):
            continue
        found[name] = importlib.metadata.version(name)
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            known = needed.name.lower().replace("_", "-") in found and not needed.extras
            if not known and _applies(needed, asked.extras):
                wanted.append(needed)
    print("# Written by `make constraints`: the versions that the tests passed with.")
    for name in sorted(found):
        print(f"{name}=={found[name].split('+')[0]}")


def _applies(needed: Requirement, extras: set[str]) -> bool:
    """Whether a distribution that is wanted with these extras needs it on this machine."""
    return needed.marker is None or any(
        needed.marker.evaluate({"extra": extra}) for extra in extras or {""}
    )


if __name__ == "__main__":
    main()
