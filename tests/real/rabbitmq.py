"""A node of RabbitMQ of our own: Debian's package, free ports of loopback, a folder that goes with it."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pika

from loadtest.ports import free_ports

# The one in PATH is Debian's wrapper, which changes the user and with it the folders.
SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
START_S = 90


class RabbitMQ:
    """A node, and the port mapper without which Erlang starts none."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mq"))
        self.port, mapper, distribution = free_ports(3)
        (self.folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n")
        (self.folder / "plugins").write_text("[].\n")
        environment = {
            "HOME": str(self.folder),  # for the cookie
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(mapper),
            "RABBITMQ_NODENAME": "once@localhost",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1",
        }
        self._processes = []
        with (self.folder / "output").open("wb") as output:
            for command in (["epmd", "-address", "127.0.0.1", "-port", str(mapper)], [str(SERVER)]):
                process = subprocess.Popen(
                    command, env=environment, stdout=output, stderr=output, start_new_session=True, cwd=self.folder
                )
                self._processes.append(process)

    def wait_up(self) -> None:
        """Wait until it takes connections. Raises AssertionError where it does not."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._processes[-1].poll() is None:
            try:
                self.connect().close()
                return
            except (pika.exceptions.AMQPError, OSError):
                time.sleep(0.1)
        raise AssertionError(f"RabbitMQ did not start: {(self.folder / 'output').read_text(errors='replace')}")

    def connect(self) -> pika.BlockingConnection:
        return pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", self.port))

    def close(self) -> None:
        """End both with all that they started; each has a session of its own."""
        for process in reversed(self._processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
