"""An S3 server on loopback (moto's), reached by a connection that is slow or fails as asked."""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

from sam_jax import buckets

# Makes closing a reset.
_RESET = struct.pack("ii", 1, 0)
_CHUNK_BYTES = 64 * 1024


class Connection:
    """A TCP connection to the server that may be slow or fail; settings may change at any time.

    Attributes:
      delay_seconds: from each piece of an answer to the next.
      num_drops: how many of the coming connections are reset in the middle of an answer.
      num_dropped: how many were.
      is_down: whether new connections are reset at once.
    """

    def __init__(self, port: int):
        self.delay_seconds = 0.0
        self.num_drops = 0
        self.num_dropped = 0
        self.is_down = False
        self._server_port = port
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Takes no new connections."""
        # Closing alone would not end a thread that waits for one.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_down:
                    _reset(client)
                else:
                    threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        """Carries requests and answers until one side, or a fault, ends the connection."""
        with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
            requests = threading.Thread(target=_carry, args=(client, server), daemon=True)
            requests.start()
            with contextlib.suppress(OSError):
                while answer := server.recv(_CHUNK_BYTES):
                    if self._takes_drop():
                        client.sendall(answer[: len(answer) // 2])
                        # Closing resets, as a switch that fails does.
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                        break
                    if self.delay_seconds:
                        time.sleep(self.delay_seconds)
                    client.sendall(answer)
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RD)
            requests.join()

    def _takes_drop(self) -> bool:
        with self._lock:
            if not self.num_drops:
                return False
            self.num_drops -= 1
            self.num_dropped += 1
            return True


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(_CHUNK_BYTES):
            target.sendall(content)
        target.shutdown(socket.SHUT_WR)


def _reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Connection]:
    """Runs a server, and points this process, and those that it starts, to it.

    Args:
      folder: for an empty file with settings, so that nobody's own are used.
    """
    from moto.server import ThreadedMotoServer

    settings = folder / "aws-settings"
    settings.touch()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    connection = Connection(port)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{connection.port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(settings),
        "AWS_SHARED_CREDENTIALS_FILE": str(settings),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            buckets.disconnect()
            yield connection
    finally:
        buckets.disconnect()
        connection.close()
        server.stop()


def fill(bucket: str, objects: Mapping[str, Path | bytes]) -> None:
    """Makes a bucket of these objects, by name, if it is not there yet."""
    import botocore.session

    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket=bucket)
    for name, content in objects.items():
        body = content if isinstance(content, bytes) else content.read_bytes()
        client.put_object(Bucket=bucket, Key=name, Body=body)


def remove(bucket: str, name: str) -> None:
    """Removes an object."""
    import botocore.session

    botocore.session.get_session().create_client("s3").delete_object(Bucket=bucket, Key=name)
