"""Serve a folder on this machine as an Inference Endpoint would.

    python examples/serve.py FOLDER --port 8000
    curl localhost:8000 -H 'Content-Type: application/json' \\
        -d '{"inputs": "BASE64 OF AN IMAGE", "parameters": {"text": "a red car"}}'
    curl localhost:8000/?parameters='%7B"text":"car"%7D' -H 'Content-Type: image/jpeg' \\
        --data-binary @street.jpg

What can be asked for, and what comes back: docs/pipelines.md. One request at a time, and no
encryption: for trying things out.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from efficientsam3_hf.hub.handler import EndpointHandler


def make_server(handler: EndpointHandler, port: int, host: str = "127.0.0.1") -> HTTPServer:
    """A server that answers with `handler`; port 0 takes a free one."""
    most = 2 * handler.limits.image_bytes  # base64 takes a third more, and there are parameters

    class Service(BaseHTTPRequestHandler):
        timeout = 60

        def do_POST(self) -> None:
            header = self.headers.get("Content-Length", "0")
            if not header.isdecimal() or len(header) > 18:
                error = f"Content-Length must be a number of bytes, not {header[:20]!r}."
                return self.answer(400, {"error": error})
            length = int(header)
            if length > most:
                for start in range(0, length, most):  # or the sender never reads the answer
                    self.rfile.read(min(most, length - start))
                return self.answer(413, {"error": f"A request has at most {most} bytes."})
            try:
                answer = handler(self.read_request(self.rfile.read(length)))
            except ValueError as error:
                return self.answer(400, {"error": str(error)})
            except Exception as error:
                self.answer(500, {"error": f"{type(error).__name__} in the service."})
                raise
            return self.answer(200, answer)

        def read_request(self, body: bytes) -> dict[str, Any]:
            if self.headers.get_content_type() == "application/json":
                return parse(body)
            parameters = parse_qs(urlsplit(self.path).query).get("parameters", ["{}"])[-1]
            return {"inputs": body, "parameters": parse(parameters)}

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer((host, port), Service)


def parse(text: bytes | str) -> Any:
    """What JSON says; what is none is a `ValueError`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("The JSON is nested too deep.") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="checkpoint folder, or name on the Hub")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    server = make_server(EndpointHandler(options.folder), options.port, options.host)
    print(f"Serving {options.folder} on http://{options.host}:{server.server_port}")
    server.serve_forever()
