"""A stand-in for an OpenAI-compatible server, whose answers a test writes."""

import http.server
import json
import threading
import types

import pytest


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def server():
    """Starts servers: `reply(number, body, handler)` returns a text, (status, headers, body) or
    None, if it has written to handler.wfile itself.

    The number counts requests from 0.
    """
    running = []

    def start(reply):
        seen, lock = [], threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(seen)
                    seen.append(
                        types.SimpleNamespace(path=self.path, headers=self.headers, body=body)
                    )
                answer = reply(number, body, self)
                if answer is None:
                    return
                if isinstance(answer, str):
                    answer = (200, {}, completion(answer))
                status, headers, content = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_):  # clients that have gone
                pass

        found = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
        running.append(found)
        address = f"http://127.0.0.1:{found.server_port}/v1"
        return types.SimpleNamespace(address=address, seen=seen)

    yield start
    for found in running:
        found.shutdown()
        found.server_close()


@pytest.fixture
def clock():
    """A clock that only `sleep` moves, and the list of what was slept."""

    class Clock:
        def __init__(self):
            self.now, self.slept = 0.0, []

        def __call__(self):
            return self.now

        def sleep(self, seconds):
            self.slept.append(seconds)
            self.now += seconds

    return Clock()
