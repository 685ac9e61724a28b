"""A deployment across three hosts, by the scripts that `deploy init` wrote."""

import json
import time
from typing import ClassVar

from fed_diffusion.config import load_config
from fed_diffusion.data import load_dataset
from fed_diffusion.deploy.bundle import Deployment, init
from tests.data.test_own import save
from tests.lab.hosts import SCRIPTS, Hosts

PORT = 8443
PROGRAM = SCRIPTS / "fed-diffusion"
SERVER = 0


class Lab(Hosts):
    """A server, two nodes with images of their own, and a stranger."""

    environment: ClassVar[dict[str, str]] = {}
    """Of the server's processes."""

    def __init__(self, folder, images=None, labels=None):
        super().__init__(4, folder)
        self.bundles = init(folder / "made", Deployment((self.address(SERVER),), 2, PORT))
        if images is None:
            digits = load_dataset(load_config("digits").data)
            images, labels = digits.images, digits.labels
        for node in (1, 2):
            own = slice(node - 1, None, 2)
            images_of = save(
                folder / f"images-{node}", images[own], None if labels is None else labels[own]
            )
            config = self.bundles / f"node-{node}" / "node.toml"
            text = config.read_text().replace("/srv/fed-diffusion/images", str(images_of))
            config.write_text(text)

    def __enter__(self):
        super().__enter__()
        try:
            self.prepare()
            self.superlink = self._serve("superlink")
            self.superexec = self._serve("superexec")
            self.proxy = self._serve("proxy")
            self.wait_for(lambda: self.operator("register.sh").returncode == 0)
            self.nodes = {node: self.start_node(node) for node in (1, 2)}
            self.wait_for(lambda: self.online() == 2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def prepare(self):
        """What is to be done to the hosts before anything starts on them."""

    def _serve(self, name):
        script = self.bundles / f"server/{name}.sh"
        return self.start(SERVER, script, log=f"{name}.log", **self.environment)

    def start_node(self, node, host=None, bundle=None, **environment):
        """A SuperNode that is started again when it ends, as systemd and Docker do."""
        script = (bundle or self.bundles) / f"node-{node}/supernode.sh"
        again = f"while :; do {script}; sleep 5; done"
        log = f"node-{node}-{host or node}.log"
        return self.start(host or node, "sh", "-c", again, log=log, **environment)

    def restart_superlink(self):
        self.superlink = self._serve("superlink")

    def operator(self, *command, timeout=120):
        script, *arguments = command
        return self.run(SERVER, self.bundles / "operator" / script, *arguments, timeout=timeout)

    def online(self):
        listed = self.operator("flwr.sh", "supernode", "list", "deployment", "--format", "json")
        return listed.stdout.count('"online"')

    def submit(self, path, **settings):
        """`deploy run` in the background; its exit code is the run's."""
        preset = settings.pop("preset", "digits")
        pairs = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        command = ("deploy", "run", self.bundles / "operator", preset, "--nodes", "2")
        return self.start(SERVER, PROGRAM, *command, "--out", path, *pairs, log="train.log")

    def wait_for(self, condition, seconds=180):
        end = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(f"== {p.name}\n{p.read_text()[-1500:]}" for p in self.logs())
            assert time.monotonic() < end, f"it did not happen in {seconds} s\n{logs}"
            time.sleep(0.5)

    def logs(self):
        return sorted(self.folder.glob("*.log"))
