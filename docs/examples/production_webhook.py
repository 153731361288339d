"""Say in one line that production has moved: a receiver for MLflow's registry webhooks.

    python docs/examples/production_webhook.py --port 8800 --server http://127.0.0.1:5000

tells the tracking server to send the moves of aliases here, and prints those of `production`. A
request counts if its signature, by a secret that only the two know, is right.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import secrets
from http.server import BaseHTTPRequestHandler, HTTPServer

from mlflow import MlflowClient

EVENT = "model_version_alias.created"  # also sent where an alias moves


def signature(secret: str, delivery_id: str, timestamp: str, body: str) -> str:
    """Return the signature that MLflow puts into X-MLflow-Signature."""
    signed = f"{delivery_id}.{timestamp}.{body}".encode()
    digest = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


class Receiver(BaseHTTPRequestHandler):
    """Prints each move of the alias `production`."""

    secret = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        expected = signature(
            self.secret, self.headers.get("X-MLflow-Delivery-Id", ""),
            self.headers.get("X-MLflow-Timestamp", ""), body,
        )
        known = hmac.compare_digest(expected, self.headers.get("X-MLflow-Signature", ""))
        self.send_response(200 if known else 401)
        self.end_headers()
        moved = json.loads(body)["data"] if known else {}
        if moved.get("alias") == "production":
            print(f"production of {moved['name']} is now version {moved['version']}", flush=True)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing but the moves."""


def main() -> None:
    """Register the webhook, and listen until stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", required=True, help="address of the tracking server")
    parser.add_argument("--port", type=int, default=8800)
    options = parser.parse_args()
    Receiver.secret = secrets.token_hex(16)
    receiver = HTTPServer(("127.0.0.1", options.port), Receiver)
    client = MlflowClient(options.server)
    for old in client.list_webhooks():
        if old.name == "production":
            client.delete_webhook(old.webhook_id)
    client.create_webhook(
        "production", f"http://127.0.0.1:{options.port}/", [EVENT], secret=Receiver.secret
    )
    print(f"listening on port {options.port}", flush=True)
    receiver.serve_forever()


if __name__ == "__main__":
    main()
