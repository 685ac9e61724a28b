"""What an operator needs to run on several machines, written into one folder: `deploy init`.

operator/    Flower's connection (config.toml), the public keys to admit, register.sh, flwr.sh
server/      certificate, SuperLink, ServerApp's process, the proxy in front of them, and which
             client each node's key may be (nodes.json)
node-1/ ...  one bundle per node: its own private key, and no other
ca/          the authority's key; it stays here, and is needed to sign another certificate
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import secrets
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fed_diffusion.config import ConfigError
from fed_diffusion.config.yaml import expanded
from fed_diffusion.deploy.certificates import (
    as_address,
    is_network,
    make_authority,
    make_node_key,
    make_server,
)

PORT_INSIDE = 8000
"""The port on which the SuperLink listens, on loopback only."""
MOST_NODES = 1000
KEPT = f"""\
    # connections are kept for the next request; for less than the 5 s that the SuperLink keeps them
    upstream kept {{ server 127.0.0.1:{PORT_INSIDE}; keepalive 16; keepalive_timeout 3s; }}"""
RESOLVED = "    resolver 127.0.0.11 valid=5s;  # a container that is made anew has another address"
HOME = "/etc/fed-diffusion"
"""The folder in which the systemd units expect a bundle."""
PACKAGES = ("fed-diffusion", "flwr", "torch", "numpy")
"""The packages that must be alike on all machines; Flower refuses other versions of itself."""

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*", re.IGNORECASE)


@dataclass(frozen=True)
class Deployment:
    """What `deploy init` was asked for.

    Attributes
    ----------
    server
        The names and addresses of the server; nodes use the first.
    operators
        Addresses or networks (10.0.0.0/24) that may use the control interface through the proxy.
        Without any, the operator works on the server itself.
    control
        host:port under which the operator's `flwr` reaches the SuperLink, if it is neither the
        proxy nor the server itself.
    data
        The folder of images that each node's config names at first.
    """

    server: tuple[str, ...]
    nodes: int = 3
    port: int = 8443
    operators: tuple[str, ...] = ()
    control: str | None = None
    data: str = "/srv/fed-diffusion/images"
    days: int = 365

    def check(self) -> None:
        """Raise `ConfigError` for a value that cannot be used."""
        for name in self.server:
            if as_address(name) is None and not _HOST_NAME.fullmatch(name):
                raise ConfigError(f"--server {name!r} is neither a host name nor an address.")
        if not 1 <= self.nodes <= MOST_NODES:
            raise ConfigError(f"--nodes {self.nodes} is not allowed; give 1 to {MOST_NODES}.")
        if not 1 <= self.port <= 65535 or self.port == PORT_INSIDE:
            raise ConfigError(
                f"--port {self.port} is not allowed; give 1 to 65535, but not {PORT_INSIDE}, where "
                "the SuperLink listens behind the proxy."
            )
        if not 1 <= self.days <= 3650:
            raise ConfigError(f"--days {self.days} is not allowed; give 1 to 3650.")
        for network in self.operators:
            if not is_network(network):
                raise ConfigError(f"--operator {network!r} is neither an address nor a network.")
        if not re.fullmatch(r"(/[\w.+-]+)+/?", self.data):
            raise ConfigError(f"--data-dir {self.data!r}: give an absolute path without blanks.")
        if self.control and not re.fullmatch(r"[\w.:\[\]-]+:\d+", self.control):
            raise ConfigError(f"--control {self.control!r} is not of the form host:port.")

    @property
    def address(self) -> str:
        """The address, as host:port, that nodes connect to."""
        first = self.server[0]
        return f"[{first}]:{self.port}" if ":" in first else f"{first}:{self.port}"

    @property
    def control_address(self) -> str:
        """The address, as host:port, that the operator's `flwr` connects to."""
        inside = f"127.0.0.1:{PORT_INSIDE}"
        return self.control or (self.address if self.operators else inside)


def init(target: Path, wanted: Deployment) -> Path:
    """Write a deployment's folder; nothing is ever overwritten.

    Folders that hold a private key are closed to others (0700), the keys too (0600).

    Raises
    ------
    ConfigError
        A value cannot be used, or the folder exists already.
    """
    wanted.check()
    target = expanded(target, "DIR").absolute()
    if target.exists() or target.is_symlink():
        raise ConfigError(
            f"{target} exists already, and keys are never overwritten; name another folder."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # all of it, or nothing; closed to others (0700) from the start
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as made:
            _write_all(Path(made) / "all", target, wanted)
            os.rename(Path(made) / "all", target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error}") from error
    return target


def _write_all(folder: Path, target: Path, wanted: Deployment) -> None:
    folder.mkdir(mode=0o700)
    authority = make_authority("fed-diffusion", wanted.days)
    names = [*wanted.server, "localhost", "127.0.0.1", "::1", "superlink"]
    server = make_server(authority, list(dict.fromkeys(names)), wanted.days)
    ca = authority.certificate_pem
    about = json.dumps({"server": wanted.address, "versions": versions()}, indent=2) + "\n"
    common = {"ca.crt": ca, "deployment.json": about.encode()}

    _bundle(folder / "ca", {"ca.crt": ca}, {"ca.key": authority.key_pem})
    scripts = {name: _fill(name, wanted) for name in ("superlink.sh", "superexec.sh", "proxy.sh")}
    files = common | scripts | _units("superlink", "superexec", "proxy")
    files |= {
        "common.sh": _template("common.sh").encode(),
        "server.crt": server.certificate_pem + ca,
        "nginx.conf": _nginx(wanted, "kept", KEPT),
        "nginx.compose.conf": _nginx(wanted, f"superlink:{PORT_INSIDE}", RESOLVED),
        "compose.yaml": _compose("server"),
        ".env": f"PORT={wanted.port}\n".encode(),
    }
    operator = common | {
        "config.toml": _connection(wanted, target / "operator" / "ca.crt").encode(),
        "flwr.sh": _template("flwr.sh").encode(),
        "register.sh": _template("register.sh").encode(),
    }
    places: dict[str, dict[str, object]] = {}
    for index in range(wanted.nodes):
        private, public = make_node_key()
        operator[f"nodes/node-{index + 1}.pub"] = public
        place: dict[str, object] = {"key": public.decode().strip(), "partition-id": index}
        places[f"node-{index + 1}"] = place | {"num-partitions": wanted.nodes}
        node = common | _units("supernode")
        node |= {
            "common.sh": _template("common.sh").encode(),
            "supernode.sh": _fill("supernode.sh", wanted),
            "node.toml": _fill("node.toml", wanted, INDEX=str(index)),
            "compose.yaml": _compose("node"),
            ".env": f"DATA={wanted.data}\n".encode(),
        }
        _bundle(folder / f"node-{index + 1}", node, {"node.key": private})
    _bundle(folder / "operator", operator, {})
    files["nodes.json"] = (json.dumps(places, indent=2) + "\n").encode()
    keys = {"server.key": server.key_pem, "superexec.secret": secrets.token_bytes(32)}
    _bundle(folder / "server", files, keys)
    _write(folder / "COMMANDS.md", commands(target, wanted).encode(), 0o644)


def _bundle(folder: Path, files: dict[str, bytes], private: dict[str, bytes]) -> None:
    """Make a folder for one machine, which other users of that machine cannot read."""
    folder.mkdir(mode=0o700)
    for name, content in files.items():
        path = folder / name
        if not path.parent.exists():
            path.parent.mkdir(mode=0o700)
        _write(path, content, 0o755 if name.endswith(".sh") else 0o644)
    for name, content in private.items():
        _write(folder / name, content, 0o600)


def _write(path: Path, content: bytes, mode: int) -> None:
    # never open to others, not even for the moment before a chmod
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)


def versions() -> dict[str, str]:
    """Return the versions, on this machine, of Python and the packages that must be alike."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _template(name: str) -> str:
    return (Path(__file__).resolve().parent / "templates" / name).read_text("utf-8")


def _fill(name: str, wanted: Deployment, **more: str) -> bytes:
    """Return a template with its @NAMES@ filled in; every name must be known."""
    values = {
        "ADDRESS": wanted.address,
        "PORT": str(wanted.port),
        "PORT_INSIDE": str(PORT_INSIDE),
        "NODES": str(wanted.nodes),
        "DATA": wanted.data,
        "HOME": HOME,
    } | more
    return re.sub(r"@([A-Z0-9_]+)@", lambda found: values[found[1]], _template(name)).encode()


def _units(*programs: str) -> dict[str, bytes]:
    text = _template("unit.service").replace("@HOME@", HOME)
    return {
        f"fed-diffusion-{program}.service": text.replace("@PROGRAM@", program).encode()
        for program in programs
    }


def _nginx(wanted: Deployment, upstream: str, superlink: str) -> bytes:
    control = ["        location /v1/control/ { return 403; }  # the operator works on the server"]
    if wanted.operators:
        control = ["        location /v1/control/ {"]
        control += [f"            allow {network};" for network in wanted.operators]
        control += ["            deny all;"]
        control += ["            client_max_body_size 64m;  # an app is sent in one piece"]
        control += ["            proxy_pass $superlink;", "        }"]
    listen = f"        listen [::]:{wanted.port} ssl;" if ":" in wanted.server[0] else ""
    more = {"CONTROL": "\n".join(control), "UPSTREAM": upstream, "LISTEN6": listen}
    return _fill("nginx.conf", wanted, SUPERLINK=superlink, **more)


def _compose(side: str) -> bytes:
    """Return the text of docker/compose.<side>.yaml, from the installed wheel or the checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "docker" / f"compose.{side}.yaml"
    source = inside if inside.is_file() else package.parent / "docker" / inside.name
    return source.read_bytes()


def _connection(wanted: Deployment, certificate: Path) -> str:
    """Return Flower's config.toml, for `flwr run . deployment`."""
    return (
        '[superlink]\ndefault = "deployment"\n\n[superlink.deployment]\n'
        f"address = {json.dumps(wanted.control_address)}\n"
        f"root-certificates = {json.dumps(str(certificate), ensure_ascii=False)}\n"
    )


def commands(target: Path, wanted: Deployment) -> str:
    """Return the commands for every machine, in the order in which they are typed."""
    here, server = shlex.quote(str(target)), wanted.server[0]
    where = "here" if wanted.operators or wanted.control else "here, on the server"
    run = f"--run-config \"preset='digits' clients={wanted.nodes} run-dir='/var/tmp/digits-1'\""
    nodes = "\n".join(
        f"scp -r {here}/node-{i} NODE_{i}:       # then, on it: ./node-{i}/supernode.sh"
        for i in _first_and_last(wanted.nodes)
    )
    return f"""# Commands

Every machine needs Python {platform.python_version()} and the packages of deployment.json in
its PATH. Check each with `fed-diffusion doctor BUNDLE`, where BUNDLE is its folder below.

## The server, {server}

```
scp -r {here}/server {server}:           # unless it is this machine
./server/superlink.sh                   # the SuperLink, on 127.0.0.1:{PORT_INSIDE}
./server/superexec.sh                   # runs the ServerApp
./server/proxy.sh                       # nginx on port {wanted.port}: the only port to open
```

## The operator ({where})

```
{here}/operator/register.sh             # admits the nodes of operator/nodes/
{here}/operator/flwr.sh supernode list deployment
{here}/operator/flwr.sh run APP deployment --stream {run}
```

APP is a checkout of fed-diffusion, or what `fed-diffusion deploy run` stages by itself:

```
fed-diffusion deploy run {here}/operator digits --nodes {wanted.nodes} \\
    --set clients={wanted.nodes} --set rounds=5 --set local.steps=60 --out /var/tmp/digits-1
```

It says the run's number. Ctrl-C ends the command and not the run:
`fed-diffusion deploy attach {here}/operator NUMBER` waits for it again, and
`fed-diffusion deploy stop {here}/operator NUMBER` ends it.

## Each node

Name its images in `data-dir` of node.toml, and start it (several on one host: each with a port of
its own, as in `PORT=9095 ./node-2/supernode.sh`):

```
{nodes}
```

## As services

systemd: copy a bundle to {HOME}, `chown -R fed-diffusion {HOME}`, its .service files to
/etc/systemd/system, and `systemctl enable --now fed-diffusion-superlink fed-diffusion-superexec
fed-diffusion-proxy` (server) or `fed-diffusion-supernode` (node).
Docker: `chown -R 10001:10001 BUNDLE && docker compose -f BUNDLE/compose.yaml up -d`.

Nothing in ca/ leaves this machine. A node's key is in its own bundle only: when the copy has
arrived, delete it here.
"""


def _first_and_last(count: int) -> Sequence[int]:
    return range(1, count + 1) if count <= 4 else (1, 2, count)
