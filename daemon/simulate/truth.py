"""What simulated engines really hold, as JSON: over HTTP for whoever wants to compare."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from .engine import SimulatedRank, Truth


def shown(truth: Truth) -> dict[str, Any]:
    """`{"life", "last_seq", "tiers": {tier: {hash in hex: copies}}}`; a hash of group n > 0 is `HEX:n`."""
    tiers = {
        tier: {one.hex() + (f":{group}" if group else ""): copies for (one, group), copies in blocks.items()}
        for tier, blocks in truth.held.items()
    }
    return {"life": truth.life, "last_seq": truth.last_seq, "tiers": tiers}


class TruthServer:
    """Answers every GET with `{worker_id: what shown() says}` of all ranks. Raises OSError for a port that is taken."""

    def __init__(self, ranks: Sequence[SimulatedRank], port: int) -> None:
        class Answers(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = msgspec.json.encode({one.worker_id: shown(one.truth()) for one in ranks})
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with suppress(ConnectionError):  # who asked has gone
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (its name there)
                """Say nothing: stderr is for people."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Answers)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="truth", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
