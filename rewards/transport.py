"""JSON over HTTP to a server that scores: one request, its retries, and named errors for everything else.

What may pass is tried again: no connection, no answer in time, 408, 429 and 5xx. What will not is told at once: any
other status, a redirect (never followed), an answer that stops in its middle, is too long or is no JSON. Neither
texts, nor tokens, nor what the server said are part of a message: any of them may hold a secret.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import logging
import math
import os
import random
import re
import socket
import ssl
import stat
import threading
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from rewards.connection import trust

log = logging.getLogger(__name__)

PASSING = frozenset({408, 429})
"""Statuses below 500 that are tried again."""


_COUNTING = threading.Lock()  # not one per client: a client can be copied to another process


class RemoteError(RuntimeError):
    """A server gave no usable answer, so there are no scores: none are made up."""

    kind: str
    """One word, by which answers without a score are counted."""
    due_to_texts = False
    """Whether other texts might have been answered, so that it makes sense to ask for each by itself."""


class UnavailableError(RemoteError):
    """No answer after every try: the network, or a server that is down or too busy."""

    kind = "unavailable"


class RefusedError(RemoteError):
    """The server does not want this request, or is not the one it claims to be; asking again changes nothing."""

    kind = "refused"

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.due_to_texts = status in (400, 413, 422)


class BadAnswerError(RemoteError):
    """The server answered with something else than was agreed."""

    kind = "bad_answer"
    due_to_texts = True


class StoppedAnswerError(BadAnswerError):
    """The answer began and did not end in time."""

    due_to_texts = False


class _PassingError(Exception):
    """What may be over the next time, in words; `wait`: seconds that the server asks for."""

    def __init__(self, fault: str, wait: float = 0.0) -> None:
        super().__init__(fault)
        self.wait = wait


class JsonClient:
    """Posts JSON to one URL. Safe to call from several threads; holds no token, so neither does a copy of it."""

    def __init__(
        self,
        url: str,
        *,
        token_env: str | None = None,
        token_file: str | None = None,
        ca_file: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 0.5,
        max_wait: float = 30.0,
        max_answer_bytes: int = 16 << 20,
        seed: int = 0,
    ) -> None:
        """
        Args:
            url: https, or http on this machine alone.
            token_env, token_file: where the bearer token is: an environment variable, or a file that only its owner
                can read. At most one of them. It is read anew for every request.
            ca_file: certificates to trust instead of the system's.
            timeout: seconds of one try, from connecting to the last byte.
            retries: tries after the first one.
            backoff: seconds before the first of them; doubled each time, and cut by up to half at random.
            max_wait: seconds at most before a retry, whatever the server asks for.
            max_answer_bytes: longest answer that is read.
            seed: of the randomness; one per worker, so that they do not all return at once.

        Raises:
            ValueError: a setting that cannot be.
        """
        self._parts = check_url(url)
        if timeout <= 0 or retries < 0 or backoff < 0 or max_wait < 0 or max_answer_bytes < 1:
            raise ValueError(
                f"remote: got timeout {timeout:g}, retries {retries}, backoff {backoff:g}, max_wait {max_wait:g}, "
                f"max_answer_bytes {max_answer_bytes}, expected a time-out and a size above 0 and nothing negative; "
                "correct them"
            )
        trust(ca_file)
        self._token_env, self._token_file, self._ca_file = token_env, token_file, ca_file
        self._timeout, self._retries, self._backoff, self._max_wait = timeout, retries, backoff, max_wait
        self._max_answer_bytes = max_answer_bytes
        self._random = random.Random(seed)
        self.counts = Counter(request_count=0, retry_count=0)
        read_token(token_env, token_file)

    @property
    def place(self) -> str:
        """The URL for messages: without its query."""
        return f"{self._parts.scheme}://{self._parts.netloc}{self._parts.path}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place!r})"

    def post(self, body: Mapping[str, Any]) -> Any:
        """The answer's JSON.

        Raises:
            ValueError: a body that JSON cannot hold.
            UnavailableError, RefusedError, BadAnswerError: as the module says.
        """
        try:
            data = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.place}: got a request with values that JSON cannot hold, expected texts, finite numbers, "
                "lists and objects; send fewer columns"
            ) from error
        attempt = 0
        while True:
            with _COUNTING:
                self.counts["retry_count" if attempt else "request_count"] += 1
            try:
                return parse_json(self._try(data), self.place)
            except _PassingError as fault:
                if attempt == self._retries:
                    raise UnavailableError(
                        f"{self.place}: got {fault} in {attempt + 1} tries, expected an answer; see that the server "
                        "runs and is not overloaded, or allow more retries or time"
                    ) from None
                wait = self._wait(attempt, fault.wait)
                log.warning("%s: %s; try %d follows in %.2f s", self.place, fault, attempt + 2, wait)
            time.sleep(wait)
            attempt += 1

    def _wait(self, attempt: int, asked: float) -> float:
        grown = min(self._backoff * 2.0**attempt, self._max_wait) * self._random.uniform(0.5, 1.0)
        return max(grown, min(asked, self._max_wait))

    def _try(self, data: bytes) -> bytes:
        """The body of one answer; `_PassingError` for what may be over the next time."""
        connection = self._connection()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if (token := read_token(self._token_env, self._token_file)) is not None:
            headers["Authorization"] = f"Bearer {token}"
        target = (self._parts.path or "/") + (f"?{self._parts.query}" if self._parts.query else "")
        limit = _TimeLimit(self._timeout)
        reading = False
        try:
            connection.connect()
            limit.watch(connection.sock)
            # A server that has seen enough answers before it has read everything, and hangs up.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", target, data, headers)
            response = connection.getresponse()
            self._check_status(response)
            reading = True
            body = self._read(response)
            if limit.passed:  # an answer that ends where the connection does looks whole when it is cut
                raise TimeoutError
            return body
        except ssl.SSLCertVerificationError as error:
            raise RefusedError(
                f"{self.place}: got a certificate that cannot be trusted ({error.verify_message}), expected one of a "
                "known authority; correct the server's, or name its authority in ca_file"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError) or limit.passed:
                if reading:
                    raise StoppedAnswerError(
                        f"{self.place}: got an answer that stopped in its middle for {self._timeout:g} s, expected a "
                        "whole one; see the server's log, or allow more time"
                    ) from None
                raise _PassingError(f"no answer within {self._timeout:g} s") from None
            if isinstance(error, OSError | http.client.IncompleteRead):
                raise _PassingError(f"no connection ({type(error).__name__})") from None
            raise BadAnswerError(
                f"{self.place}: got something that is no HTTP ({type(error).__name__}), expected a server that speaks "
                "it; correct the URL"
            ) from None
        finally:
            limit.end()
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self._timeout)
        return http.client.HTTPSConnection(host, port, timeout=self._timeout, context=trust(self._ca_file))

    def _check_status(self, response: http.client.HTTPResponse) -> None:
        status = response.status
        if status == 200:
            return
        if status in PASSING or status >= 500:
            raise _PassingError(f"status {status}", retry_after(response.getheader("Retry-After")))
        if 300 <= status < 400:
            remedy = "a redirect is never followed: name the server's final address"
        elif status in (401, 403):
            remedy = "name the server's token in token_env or token_file"
        else:
            remedy = "see the server's log, and correct the URL or the request"
        raise RefusedError(f"{self.place}: got status {status}, expected 200; {remedy}", status)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        limit = self._max_answer_bytes
        body = b"" if (response.length or 0) > limit else response.read(limit + 1)
        if len(body) > limit or (response.length or 0) > limit:
            raise BadAnswerError(
                f"{self.place}: got an answer of more than {limit} bytes, expected less; see what the server sends, "
                "or raise max_answer_bytes"
            )
        if response.length:  # `read` with a size does not complain of a body that is shorter than announced
            raise http.client.IncompleteRead(b"")
        return body


class _TimeLimit:
    """Cuts a connection after some seconds: a socket's own time-out starts anew with every byte."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._timer: threading.Timer | None = None
        self.passed = False

    def watch(self, connected: socket.socket) -> None:
        def cut() -> None:
            self.passed = True
            with contextlib.suppress(OSError):  # closed meanwhile
                connected.shutdown(socket.SHUT_RDWR)

        self._timer = threading.Timer(max(0.0, self._end - time.monotonic()), cut)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def check_url(url: str) -> SplitResult:
    """The parts of an address that texts may be sent to.

    Raises:
        ValueError: no https outside this machine, a password in the address, or no address.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError("remote.url: got one that cannot be read, expected https://HOST/PATH; correct it") from error
    if parts.scheme not in ("http", "https") or not host or not re.fullmatch(r"[!-~]+", url) or parts.fragment:
        raise ValueError(
            f"remote.url: got scheme {parts.scheme!r} and host {host!r}, expected https://HOST/PATH, or http on this "
            "machine; correct it"
        )
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"remote.url: got a user or password in the address of {host}, expected none: addresses are logged; "
            "name a token in token_env or token_file"
        )
    if parts.scheme == "http" and not is_loopback(host):
        raise ValueError(
            f"remote.url: got http to {host}, expected https: texts and token would travel in the clear; use https, "
            "or an SSH tunnel to 127.0.0.1"
        )
    return parts


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its address or as `localhost`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(env: str | None, file: str | None) -> str | None:
    """The bearer token in an environment variable or in a file that only its owner can read; None without both.

    Raises:
        ValueError: both are named, there is none, others can read the file, or it cannot be a header. Never shows it.
    """
    if env is not None and file is not None:
        raise ValueError("remote: got token_env and token_file, expected one of them; remove the other")
    if env is not None:
        place, text = f"environment variable {env}", os.environ.get(env, "")
    elif file is not None:
        path = Path(file).expanduser()
        place = f"token file {path}"
        try:
            with path.open(encoding="utf-8", errors="replace") as opened:
                mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
                text = opened.read(1 << 16)
        except OSError as error:
            raise ValueError(f"{place}: got none ({error.strerror}), expected a file; write the token there") from None
        if mode & 0o077:
            raise ValueError(f"{place}: got mode {mode:04o}, expected 0600: others can read it; run chmod 600 on it")
    else:
        return None
    token = text.strip()
    if not re.fullmatch(r"[!-~]+", token):
        got = "nothing" if not token else "spaces, line breaks or other characters that a header cannot hold"
        raise ValueError(f"{place}: got {got}, expected a token; write it there")
    return token


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 without one that can be read."""
    if header is None:
        return 0.0
    if re.fullmatch(r"\s*\d{1,9}\s*", header):
        return float(header)
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def parse_json(data: bytes, place: str) -> Any:
    """Strict JSON: no NaN, no infinity, no key twice.

    Raises:
        BadAnswerError: anything else.
    """
    try:
        return strict_json(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadAnswerError(
            f"{place}: got an answer of {len(data)} bytes that is no JSON ({type(error).__name__}), expected JSON "
            "without NaN or infinity; correct the server"
        ) from None


def strict_json(text: str) -> Any:
    """Raises ValueError for what is no JSON, NaN and infinity included, and for an object that has a key twice."""

    def refuse(constant: str) -> float:
        raise ValueError("a number that is not finite")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return found

    return json.loads(text, parse_constant=refuse, parse_float=number, object_pairs_hook=unique)
