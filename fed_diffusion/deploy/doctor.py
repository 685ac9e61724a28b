"""`fed-diffusion doctor`: is this machine ready? Each finding says ok, or what to do."""

from __future__ import annotations

import datetime
import email.utils
import http.client
import json
import shlex
import shutil
import ssl
import stat
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fed_diffusion.common.hardware import usable_cores
from fed_diffusion.common.text import clean
from fed_diffusion.config import Config, ConfigError
from fed_diffusion.config.yaml import expanded
from fed_diffusion.data import load_own
from fed_diffusion.data.decode import EXTENSIONS, BadImage, read_image
from fed_diffusion.data.image_folder import counted, list_folder
from fed_diffusion.deploy.bundle import versions
from fed_diffusion.masks.budget import memory_allowed

CONNECT_S = 10.0
EXPIRES_SOON = datetime.timedelta(days=30)
LEAST_MEMORY = 1 << 30
"""The memory below which not even the digits train: torch and Flower alone take half of it."""
LEAST_DISK = 2 << 30
MOST_ANSWER = 1 << 22
"""How many bytes of an answer are read at most."""
AHEAD_S, BEHIND_S = 4.0, 300.0
"""How many seconds this clock may be ahead of and behind the server's.

Flower refuses signatures that are 5 s in the future, or 305 s old.
"""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer: `ok`, or what to do about a fault."""

    ok: bool
    name: str
    text: str


@dataclass(frozen=True)
class Machine:
    """What is to be checked; a part that is None is left out."""

    server: str | None = None
    """The proxy, or a SuperLink, as host:port."""
    root_certificates: Path | None = None
    key: Path | None = None
    data: str | None = None
    dataset: str | None = None
    config: Config | None = None
    """The settings of a run that the data are to fit."""
    versions: Mapping[str, str] | None = None
    """The versions on the machine that wrote the bundle."""
    is_node: bool = False

    @classmethod
    def of_bundle(cls, folder: Path) -> Machine:
        """Return the checks for a bundle that `deploy init` wrote.

        Raises
        ------
        ConfigError
            The folder is not such a bundle.
        """
        try:
            about = json.loads((folder / "deployment.json").read_text("utf-8"))
            node = folder / "node.toml"
            config = tomllib.loads(node.read_text("utf-8")) if node.exists() else {}
            keys = [folder / name for name in ("node.key", "server.key")]
            return cls(
                server=str(about["server"]),
                root_certificates=folder / "ca.crt",
                key=next((key for key in keys if key.exists()), None),
                data=_text(config, "data-dir"),
                dataset=_text(config, "dataset"),
                versions=about["versions"],
                is_node=node.exists(),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder} is not a bundle of fed-diffusion deploy: {error}"
            ) from error


def _text(config: Mapping[str, object], key: str) -> str | None:
    """Return a value of a node config as the node reads it; a folder may be called 2024."""
    return str(config[key]) if config.get(key) else None


def examine(machine: Machine) -> Iterator[Finding]:
    """Yield every finding about this machine, as soon as it is made."""
    yield from _packages(machine.versions)
    yield from _hardware()
    if machine.root_certificates is not None:
        yield from _certificate(machine.root_certificates)
    if machine.key is not None:
        yield from _key(machine.key)
    if machine.server is not None:
        for finding in _server(machine.server, machine):
            yield replace(finding, text=clean(finding.text))  # whoever answers there wrote some
    if machine.data is not None or machine.dataset is not None:
        yield from _data(machine)


def _packages(expected: Mapping[str, str] | None) -> Iterator[Finding]:
    for name, here in versions().items():
        there = (expected or {}).get(name)
        if here == "not installed":
            yield Finding(
                False, name, "is not installed: install the version that the server has with pip"
            )
        elif there is None:
            yield Finding(True, name, f"{here} (the server's is not known here)")
        elif name == "torch" and here.split("+")[0] == there.split("+")[0]:
            yield Finding(True, name, f"{here}, the server's build is {there}")
        elif here == there or (name == "python" and _minor(here) == _minor(there)):
            yield Finding(True, name, f"{here}, as the server")
        else:
            yield Finding(False, name, f"is {here} and the server's {there}: install that one")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _hardware() -> Iterator[Finding]:
    import torch

    free = memory_allowed()
    text = f"{free / 2**30:.1f} GiB free, {usable_cores()} cores"
    hint = "" if free >= LEAST_MEMORY else "; training needs 1 GiB at least: end something else"
    yield Finding(not hint, "memory", text + hint)
    if not torch.cuda.is_available():
        yield Finding(True, "gpu", "torch sees none, so this machine trains on the CPU")
    for device in range(torch.cuda.device_count()):
        available, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        text = f"{name}, {available / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        hint = "" if available >= LEAST_MEMORY else "; end the processes that hold its memory"
        yield Finding(not hint, f"gpu {device}", text + hint)
    disk = shutil.disk_usage(Path.cwd()).free
    hint = "" if disk >= LEAST_DISK else "; models and logs need 2 GiB: make room, or go elsewhere"
    yield Finding(not hint, "disk", f"{disk / 2**30:.1f} GiB free in {Path.cwd()}{hint}")


def _certificate(path: Path) -> Iterator[Finding]:
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())[0]
        constraints = found.extensions.get_extension_for_class(x509.BasicConstraints)
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        yield Finding(False, "ca", f"{path} is not a certificate of a CA ({error}): copy it again")
        return
    if not constraints.value.ca:
        yield Finding(False, "ca", f"{path} is a server's certificate; the CA's is called ca.crt")
        return
    yield _validity("ca", found)


def _validity(name: str, found: x509.Certificate) -> Finding:
    """Return a finding about whether a certificate is valid by this machine's clock."""
    now = datetime.datetime.now(datetime.UTC)
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    if now < begins:
        text = f"valid only from {begins:%Y-%m-%d %H:%M} UTC, and this clock says {now:%H:%M}"
        return Finding(False, name, f"{text} of {now:%Y-%m-%d}: set the clock")
    if now >= ends:
        return Finding(False, name, f"expired on {ends:%Y-%m-%d}: make a new deployment")
    left = ends - now
    soon = "; make a new deployment in time" if left < EXPIRES_SOON else ""
    return Finding(not soon, name, f"valid for {left.days} days{soon}")


def _key(path: Path) -> Iterator[Finding]:
    try:
        mode, content = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
    except OSError as error:
        yield Finding(
            False, "key", f"{path} cannot be read ({error}): are you the user that owns it?"
        )
        return
    if mode & 0o077:
        command = shlex.join(["chmod", "600", str(path)])
        yield Finding(False, "key", f"{path} is open to others ({mode:o}): {command}")
    elif b"OPENSSH" in content and not _is_node_key(content):
        yield Finding(False, "key", f"{path} is not a key that Flower takes: use the bundle's")
    else:
        yield Finding(True, "key", f"{path}, closed to others")


def _is_node_key(content: bytes) -> bool:
    try:
        return isinstance(load_ssh_private_key(content, None), ec.EllipticCurvePrivateKey)
    except (ValueError, UnsupportedAlgorithm):
        return False


# --- the server ---------------------------------------------------------------------------------


def _server(address: str, machine: Machine) -> Iterator[Finding]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        yield Finding(False, "server", f"{address} is not of the form host:port")
        return
    try:
        cafile = None if machine.root_certificates is None else str(machine.root_certificates)
        context = ssl.create_default_context(cafile=cafile)
    except (OSError, ssl.SSLError):
        yield Finding(False, "server", "cannot be asked without the CA's certificate (above)")
        return
    connection = http.client.HTTPSConnection(
        host.strip("[]"), int(port), timeout=CONNECT_S, context=context
    )
    try:
        connection.connect()
        yield from _tls(connection)
        yield from _answers(connection, machine)
    except ssl.SSLCertVerificationError as error:
        yield Finding(False, "tls", _distrust(error, host, machine.root_certificates))
    except ssl.SSLError as error:
        what = f"{address} does not speak TLS ({error.reason})"
        yield Finding(
            False,
            "tls",
            f"{what}: is this the proxy's port, and was nothing started with --insecure?",
        )
    except OSError as error:
        what = f"{address} cannot be reached ({error})"
        yield Finding(
            False, "server", f"{what}: is the server up, its name right and its port open?"
        )
    except http.client.HTTPException as error:
        yield Finding(False, "server", f"{address} is not a SuperLink: its answer is {error!r}")
    finally:
        connection.close()


def _distrust(error: ssl.SSLCertVerificationError, host: str, authority: Path | None) -> str:
    trusted = "this system's CAs" if authority is None else str(authority)
    if "hostname" in error.verify_message.lower() or "ip address" in error.verify_message.lower():
        return f"its certificate is not for {host}: use the name that deploy init was given"
    hint = "" if authority else " (name its CA: --root-certificates)"
    return f"its certificate is not one of {trusted}: {error.verify_message}{hint}"


def _tls(connection: http.client.HTTPSConnection) -> Iterator[Finding]:
    sock = connection.sock
    assert isinstance(sock, ssl.SSLSocket)
    raw = sock.getpeercert(binary_form=True)
    assert raw is not None
    yield Finding(True, "tls", f"{sock.version()}, and the certificate is valid for this name")
    yield _validity("certificate", x509.load_der_x509_certificate(raw))


def _answers(connection: http.client.HTTPSConnection, machine: Machine) -> Iterator[Finding]:
    asked = datetime.datetime.now(datetime.UTC)
    status, date, _ = _ask(connection, "GET", "/health")
    answered = datetime.datetime.now(datetime.UTC)
    if status in (502, 504):
        yield Finding(False, "superlink", "the proxy answers and the SuperLink does not: start it")
    elif status != 200:
        yield Finding(
            False, "superlink", f"does not answer there; something else does (status {status})"
        )
    else:
        yield Finding(True, "superlink", "answers")
    if date is not None:
        # the header holds whole seconds: in the middle of what it may mean
        theirs = email.utils.parsedate_to_datetime(date) + datetime.timedelta(seconds=0.5)
        ahead = (asked + (answered - asked) / 2 - theirs).total_seconds()
        wrong = not -BEHIND_S <= ahead <= AHEAD_S
        hint = "; Flower would refuse this node: set the clock (NTP)" if wrong else ""
        way = "ahead of" if ahead > 0 else "behind"
        yield Finding(not wrong, "clock", f"{abs(ahead):.0f} s {way} the server's{hint}")
    status, _, _ = _ask(connection, "POST", "/v1/control/list-nodes")
    closed = status == 403
    if machine.is_node and not closed:
        text = "is open to this node, and with it to anyone who can reach the port: use proxy.sh"
        yield Finding(False, "control", text)
    else:
        text = "closed to this machine" if closed else "open to this machine, as to an operator"
        yield Finding(True, "control", text)
    status, _, body = _ask(connection, "GET", "/openapi.json")
    if status == 200:
        yield from _flower(body)


def _flower(body: bytes) -> Iterator[Finding]:
    """Return the SuperLink's version, where no proxy stands before it."""
    try:
        there = str(json.loads(body)["info"]["version"])
    except (ValueError, KeyError, TypeError):
        return
    here = versions()["flwr"]
    same = here == there
    text = f"{there}, as here" if same else f"{there}, and {here} here: install the server's"
    yield Finding(same, "server's flwr", text)


def _ask(
    connection: http.client.HTTPSConnection, method: str, path: str
) -> tuple[int, str | None, bytes]:
    connection.request(method, path, body=b"" if method == "POST" else None)
    answer = connection.getresponse()
    return answer.status, answer.getheader("date"), answer.read(MOST_ANSWER)


# --- data ---------------------------------------------------------------------------------------


def _data(machine: Machine) -> Iterator[Finding]:
    where = machine.data or machine.dataset
    if (config := machine.config) is not None:
        data, conditional = config.data, config.model.conditional
        try:
            found = load_own(data, conditional, machine.data, machine.dataset)
        except ConfigError as error:
            yield Finding(False, "data", str(error))
        else:
            shape = " x ".join(map(str, found.images.shape[1:]))
            text = f"{len(found)} images of {shape} in {where}, as {config.preset} needs"
            if found.class_names:
                each = (f"{name} ({count})" for name, count in found.per_class().items())
                text += f"; classes: {', '.join(each)}"
            yield Finding(True, "data", ". ".join((text, *found.notes)))
        return
    if machine.data is None or machine.dataset is not None:
        yield Finding(True, "data", f"{where}; give --preset to have it loaded")
        return
    yield _folder(expanded(machine.data, "data-dir"))


def _folder(folder: Path) -> Finding:
    """Return a finding about a folder of images, whatever the run: each file is decoded in full."""
    try:
        if not folder.is_dir():
            return Finding(False, "data", f"{folder} is not a folder")
        files, skipped = list_folder(folder)
        left_out = f"; not read: {counted(skipped)}" if skipped else ""
        if not files:
            text = f"{folder} holds no image ({', '.join(EXTENSIONS)}){left_out}"
            return Finding(False, "data", text)
    except (ConfigError, OSError) as error:
        return Finding(False, "data", clean(error))
    sizes: Counter[str] = Counter()
    for path in files:
        try:
            # whether transparency is allowed is the run's to say: --preset looks
            width, height = read_image(path, "white").size
        except BadImage as error:
            return Finding(False, "data", f"{path} is not a readable image ({error})")
        sizes[f"{width}x{height}"] += 1
    if len(sizes) > 1:
        some = ", ".join(f"{count} of {size}" for size, count in sizes.most_common(3))
        text = f"{folder} holds images of several sizes ({some}): resize them"
        return Finding(False, "data", text)
    text = f"{len(files)} images of {next(iter(sizes))} in {folder}{left_out}"
    return Finding(True, "data", text)
