"""`deploy init`: keys that only their machine has, certificates that hold, whole commands."""

import os
import re
import socket
import ssl
import stat
import subprocess
import threading
import tomllib
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store
from flwr.cli.supernode.register import (
    try_load_public_key,  # what `flwr supernode register` reads keys with
)
from flwr.common.config import parse_config_args
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fed_diffusion.cli.main import main
from fed_diffusion.config import ConfigError
from fed_diffusion.deploy.bundle import Deployment, init
from server_app.admitted import LIST, Admitted


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    before = os.umask(0)  # the least careful of shells
    try:
        target = tmp_path_factory.mktemp("deploy") / "deployment"
        return init(target, Deployment(("diffusion.example.org", "10.77.0.1"), nodes=3))
    finally:
        os.umask(before)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def is_secret(path):
    return b"PRIVATE KEY" in path.read_bytes() or path.suffix == ".secret"


def test_no_private_key_can_be_read_by_others_whatever_the_umask(deployment):
    secrets = [path for path in files(deployment) if is_secret(path)]
    assert len(secrets) == 1 + 2 + 3  # the CA's; the server's and the superexec's; the nodes'
    for path in secrets:
        assert mode(path) == 0o600
        assert mode(path.parent) == 0o700
    assert mode(deployment) == 0o700
    assert all(mode(path) & 0o022 == 0 for path in deployment.rglob("*"))


def test_a_bundle_holds_its_own_private_key_and_no_other(deployment):
    for folder in deployment.iterdir():
        if folder.is_dir():
            held = sorted(path.name for path in files(folder) if is_secret(path))
            expected = {"ca": ["ca.key"], "server": ["server.key", "superexec.secret"]}
            expected["operator"] = []
            assert held == expected.get(folder.name, ["node.key"])
    keys = [path.read_bytes() for path in files(deployment) if is_secret(path)]
    assert len(set(keys)) == len(keys)


def test_the_list_of_admitted_keys_is_the_nodes_keys_in_formats_that_flower_reads(deployment):
    for index in (1, 2, 3):
        private = serialization.load_ssh_private_key(
            (deployment / f"node-{index}/node.key").read_bytes(), None
        )
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        own = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        listed = try_load_public_key(deployment / f"operator/nodes/node-{index}.pub")
        assert listed == own
    assert len(list((deployment / "operator/nodes").iterdir())) == 3


def verified(authority, server, name):
    """The chain from a server's certificate, by an independent verifier."""
    subject = x509.IPAddress(name) if not isinstance(name, str) else x509.DNSName(name)
    verifier = PolicyBuilder().store(Store([authority])).build_server_verifier(subject)
    return verifier.verify(server, [])


def test_the_servers_certificate_verifies_for_its_names_and_for_no_other(deployment):
    import ipaddress

    authority = x509.load_pem_x509_certificate((deployment / "ca/ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((deployment / "server/server.crt").read_bytes())
    for name in ("diffusion.example.org", "localhost", ipaddress.ip_address("10.77.0.1")):
        assert len(verified(authority, server, name)) == 2
    with pytest.raises(x509.verification.VerificationError):
        verified(authority, server, "other.example.org")
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    lasts = server.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=364) < lasts <= timedelta(days=365)
    assert server.not_valid_before_utc < datetime.now(UTC)


def handshake(server, client, name):
    """Both ends of a TLS connection over a pair of sockets; raises what the client raises."""
    ours, theirs = socket.socketpair()

    def serve():
        try:
            with server.wrap_socket(theirs, server_side=True):
                pass
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as connection:
            return connection.version()
    finally:
        ours.close()
        thread.join()


def test_a_strict_tls_client_accepts_the_server_and_refuses_another_ca(deployment, tmp_path):
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(deployment / "server/server.crt", deployment / "server/server.key")
    client = ssl.create_default_context(cafile=str(deployment / "node-1/ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13's default
    assert handshake(server, client, "diffusion.example.org").startswith("TLS")
    assert handshake(server, client, "10.77.0.1").startswith("TLS")
    other = init(tmp_path / "other", Deployment(("diffusion.example.org",), nodes=1))
    stranger = ssl.create_default_context(cafile=str(other / "node-1/ca.crt"))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, stranger, "diffusion.example.org")


def test_nothing_is_ever_overwritten(deployment, tmp_path):
    before = {path: path.read_bytes() for path in files(deployment)}
    with pytest.raises(ConfigError, match="exists already"):
        init(deployment, Deployment(("10.0.0.1",)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        init(tmp_path / "empty", Deployment(("10.0.0.1",)))
    assert {path: path.read_bytes() for path in files(deployment)} == before


def test_an_init_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(ConfigError, match="neither a host name nor an address"):
        init(tmp_path / "made", Deployment(("a b",)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        init(tmp_path / "file" / "made", Deployment(("10.0.0.1",)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_every_script_is_shell_and_every_placeholder_is_filled(deployment):
    for path in files(deployment):
        if path.suffix == ".sh":
            assert mode(path) == 0o755
            assert subprocess.run(["sh", "-n", path]).returncode == 0
        if path.suffix in (".sh", ".conf", ".service", ".toml", ".md", ".yaml"):
            assert not re.search(r"@[A-Z0-9_]+@", path.read_text())


def test_node_configs_make_each_node_one_client(deployment):
    for index in (1, 2, 3):
        path = deployment / f"node-{index}/node.toml"
        expected = {"partition-id": index - 1, "num-partitions": 3}
        expected["data-dir"] = "/srv/fed-diffusion/images"
        assert tomllib.loads(path.read_text()) == expected
        assert parse_config_args([str(path)]) == expected  # as the SuperNode reads it


def test_the_server_knows_each_nodes_client_by_the_key_that_the_node_has(deployment, monkeypatch):
    monkeypatch.setenv(LIST, str(deployment / "server/nodes.json"))
    admitted = Admitted.of_environment()
    for index in (0, 1, 2):
        # as Flower stores it when it is registered
        key = try_load_public_key(deployment / f"operator/nodes/node-{index + 1}.pub")
        admitted.check(key, index, 3)
        with pytest.raises(ValueError, match="whose key it has"):
            admitted.check(key, 0, 1)
    assert (
        'FED_DIFFUSION_NODES="$here/nodes.json"' in (deployment / "server/superexec.sh").read_text()
    )


def control_rules(deployment):
    text = (deployment / "server/nginx.conf").read_text()
    return re.search(r"location /v1/control/ \{(.*?)\}", text, re.DOTALL)[1]


def test_the_control_interface_is_closed_but_to_the_operators(deployment, tmp_path):
    assert control_rules(deployment).split() == ["return", "403;"]
    connection = tomllib.loads((deployment / "operator/config.toml").read_text())
    assert connection["superlink"]["deployment"]["address"] == "127.0.0.1:8000"
    given = Deployment(("10.0.0.1",), operators=("10.0.0.7", "10.9.0.0/16"), nodes=1)
    opened = init(tmp_path / "made", given)
    rules = [line.strip() for line in control_rules(opened).strip().splitlines()]
    assert rules == [
        "allow 10.0.0.7;",
        "allow 10.9.0.0/16;",
        "deny all;",
        "client_max_body_size 64m;  # an app is sent in one piece",
        "proxy_pass $superlink;",
    ]
    connection = tomllib.loads((opened / "operator/config.toml").read_text())
    assert connection["superlink"]["deployment"] == {
        "address": "10.0.0.1:8443",
        "root-certificates": str(opened / "operator/ca.crt"),
    }


VALID = {"server": "a.example", "operators": "10.0.0.0/8", "data": "/srv/a", "control": "a:80"}


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    field=st.sampled_from(sorted(VALID)),
    extra=st.text(min_size=1, max_size=3) | st.sampled_from(list("\n ;{}$`'\"\\@|&<>()#*a1.-/:%")),
    place=st.integers(0, 10),
)
def test_what_is_accepted_cannot_leave_its_place_in_a_script(field, extra, place):
    """Values end in shell scripts, nginx's configuration and TOML."""
    value = VALID[field][:place] + extra + VALID[field][place:]
    lists = field in ("server", "operators")
    given = {"server": ("a",), field: (value,) if lists else value}
    try:
        Deployment(**given).check()
    except ConfigError:
        return
    assert not re.search(r"[\s;{}$`'\"\\@|&<>()#*%]", value)


def test_the_command_writes_a_deployment_and_names_it(tmp_path, capsys):
    target = tmp_path / "made"
    code = main(["deploy", "init", str(target), "--server", "10.0.0.1", "--nodes", "2"])
    assert code == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(target)
    assert sorted(path.name for path in target.iterdir()) == [
        "COMMANDS.md",
        "ca",
        "node-1",
        "node-2",
        "operator",
        "server",
    ]
    assert main(["deploy", "init", str(target), "--server", "10.0.0.1"]) == 2


def test_a_run_is_submitted_from_an_operators_bundle_only(deployment, tmp_path, capsys):
    assert main(["deploy", "run", str(tmp_path), "digits", "--out", "/runs/a"]) == 2
    assert main(["deploy", "run", str(deployment / "operator"), "digits", "--out", "a"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "not an operator's bundle" in said
    assert "give an absolute path, on the server" in said
