"""A server that returns the metadata of a model and runs no inference, and a function that changes the metadata."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cloudrt.engines.remote_metadata import model_parameters
from cloudrt.model.artifact import read_artifact

SIZE = (64, 96)
"""Height and width of the images of its model."""


@contextmanager
def metadata_server(change: Callable[[dict[str, Any]], object], folder: Path) -> Iterator[str]:
    """A server that returns the metadata of `cloudrt serve` for `folder`/tiny.onnx, changed by `change`."""
    metadata = {
        "name": "tiny",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, *SIZE, 3]}],
        "outputs": [
            {"name": "probability", "datatype": "UINT8", "shape": [-1, 3, 90, 60]},
            {"name": "presence", "datatype": "UINT8", "shape": [-1, 3]},
        ],
        "parameters": model_parameters(read_artifact(folder / "tiny.onnx"), "0"),
    }
    change(metadata)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/v2/models/tiny"
            body = json.dumps(metadata if known else {"error": "not here"}).encode()
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def change_artifact(metadata: dict[str, Any], **values: Any) -> None:
    """Change values of the artifact's own metadata."""
    artifact = json.loads(metadata["parameters"]["cloudrt.artifact"])
    metadata["parameters"]["cloudrt.artifact"] = json.dumps(artifact | values)
