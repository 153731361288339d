"""Hosts on this machine: each with a network, a name and processes of its own.

What two of them share is what passes their cables. A Linux machine makes them for root, out of
network, host-name and process namespaces.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NETWORK = "10.213.0.0/16"
# The name is told to the kernel, and what was asked for runs below the first process of the host,
# with which it dies.
BOOT = 'hostname "$0" && "$@"'


class Host:
    """One host, at the other end of a cable whose end here has the address `gateway`."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.gateway, self.address = f"10.213.{number}.1", f"10.213.{number}.2"
        self._namespace, self._cable = f"svend-{os.getpid()}-{number}", f"svend{number}"

    def plug_in(self) -> None:
        """Make the host and its cable."""
        space = ["-n", self._namespace]
        _ip("netns", "add", self._namespace)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns",
            self._namespace)
        _ip("addr", "add", f"{self.gateway}/24", "dev", self._cable)
        _ip("link", "set", self._cable, "up")
        _ip(*space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip(*space, "link", "set", "eth0", "up")
        _ip(*space, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Take the host away, with its end of the cable."""
        subprocess.run(["ip", "link", "del", self._cable], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", self._namespace], check=False, capture_output=True)

    def cut(self) -> None:
        """Pull the cable: nothing arrives, and nobody is told."""
        _ip("link", "set", self._cable, "down")

    def mend(self) -> None:
        """Plug the cable in again."""
        _ip("link", "set", self._cable, "up")

    def booting(self, command: list[str]) -> list[str]:
        """Return what boots the host with one command on it; killed, the whole host is gone."""
        return ["ip", "netns", "exec", self._namespace, "unshare", "--uts", "--pid", "--fork",
                "--mount-proc", "--kill-child", "sh", "-c", BOOT, self.name, *command]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts, and take them away."""
    hosts = Host("here", 1), Host("there", 2)
    try:
        for host in hosts:
            host.plug_in()
        yield hosts
    finally:
        for host in hosts:
            host.remove()


@functools.cache
def _why_none() -> str | None:
    """Return why this machine makes no hosts; None where it does."""
    missing = [program for program in ("ip", "unshare") if shutil.which(program) is None]
    if missing:
        return f"no {' and no '.join(missing)} on this machine"
    try:
        with two_hosts() as (host, _):
            done = subprocess.run(host.booting(["hostname"]), check=False, text=True,
                                  capture_output=True, timeout=30)
    except subprocess.CalledProcessError as error:
        return f"no hosts can be made here: {error.stderr.strip()}"
    return None if done.stdout.strip() == host.name else f"no hosts here: {done.stderr.strip()}"


def require_hosts() -> None:
    """Skip the test where this machine makes no hosts."""
    why = _why_none()
    if why is not None:
        pytest.skip(why)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
