"""
Root file systems of Debian trixie, made once and kept in the cache.
"""

import shutil
import tempfile
from pathlib import Path

import docker

from harness.tools import CACHE, find_program, locked, run

DOCKER_PACKAGES = ("docker.io", "docker-cli", "iptables")
"""What makes a trixie root a Docker 26.1 host."""


def trixie(*packages: str) -> Path:
    """
    Return a minimal trixie root with *packages*; the first call takes a minute or two.
    """
    root = CACHE / "-".join(("trixie", *packages))
    with locked(root.name):
        if not root.is_dir():
            half = root.with_name(f"{root.name}.half")
            shutil.rmtree(half, ignore_errors=True)
            include = [f"--include={','.join(packages)}"] if packages else []
            debootstrap = find_program("debootstrap", "debootstrap")
            # in a mount namespace of its own: whatever an interrupted debootstrap leaves mounted
            # in the root is gone before anyone removes it
            isolated = ("unshare", "--mount", "--propagation=private")
            run(*isolated, debootstrap, "--variant=minbase", *include, "trixie", half, timeout=900)
            half.rename(root)
    return root


def import_root(api: docker.DockerClient, root: Path, name: str) -> None:
    """
    Make the image *name* of a root file system, without a registry.

    It trusts the certificate authorities that the administrator of this machine added to it.
    """
    ours = ("-C", "/", "usr/local/share/ca-certificates")
    with tempfile.NamedTemporaryFile(suffix=".tar") as tar:
        run("tar", "-cf", tar.name, "-C", root, ".", *ours, timeout=300)
        api.api.import_image_from_file(tar.name, repository=name)
