"""A process that encodes texts: `python -m anytimed.data.worker FD`, started by `worker_pool`, never by a person.

FD is its end of a socket. The first frame says how to build the tokenizer, and is answered by what it came out as;
every other frame is a piece of texts, and is answered by its tokens or by what encoding raised. One thread receives,
so that the daemon can send ahead, one encodes, one sends. The socket's end is the process's end: when the daemon is
gone, so is the worker. It ignores the signals that a terminal or a service manager sends to all, for the daemon may
still need it until it closes the socket.

A frame is a header (`HEADER`: kind, number of texts, bytes of the body) and a body: JSON, or int64 lengths followed by
UTF-8 or int32 tokens. Both ends run on one machine: native byte order.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from anytimed.contracts import (
    AnytimedError,
    ConfigError,
    CorruptError,
    Json,
    Refused,
    StreamUnavailable,
    Tokenizer,
    Tokens,
)
from anytimed.data.encoding import Rebuild, encode_all, identity, return_memory

HEADER = struct.Struct("=IIQ")
BUILD, TEXTS, BUILT, TOKENS, FAILED = range(1, 6)

Frame = tuple[int, int, NDArray[np.uint8]]
"""Kind, number of texts, body."""


# --- frames -----------------------------------------------------------------------------------------------------------


def json_frame(kind: int, value: Any) -> bytes:
    body = json.dumps(value).encode()
    return HEADER.pack(kind, 0, len(body)) + body


def texts_frame(texts: Sequence[str]) -> bytes:
    # A lone surrogate breaks the contract; the tokenizer says so, as it would without workers.
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    lengths = np.array([len(text) for text in encoded], np.int64).tobytes()
    body = len(lengths) + sum(map(len, encoded))
    return b"".join([HEADER.pack(TEXTS, len(texts), body), lengths, *encoded])


def tokens_frame(tokens: Sequence[Tokens]) -> bytes:
    lengths = np.array([one.size for one in tokens], np.int64).tobytes()
    flat = [np.ascontiguousarray(one, np.int32).data.cast("B") for one in tokens if one.size]
    body = len(lengths) + sum(map(len, flat))
    return b"".join([HEADER.pack(TOKENS, len(tokens), body), lengths, *flat])


def texts_of(count: int, body: NDArray[np.uint8]) -> list[str]:
    bounds, content = _split(count, body)
    return [str(content.data[a:b], "utf-8", "surrogatepass") for a, b in pairwise(bounds)]


def tokens_of(count: int, body: NDArray[np.uint8]) -> list[Tokens]:
    """Arrays of their own: the few that are kept for long must not keep all of the frame."""
    bounds, content = _split(count, body)
    flat = content.view(np.int32)
    return [flat[a:b].copy() for a, b in pairwise(bounds)]


def _split(count: int, body: NDArray[np.uint8]) -> tuple[list[int], NDArray[np.uint8]]:
    """Where each text begins and the last one ends, and what follows the lengths."""
    lengths = body[: 8 * count].view(np.int64)
    return [0, *np.cumsum(lengths).tolist()], body[8 * count :]


# --- errors -----------------------------------------------------------------------------------------------------------

_KNOWN: dict[str, type[Exception]] = {
    f"{known.__module__}.{known.__name__}": known
    for known in (
        *(AnytimedError, ConfigError, CorruptError, Refused, StreamUnavailable),
        *(MemoryError, OSError, OverflowError, RuntimeError, TypeError, ValueError),
    )
}


def failed_frame(error: BaseException, index: int = 0) -> bytes:
    """index: of the text in its piece."""
    classes = [f"{one.__module__}.{one.__qualname__}" for one in type(error).__mro__]
    return json_frame(FAILED, {"classes": classes, "message": str(error), "index": index})


def error_of(failed: Json) -> Exception:
    """What `failed_frame` was given, or the nearest class of it that is known to all and takes a text."""
    known = next((name for name in failed["classes"] if name in _KNOWN), None)
    if known is None:
        return RuntimeError(f"{failed['classes'][0]}: {failed['message']}")
    return _KNOWN[known](failed["message"])


# --- the process ------------------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> NoReturn:
    """Build what the first frame says, then encode until the socket ends."""
    received: SimpleQueue[Frame] = SimpleQueue()
    replies: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_ending, args=(_receive, connection, received), daemon=True).start()
    tokenizer, answer = _built(received.get())
    return_memory()
    # before any piece is begun, and before another thread sends: a piece that ends this process is no failed start
    with contextlib.suppress(OSError):
        connection.sendall(answer)
    Thread(target=_ending, args=(_send, connection, replies), daemon=True).start()
    while True:
        if tokenizer is None:  # the daemon is about to close the socket
            received.get()
        else:
            replies.put(_reply(tokenizer, received.get()))  # nothing of a long text is kept here meanwhile


def _built(frame: Frame) -> tuple[Tokenizer | None, bytes]:
    """The tokenizer, and the frame that says what it is or why there is none."""
    try:
        tokenizer = Rebuild.from_json(json.loads(frame[2].tobytes())).build()
        return tokenizer, json_frame(BUILT, identity(tokenizer))
    except BaseException as error:  # noqa: BLE001 - raised again in the daemon
        return None, failed_frame(error)


def _reply(tokenizer: Tokenizer, frame: Frame) -> bytes:
    tokens: Sequence[Tokens] = ()
    try:
        tokens, error = encode_all(tokenizer, texts_of(*frame[1:]))
        return tokens_frame(tokens) if error is None else failed_frame(error, len(tokens))
    except BaseException as error:  # noqa: BLE001 - raised again in the daemon; a panic of a native library is no Exception
        return failed_frame(error, len(tokens))


def _ending(work: Callable[..., None], *arguments: Any) -> None:
    """Both ends of the conversation end the process, whatever the thread that encodes is doing."""
    with contextlib.suppress(OSError):
        work(*arguments)
    os._exit(0)


def _receive(connection: socket.socket, received: SimpleQueue[Frame]) -> None:
    header = bytearray(HEADER.size)
    while _filled(connection, memoryview(header)):
        kind, count, length = HEADER.unpack(header)
        body = np.empty(length, np.uint8)
        if not _filled(connection, body.data):
            return
        received.put((kind, count, body))
        del body


def _filled(connection: socket.socket, buffer: memoryview) -> bool:
    """Whether the buffer was filled before the socket ended."""
    while buffer:
        if not (got := connection.recv_into(buffer)):
            return False
        buffer = buffer[got:]
    return True


def _send(connection: socket.socket, replies: SimpleQueue[bytes]) -> None:
    while True:
        connection.sendall(replies.get())


def main() -> NoReturn:
    for of_all in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(of_all, signal.SIG_IGN)
    # Where memory runs out, let it be the worker that ends: it is replaced, and nothing is lost.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
