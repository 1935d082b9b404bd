"""A judge to try the command with, by hand: an OpenAI-compatible server that only counts words.

    python tests/evaluate/judge/stand_in.py 8000

The answer that has more of the request's words wins; much better is at least twice as many.
"""

import http.server
import json
import re
import sys


def verdict(request: str, answer_a: str, answer_b: str) -> str:
    """The label for two answers."""
    words = [set(re.findall(r"\w+", text.lower())) for text in (request, answer_a, answer_b)]
    a, b = (len(words[0] & found) for found in words[1:])
    if a == b:
        return "A=B"
    much = ">>" if max(a, b) >= 2 * min(a, b) else ">"
    return f"A{much}B" if a > b else f"B{much}A"


class Judge(http.server.BaseHTTPRequestHandler):
    """Answers requests for a completion."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        texts = re.findall(r"<(\w+)>\n(.*?)\n</\1>", text, re.DOTALL)
        said = f"[[{verdict(*(found for _, found in texts))}]]" if len(texts) == 3 else "ready"
        reply = {"choices": [{"message": {"role": "assistant", "content": said}}]}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Says nothing."""


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Judge).serve_forever()
