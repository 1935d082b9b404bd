"""The client against a server that fails, stalls, talks nonsense, redirects and lies."""

import datetime
import email.utils
import json
import socket
import time

import pytest

from llada_jax.evaluate.judge import client as clients
from llada_jax.evaluate.judge.client import (
    Client,
    NoAnswerError,
    RefusedError,
    WrongAddressError,
    read_address,
)

ASK = [{"role": "user", "content": "hello"}]
KEY = "sk-invented-0123456789"


def client(address, clock, **changes):
    fields = dict(model="tiny", key=KEY, timeout=0.2, total=100, sleep=clock.sleep, clock=clock)
    return Client(address, **fields | changes)


def test_a_completion(server, clock):
    there = server(lambda *_: f"hi {KEY}")
    found = client(there.address, clock, request={"max_tokens": None, "seed": 3}).complete(ASK)
    assert found == "hi ***"  # the key, should a server send it back, is in no file
    (seen,) = there.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["Authorization"] == f"Bearer {KEY}"
    assert seen.body == {"model": "tiny", "messages": ASK, "temperature": 0, "seed": 3}


def test_without_a_key_none_is_sent(server, clock):
    there = server(lambda *_: "hi")
    client(there.address, clock, key="").complete(ASK)
    assert "Authorization" not in there.seen[0].headers


def cut(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
    handler.connection.shutdown(socket.SHUT_RDWR)


FAILURES = {
    "busy": lambda h: (503, {}, b"later"),
    "broken": lambda h: (500, {}, b'{"error": {"message": "out of memory"}}'),
    "too many": lambda h: (429, {}, b""),
    "no JSON": lambda h: (200, {}, b"<html>"),
    "another JSON": lambda h: (200, {}, b'{"choices": []}'),
    "deep JSON": lambda h: (200, {}, b"[" * 100_000),
    "a number": lambda h: (200, {}, b'{"choices": [{"message": {"content": 5}}]}'),
    "cut": cut,
    "closed": lambda h: h.connection.shutdown(socket.SHUT_RDWR),
    "no HTTP": lambda h: h.wfile.write(b"\x00\x01\x02") and None,
    "silent": lambda h: time.sleep(0.4),
    "huge": lambda h: (200, {}, b'{"choices": [{"message": {"content": "x"}}]}' + b" " * 300_000),
}


@pytest.mark.parametrize("name", FAILURES)
def test_it_tries_again(server, clock, name, monkeypatch):
    monkeypatch.setattr(clients, "_LARGEST", 200_000)
    there = server(lambda n, body, handler: FAILURES[name](handler) if n < 3 else "at last")
    assert client(there.address, clock).complete(ASK) == "at last"
    assert len(there.seen) == 4
    # Waits double, each by chance down to its half.
    assert [0.5 * 2**k <= slept <= 2**k for k, slept in enumerate(clock.slept)] == [True] * 3


def test_a_null_content_is_an_empty_reply(server, clock):
    there = server(lambda *_: (200, {}, b'{"choices": [{"message": {"content": null}}]}'))
    assert client(there.address, clock).complete(ASK) == ""


@pytest.mark.parametrize("name", ["busy", "cut", "no JSON", "silent"])
def test_it_gives_up_within_the_limit(server, clock, name):
    there = server(lambda n, body, handler: FAILURES[name](handler))
    with pytest.raises(NoAnswerError, match=r"gave up after \d+ attempts.*limit of 20 s"):
        client(there.address, clock, total=20, timeout=0.05).complete(ASK)
    # Waits are 1, 2, 4, 8, 16 s at most, and half of that at least.
    assert 4 <= len(there.seen) <= 6 and clock.now + clock.slept[-1] * 4 > 20 > clock.now


def test_a_reply_that_drips_does_not_outlive_the_limit(server):
    def drip(n, body, handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.02)

    there, began = server(drip), time.monotonic()
    with pytest.raises(NoAnswerError, match="a reply that does not end"):
        Client(there.address, "tiny", timeout=5, total=0.3).complete(ASK)
    assert time.monotonic() - began < 1.5


def soon(seconds):
    return email.utils.format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), usegmt=True
    )


@pytest.mark.parametrize(
    ("after", "least", "most"),
    [
        ("30", 30, 30),
        ("0.5", 0.5, 1),
        (50, 40, 50),  # as a date
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 1),
        ("-7", 0, 1),
        ("nan", 0, 1),
        ("inf", 0, 1),
        ("soon", 0, 1),
        ("9" * 400, 0, 1),
    ],
)
def test_retry_after(server, clock, after, least, most):
    after = soon(after) if isinstance(after, int) else after
    there = server(lambda n, *_: "ok" if n else (429, {"Retry-After": after}, b""))
    assert client(there.address, clock).complete(ASK) == "ok"
    assert least <= clock.slept[0] <= most


def test_a_longer_wait_than_the_limit_is_not_begun(server, clock):
    there = server(lambda *_: (429, {"Retry-After": "3600"}, b'{"message": "quota used up"}'))
    with pytest.raises(NoAnswerError, match="status 429 .quota used up.; gave up after 1 attempts"):
        client(there.address, clock).complete(ASK)
    assert clock.slept == []


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, WrongAddressError, "the key was refused"),
        (403, WrongAddressError, "the key was refused"),
        (404, WrongAddressError, "no model 'tiny'"),
        (405, WrongAddressError, "no chat/completions"),
        (400, RefusedError, "the request was refused"),
        (413, RefusedError, "the request was refused"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(server, clock, status, error, words):
    said = json.dumps({"error": {"message": f"line\none \x1b[31m {KEY}" + "x" * 900}}).encode()
    there = server(lambda *_: (status, {}, said))
    with pytest.raises(error, match=words) as caught:
        client(there.address, clock).complete(ASK)
    text = str(caught.value)
    assert len(there.seen) == 1 and KEY not in text and "line one [31m ***xxx" in text
    assert text.isprintable() and len(text) < 500


def test_a_redirect_is_not_followed(server, clock):
    """A redirected request would show the key to the other host."""
    thief = server(lambda *_: "thanks")
    there = server(lambda *_: (302, {"Location": thief.address}, b""))
    with pytest.raises(WrongAddressError, match=f"redirects to {thief.address}; give that address"):
        client(there.address, clock).complete(ASK)
    assert thief.seen == []


def test_check(server, clock):
    there = server(lambda n, *_: "ready" if n > 1 else (503, {}, b"loading"))
    client(there.address, clock).check()
    assert len(there.seen) == 3  # a server that loads its model is waited for
    page = server(lambda *_: (200, {}, b"<html>welcome"))
    with pytest.raises(NoAnswerError, match="no chat completion: '<html>welcome'; is it an OpenAI"):
        client(page.address, clock).check()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(NoAnswerError, match="Connection refused; is it an OpenAI"):
            client(f"http://127.0.0.1:{free.getsockname()[1]}/v1", clock).check()
    assert len(page.seen) == 1


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_is_none(clock, key):
    with pytest.raises(ValueError, match="the judge's key has blanks") as caught:
        client("http://127.0.0.1:9/v1", clock, key=key)
    assert key not in str(caught.value)


def test_the_key_is_not_shown(clock):
    assert KEY not in repr(client("http://127.0.0.1:9/v1", clock))


def test_addresses():
    for tail in ("", "/", "/chat/completions", "/chat/completions/"):
        assert read_address(f"http://h:1/v1{tail}") == "http://h:1/v1"
    for bad in (
        "http://me:secret@h/v1",
        "http://secret@h/v1",
        "https://h/v1?key=secret",
        "http:///v1",
        "http:secret",
        "http://h:99999/v1",
        "http://h:x/v1",
        "http://h:0/v1",
    ):
        with pytest.raises(ValueError, match="http://HOST:PORT/v1") as caught:
            read_address(bad)
        assert "secret" not in str(caught.value)


def test_a_proxy_is_not_asked_for_this_machine(server, clock, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    there = server(lambda *_: "hi")
    assert client(there.address, clock).complete(ASK) == "hi"
