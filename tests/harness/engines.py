"""
Container engines: one that is here already, or a real one on a machine of its own.
"""

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import docker
import psutil
from docker.types import IPAMConfig, IPAMPool, Ulimit

from harness import roots
from harness.apps import App, import_caddy, remove_caddy
from harness.fetch import Endpoint
from harness.machines import HOST_ADDRESS, Here, Machine, join
from harness.tools import HarnessError, find_program, run, wait_for

SUBNET = "198.18.65.0/24"
"""The network of the labelled containers, from the range for benchmarks (RFC 2544)."""

NETWORK = "sniroute-test"


class Engine:
    """
    The engine at *url*, with an image and a network for labelled containers until it is left.

    *host* is the machine that its containers are on, *client* one that reaches *front*, where the
    product is to listen; *share* is a folder for files.
    """

    def __init__(
        self, url: str, share: Path, host: Here, client: Here, front: Endpoint, **options: object
    ) -> None:
        self.url = url
        self.share = share
        self.host = host
        self.client = client
        self.front = front
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.push(self._undo)
            self.api = self._undo.enter_context(
                contextlib.closing(docker.DockerClient(base_url=url, version="auto", timeout=60))
            )
            about = self.api.version()
            self.version = about["Version"]
            podman = about["Components"][0]["Name"].startswith("Podman")
            self.run_options = {**options, **({"ulimits": _limits()} if podman else {})}
            self._undo.callback(remove_caddy, self.api)
            import_caddy(self.api)
            pool = IPAMConfig(pool_configs=[IPAMPool(subnet=SUBNET)])
            self.network = self.api.networks.create(NETWORK, driver="bridge", ipam=pool)
            self._undo.callback(self.network.remove)
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """
        Remove what was made on the engine; the containers have to be gone.
        """
        self._undo.close()

    def run_app(self, name: str, labels: dict[str, str], **options: Any) -> App:
        """
        Run a Caddy named *name* with *labels* and return once it serves.

        Raises:
            HarnessError: It does not serve in time.
        """
        return App.run(self, name, labels, **options)

    def inside(self, container: Any) -> Here:
        """
        Find the own network of *container*, to be on as its processes are.
        """
        container.reload()
        # the engine tells the number that the process has on its own machine
        pid = container.attrs["State"]["Pid"]
        network = Path(f"/proc/{self.host.pid}/root/proc/{pid}/ns/net").stat().st_ino
        here = Here()
        for here.pid in psutil.pids():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{here.pid}/ns/net").stat().st_ino == network:
                    return here
        raise HarnessError(f"{container.name} has no process")


@dataclass(frozen=True, slots=True)
class Kind:
    """
    How to start one engine: its programs, with the system package that each comes from.
    """

    name: str
    version: str
    needs: tuple[tuple[str, str], ...]
    podman: bool = False
    root_packages: tuple[str, ...] = ()
    rootless: bool = False


DOCKER = Kind("docker-20", "20.10.", (("dockerd", "docker.io"), ("iptables", "iptables")))
DOCKER_TRIXIE = Kind(
    "docker-26", "26.1.", (("debootstrap", "debootstrap"),), root_packages=roots.DOCKER_PACKAGES
)
PODMAN = Kind(
    "podman",
    "4.3.",
    (("podman", "podman"), ("runc", "runc"), ("iptables", "iptables")),
    podman=True,
)

KINDS = (DOCKER, DOCKER_TRIXIE, PODMAN)

PODMAN_ROOTLESS = Kind(
    "podman-rootless",
    "4.3.",
    (*PODMAN.needs, ("newuidmap", "uidmap"), ("slirp4netns", "slirp4netns")),
    podman=True,
    rootless=True,
)
"""Its containers are on networks of their own, where no test but those for that looks for them."""

USER = 4430
"""The user of a rootless engine: of no account on the machine that we are on."""

_ADD_USER = """
set -e
home=$1 user=$2
mkdir -p "$home" "/run/user/$user"
cp /etc/passwd /run/passwd
echo "rootless:x:$user:$user::$home:/bin/sh" >> /run/passwd
mount --bind /run/passwd /etc/passwd
echo "rootless:200000:65536" > /run/subid
mount --bind /run/subid /etc/subuid
mount --bind /run/subid /etc/subgid
(umask 0 && mknod /run/tun c 10 200)
mount --bind /run/tun /dev/net/tun
chown "$user:$user" "$home" "/run/user/$user"
"""
"""Only this machine sees what is mounted; its /dev/net/tun is open to all, as udev makes it."""


class Daemon:
    """
    A bare engine on a machine of its own, with a client machine plugged into that one.
    """

    def __init__(self, kind: Kind) -> None:
        for program, package in kind.needs:
            find_program(program, package)
        self.kind = kind
        self.share = Path(tempfile.mkdtemp(prefix="sniroute-"))
        self._home = self.share / "home"
        self.socket = (self._home if kind.rootless else self.share) / "engine.sock"
        self.url = f"unix://{self.socket}"
        self._log = self.share / "engine.log"
        self._entered: subprocess.Popen[bytes] | None = None
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.push(self._undo)
            # from the last to the first: machines off, which ends all on them, then their traces
            self._undo.callback(shutil.rmtree, self.share)
            self._undo.callback(_remove_cgroups, self.share.name)
            self._undo.callback(self._reap)
            root = roots.trixie(*kind.root_packages) if kind.root_packages else Path("/")
            self.host = self._undo.enter_context(Machine(self.share, root))
            self.client = self._undo.enter_context(Machine(self.share))
            join(self.host, self.client)
            if kind.rootless:
                self.share.chmod(0o711)
                run(*self.host.inside("sh", "-c", _ADD_USER, "add", self._home, str(USER)))
            self.start()
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """
        Switch off the machines and remove their files: that ends everything else.
        """
        self._undo.close()

    def engine(self) -> Engine:
        """
        Use it, for labelled containers.
        """
        front = (HOST_ADDRESS, 443)
        # a user may make no group
        group = {} if self.kind.rootless else {"cgroup_parent": f"/{self.share.name}"}
        return Engine(self.url, self.share, self.host, self.client, front, **group)

    def start(self) -> None:
        """
        Start the engine's daemon and wait until it answers.
        """
        command, environment = self._podman() if self.kind.podman else self._dockerd()
        with self._log.open("a") as log:
            self._entered = subprocess.Popen(
                self.host.inside(*command),
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_for(f"{self.kind.name} answers", self._answers, timeout=60)
        except HarnessError as err:
            err.add_note(self._log.read_text()[-3000:])
            raise
        if self.kind.rootless:
            # the product runs as root without a capability: to it, as to anyone, a user's is shut
            self.socket.chmod(0o666)

    def kill(self) -> None:
        """
        End the engine's daemon without a warning; its containers run on.
        """
        for daemon in psutil.Process(self._entered.pid).children():
            daemon.kill()
        self._reap()
        self.socket.unlink(missing_ok=True)

    def _reap(self) -> None:
        if self._entered is not None:
            self._entered.wait(timeout=30)

    def _answers(self) -> bool:
        if self._entered.poll() is not None:
            raise HarnessError(f"{self.kind.name} ended with {self._entered.returncode}")
        # the client library leaves its socket open when it can not connect
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(self.socket))
        api = docker.DockerClient(base_url=self.url, version="auto", timeout=60)
        with contextlib.closing(api):
            return api.ping()

    def _dockerd(self) -> tuple[list[str | Path], dict[str, str]]:
        config = self.share / "daemon.json"
        config.write_text("{}")
        return [
            *("dockerd", "--config-file", config, "--data-root", self.share / "data"),
            *("--host", self.url, "--log-level", "warn"),
            *("--bip", "198.18.0.1/24"),
            *("--default-address-pool", "base=198.18.128.0/17,size=24"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs"),
            # an engine that is killed and started again finds its containers running
            "--live-restore",
        ], {}

    def _podman(self) -> tuple[list[str | Path], dict[str, str]]:
        config = self.share / "containers.conf"
        config.write_text(f"""\
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = "{self._home if self.kind.rootless else self.share}/networks"
default_subnet = "198.18.0.0/24"
""")
        environment = {"CONTAINERS_CONF": str(config)}
        command = ("podman", "--root", self.share / "data", "--runroot", "/run/containers")
        if self.kind.rootless:
            environment |= {"HOME": str(self._home), "XDG_RUNTIME_DIR": f"/run/user/{USER}"}
            user = ("setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "--")
            command = (*user, "podman", "--storage-driver", "vfs")
        return [*command, "system", "service", "--time=0", self.url], environment


def _limits() -> list[Ulimit]:
    # Podman's default limits may be above ours, and raising one takes CAP_SYS_RESOURCE
    files, processes = _hard_limit("NOFILE"), _hard_limit("NPROC")
    return [
        Ulimit(name="nofile", soft=min(1024, files), hard=files),
        Ulimit(name="nproc", soft=min(1000, processes), hard=processes),
    ]


def _hard_limit(name: str) -> int:
    hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
    return 20000 if hard == resource.RLIM_INFINITY else min(hard, 20000)


def _remove_cgroups(name: str) -> None:
    # the machine is off, but its last processes may take a moment to leave their groups
    def removed() -> bool:
        for top in [*Path("/sys/fs/cgroup").glob(name), *Path("/sys/fs/cgroup").glob(f"*/{name}")]:
            for folder, _, _ in os.walk(top, topdown=False):
                Path(folder).rmdir()
        return True

    wait_for(f"cgroups {name} are empty", removed)
