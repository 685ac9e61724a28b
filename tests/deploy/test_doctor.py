"""`doctor`: with real files and a real TLS server, each line says ok or what to do."""

import http.server
import shutil
import ssl
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import torch
from PIL import Image

from fed_diffusion.cli.main import main
from fed_diffusion.config import ConfigError, load_config
from fed_diffusion.deploy.bundle import Deployment, init, versions
from fed_diffusion.deploy.certificates import make_authority, make_server
from fed_diffusion.deploy.doctor import Machine, examine
from tests.data.test_own import save


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return init(tmp_path_factory.mktemp("doctor") / "made", Deployment(("127.0.0.1",), nodes=1))


def found(machine):
    """name -> finding; the last of a name."""
    return {finding.name: finding for finding in examine(machine)}


@contextmanager
def serving(certificate=None, key=None, health=200, control=403, ahead=0.0):
    """A server on loopback that answers as a proxy does; without a certificate in plain text."""

    class Answers(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status):
            self.send_response_only(status)
            when = datetime.now(UTC) + timedelta(seconds=ahead)
            self.send_header("Date", format_datetime(when, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self):
            self.reply(health if self.path == "/health" else 403)

        def do_POST(self):
            self.reply(control if self.path.startswith("/v1/control/") else 403)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def proxy(bundles, **answers):
    return serving(bundles / "server/server.crt", bundles / "server/server.key", **answers)


def test_a_machine_that_is_ready_has_nothing_to_do(bundles, tmp_path, capsys):
    save(tmp_path / "images", torch.zeros((10, 1, 8, 8), dtype=torch.uint8), range(10))
    with proxy(bundles) as address:
        arguments = [str(bundles / "node-1"), "--server", address, "--preset", "digits"]
        code = main(["doctor", *arguments, "--data-dir", str(tmp_path / "images")])
    lines = capsys.readouterr().out.splitlines()
    to_do = [line for line in lines if not line.startswith("ok  ")]
    # what the machine that runs this test has to spare is its own affair
    assert [line for line in to_do if not line.startswith(("do  memory", "do  disk"))] == []
    assert code == (1 if to_do else 0)
    names = {line.split(":")[0][4:] for line in lines}
    assert names >= {"python", "flwr", "memory", "gpu", "disk", "ca", "key", "tls", "clock", "data"}


@pytest.mark.parametrize(
    ("ahead", "ok"), [(0, True), (-250, False), (-3, True), (250, True), (400, False)]
)
def test_a_clock_is_wrong_where_flower_would_refuse_its_signatures(bundles, ahead, ok):
    """A server ahead of this machine makes this one's signatures old; behind, from the future."""
    with proxy(bundles, ahead=ahead) as address:
        machine = Machine(server=address, root_certificates=bundles / "node-1/ca.crt")
        clock = found(machine)["clock"]
    assert clock.ok == ok
    assert ("set the clock" in clock.text) != ok


def test_a_control_interface_that_is_open_to_a_node_is_a_fault(bundles):
    with proxy(bundles, control=415) as address:
        ca = bundles / "node-1/ca.crt"
        node = found(Machine(server=address, root_certificates=ca, is_node=True))["control"]
        operator = found(Machine(server=address, root_certificates=ca))["control"]
    assert not node.ok
    assert "use proxy.sh" in node.text
    assert operator.ok


def test_a_superlink_that_is_down_behind_its_proxy_is_named(bundles):
    with proxy(bundles, health=502) as address:
        machine = Machine(server=address, root_certificates=bundles / "node-1/ca.crt")
        assert "the SuperLink does not: start it" in found(machine)["superlink"].text


def test_another_ca_a_plain_server_and_a_silent_port_are_told_apart(bundles, tmp_path):
    other = init(tmp_path / "other", Deployment(("127.0.0.1",), nodes=1)) / "node-1/ca.crt"
    with proxy(bundles) as address:
        foreign = found(Machine(server=address, root_certificates=other))["tls"]
        system = found(Machine(server=address))["tls"]
    with serving() as address:
        plain = found(Machine(server=address, root_certificates=other))["tls"]
    silent = found(Machine(server=address, root_certificates=other))["server"]
    assert f"not one of {other}" in foreign.text
    assert "name its CA: --root-certificates" in system.text
    assert "does not speak TLS" in plain.text
    assert "cannot be reached" in silent.text
    assert not any(finding.ok for finding in (foreign, system, plain, silent))


def test_a_certificate_for_another_name_is_told_from_another_ca(tmp_path):
    authority = make_authority("test", 10)
    server = make_server(authority, ["other.example"], 10)
    (tmp_path / "ca.crt").write_bytes(authority.certificate_pem)
    (tmp_path / "crt").write_bytes(server.certificate_pem)
    (tmp_path / "key").write_bytes(server.key_pem)
    with serving(tmp_path / "crt", tmp_path / "key") as address:
        tls = found(Machine(server=address, root_certificates=tmp_path / "ca.crt"))["tls"]
    assert "its certificate is not for 127.0.0.1" in tls.text


@pytest.mark.parametrize(
    ("days", "says"), [(10, "in time"), (0, "expired on"), (400, "valid for 399 days")]
)
def test_a_ca_says_how_long_it_is_valid(tmp_path, days, says):
    (tmp_path / "ca.crt").write_bytes(make_authority("test", days).certificate_pem)
    finding = found(Machine(root_certificates=tmp_path / "ca.crt"))["ca"]
    assert says in finding.text
    assert finding.ok == (days == 400)


def test_a_servers_certificate_in_the_place_of_the_cas_is_recognised(bundles):
    finding = found(Machine(root_certificates=bundles / "server/server.crt"))["ca"]
    assert not finding.ok
    assert "the CA's is called ca.crt" in finding.text


def test_a_key_that_others_can_read_is_named_with_the_command_that_closes_it(bundles, tmp_path):
    copy = tmp_path / "node.key"
    copy.write_bytes((bundles / "node-1/node.key").read_bytes())
    copy.chmod(0o640)
    assert f"chmod 600 {copy}" in found(Machine(key=copy))["key"].text
    copy.chmod(0o600)
    assert found(Machine(key=copy))["key"].ok


def test_versions_unlike_the_servers_are_named():
    machine = Machine(versions=versions() | {"flwr": "1.40.0", "python": "3.99.1"})
    findings = found(machine)
    assert "the server's 1.40.0: install that one" in findings["flwr"].text
    assert not findings["python"].ok
    assert findings["torch"].ok


def test_images_that_cannot_be_used_are_named(tmp_path):
    save(tmp_path / "mixed", torch.zeros((2, 1, 8, 8), dtype=torch.uint8))
    Image.new("L", (9, 9)).save(tmp_path / "mixed" / "other.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    save(tmp_path / "large", torch.zeros((2, 1, 16, 16), dtype=torch.uint8))
    assert "several sizes (2 of 8x8, 1 of 9x9)" in found(_with(tmp_path / "mixed"))["data"].text
    assert "not a readable image" in found(_with(tmp_path / "broken"))["data"].text
    assert "is not a folder" in found(_with(tmp_path / "absent"))["data"].text
    assert "2 images of 16x16" in found(_with(tmp_path / "large"))["data"].text
    fitting = Machine(data=str(tmp_path / "large"), config=load_config("digits"))
    assert "1 x 8 x 8" in found(fitting)["data"].text


def test_what_is_not_read_and_the_classes_are_told(tmp_path):
    images = torch.zeros((3, 1, 8, 8), dtype=torch.uint8)
    save(tmp_path, images, [0, 1, 1])
    (tmp_path / "1" / "a.gif").write_text("")
    (tmp_path / "@eaDir").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "@eaDir" / "thumb.png")
    for kind in ("a.heic", "b.heic"):
        (tmp_path / kind).write_text("")
    bare = found(_with(tmp_path))["data"]
    assert bare.ok
    assert "3 images of 8x8" in bare.text
    assert "not read: 2 .heic, 1 .gif" in bare.text
    config = load_config("digits", {"model.conditional": False})
    fitting = found(Machine(data=str(tmp_path), config=config))["data"]
    assert fitting.ok
    assert "classes: 0 (1), 1 (2)" in fitting.text
    assert "were not read: 2 .heic, 1 .gif" in fitting.text


def test_images_that_the_run_would_refuse_are_found_without_a_preset(tmp_path):
    Image.fromarray(torch.zeros((8, 8), dtype=torch.uint16).numpy()).save(tmp_path / "a.png")
    assert "more than 8 bits per channel" in found(_with(tmp_path))["data"].text
    (tmp_path / "a.png").unlink()
    Image.new("RGBA", (8, 8)).save(tmp_path / "a.png")
    assert found(_with(tmp_path))["data"].ok  # with data.background it can be used
    fitting = Machine(
        data=str(tmp_path), config=load_config("digits", {"model.conditional": False})
    )
    assert "set it to white or black" in found(fitting)["data"].text


def _with(folder):
    return Machine(data=str(folder))


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a bundle"):
        Machine.of_bundle(tmp_path)


def test_a_folder_that_is_called_like_a_number_is_a_folder(tmp_path, bundles):
    bundle = shutil.copytree(bundles / "node-1", tmp_path / "node-1")
    (bundle / "node.toml").write_text("data-dir = 2024\ndataset = 1\n")
    machine = Machine.of_bundle(bundle)
    assert (machine.data, machine.dataset) == ("2024", "1")
