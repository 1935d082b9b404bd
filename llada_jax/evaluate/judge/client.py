"""Chat completions from an OpenAI-compatible address."""

import dataclasses
import datetime
import email.utils
import http.client
import itertools
import json
import math
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

REQUEST = {"temperature": 0, "max_tokens": 4096}  # Arena-Hard's
_PROBE = [{"role": "user", "content": "Reply with the word: ready"}]
_LARGEST = 16 << 20  # bytes of a reply
_LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
_LOCAL = ("localhost", "127.0.0.1", "::1")


class WrongAddressError(ValueError):
    """No request can succeed: the address, the key or the model is wrong."""


class RefusedError(ValueError):
    """The server refuses this request, and would refuse it again."""


class NoAnswerError(ValueError):
    """There was no answer within the time limit."""


class _TryAgainError(Exception):
    """A failure that may pass. after: seconds that the server asks to wait."""

    def __init__(self, reason: str, *, busy: bool = False, after: float = 0.0):
        super().__init__(reason)
        self.busy, self.after = busy, after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would lose its body and show the key to another host."""

    def redirect_request(self, *args):
        return None


@dataclasses.dataclass(frozen=True)
class Client:
    """A server that completes chats. Threads may share it.

    address: up to and with the version: http://127.0.0.1:8000/v1.
    request: fields of the request besides model and messages; None leaves one out.
    key: sent as a bearer token; it is in no message and in no reply.
    timeout: seconds of one attempt without a sign of life.
    total: seconds of all attempts at one completion.
    """

    address: str
    model: str
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    key: str = dataclasses.field(default="", repr=False)
    timeout: float | int = 120
    total: float | int = 600
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        if self.key and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise ValueError("the judge's key has blanks or is not ASCII; look at its variable")

    def check(self) -> None:
        """Asks for a tiny completion. Raises ValueError at once if the address is wrong."""
        try:
            self._post(_PROBE, self.timeout)
        except _TryAgainError as error:
            if not error.busy:
                raise NoAnswerError(
                    f"{self.address}: {error}; is it an OpenAI-compatible address, as "
                    "http://127.0.0.1:8000/v1 is, and does the server run?"
                ) from error
            self.complete(_PROBE)

    def complete(self, messages: list[dict[str, str]]) -> str:
        """The text of the completion.

        Tries again, after longer and longer waits, if the server is busy or the connection fails.
        Raises NoAnswerError after `total` seconds, else WrongAddressError or RefusedError.
        """
        end = self.clock() + self.total
        for attempt in itertools.count():
            try:
                return self._post(messages, end - self.clock())
            except _TryAgainError as error:
                wait = min(2.0**attempt, _LONGEST_WAIT) * (0.5 + random.random() / 2)
                wait = max(wait, error.after)
                if self.clock() + wait >= end:
                    raise NoAnswerError(
                        f"{self.address}: {error}; gave up after {attempt + 1} attempts, since the "
                        f"next in {wait:.0f} s would pass the limit of {self.total:g} s"
                    ) from error
            self.sleep(wait)
        raise AssertionError

    def _post(self, messages: list[dict[str, str]], left: float | int) -> str:
        body = {"model": self.model, "messages": messages} | REQUEST | dict(self.request)
        request = urllib.request.Request(
            f"{self.address}/chat/completions",
            json.dumps({k: v for k, v in body.items() if v is not None}).encode(),
            {"Content-Type": "application/json", "User-Agent": "llada_jax"},
        )
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        end, timeout = self.clock() + left, min(self.timeout, max(left, 0.01))
        try:
            with self._opener().open(request, timeout=timeout) as response:
                content = self._read(response, end)
        except urllib.error.HTTPError as error:
            raise self._of_status(error, end) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise _TryAgainError(self._safe(f"{type(reason).__name__}: {reason}")) from error
        return self._text(content)

    def _opener(self) -> urllib.request.OpenerDirector:
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if urllib.parse.urlsplit(self.address).hostname in _LOCAL:
            handlers.append(urllib.request.ProxyHandler({}))
        return urllib.request.build_opener(*handlers)

    def _read(self, response, end: float) -> bytes:
        """The body. `timeout` restarts with each piece, so the whole needs a limit of its own."""
        content = b""
        while piece := response.read1(1 << 16):
            content += piece
            if len(content) > _LARGEST:
                raise _TryAgainError(f"a reply of more than {_LARGEST >> 20} MiB")
            if self.clock() >= end:
                raise _TryAgainError("a reply that does not end")
        return content

    def _text(self, content: bytes) -> str:
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = 0
        if text is not None and not isinstance(text, str):
            start = self._safe(content[:1000].decode(errors="replace"))[:100]
            raise _TryAgainError(f"the reply is no chat completion: {start!r}")
        return self._hide(text or "")  # null: a model that thought up to its last token

    def _of_status(self, error: urllib.error.HTTPError, end: float) -> Exception:
        """What an HTTP status means."""
        where = f"{self.address}: status {error.code}"
        said = self._safe(self._said(error, end))
        if 300 <= error.code < 400:
            target = self._safe(error.headers.get("Location", "elsewhere"))
            return WrongAddressError(f"{where}, it redirects to {target}; give that address")
        if error.code in (401, 403):
            sent = "the key was refused" if self.key else "it wants a key and none is set"
            return WrongAddressError(f"{where}, {sent} ({said}); set the key's variable")
        if error.code in (404, 405):
            return WrongAddressError(
                f"{where} ({said}); it has no chat/completions, or no model {self.model!r}: write "
                "http://HOST:PORT/v1, and a model that it serves"
            )
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            after = _seconds(error.headers.get("Retry-After"))
            return _TryAgainError(f"status {error.code} ({said})", busy=True, after=after)
        return RefusedError(f"{where}, the request was refused: {said}")

    def _said(self, error: urllib.error.HTTPError, end: float) -> str:
        try:
            content = self._read(error, end)
        except (OSError, http.client.HTTPException, _TryAgainError):
            return "no reason given"
        try:
            found = json.loads(content)
            found = found.get("error", found)
            return str(found.get("message", found) if isinstance(found, dict) else found)
        except (ValueError, AttributeError, RecursionError):
            return content[:1000].decode(errors="replace") or "no reason given"

    def _hide(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def _safe(self, text: str) -> str:
        """A short line without the key and without control characters."""
        line = " ".join("".join(c if c.isprintable() else " " for c in self._hide(text)).split())
        return line if len(line) <= 200 else f"{line[:200]}..."


def read_address(address: str) -> str:
    """The address without what follows the version. Raises ValueError if it is none."""
    parts = urllib.parse.urlsplit(address)
    try:
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or parts.username or parts.password:
        # It is not shown: it may hold a password.
        raise ValueError(
            "the judge's address must be http://HOST:PORT/v1 (or https), without user, password or "
            "query; a key belongs into an environment variable"
        )
    return address.rstrip("/").removesuffix("/chat/completions").rstrip("/")


def _seconds(after: str | None) -> float:
    """Retry-After in seconds: a number or a date; 0 if it is neither."""
    try:
        seconds = float(after or 0)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(str(after))
            now = datetime.datetime.now(datetime.UTC)
            seconds = (date.astimezone(datetime.UTC) - now).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
