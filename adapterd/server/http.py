"""uvicorn's fast parser, with an end to what a client may send, and to how long a connection may stand still.

uvicorn keeps collecting headers as long as a client sends them, waits without end for the rest of a request, and for
a reader to take what was written. Here whoever gets on, however slowly, is never cut; whoever does not is.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 2**10
"""Of all headers of one request together, those behind a chunked body included."""

_HEADER_OVERHEAD_BYTES = 32
"""What a header counts beside its letters: many tiny ones take more memory than a long one. HTTP/2 counts so."""


class BoundedHttp(HttpToolsProtocol):
    """One connection. Headers that go on beyond MAX_HEADER_BYTES are answered 400, and end it.

    A connection that waits for its client ends after `request_seconds`: the whole head of a request has to come
    within that time, and so has what is left of a request that was answered before all of it was here. While an
    answer is made there is no limit. An answer of which the client takes nothing for `send_seconds` is cut.
    A second request before the answer to the first is not read: that answer is the connection's last.
    """

    request_seconds = 60.0
    send_seconds = 60.0
    look_seconds = 5.0
    """How often a connection is looked at; the two above are as exact as this."""

    _num_header_bytes = 0
    _num_unparsed_bytes = 0  # sent since the last whole head, piece of a body, or end of a request
    _waits_since_seconds: float | None = None  # None while an answer is made
    _ends_after_answer = False
    _num_unsent_bytes = 0
    _taken_at_seconds = 0.0
    _next_look: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits_since_seconds = self.loop.time()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        now, waits_since = self.loop.time(), self._waits_since_seconds
        num_unsent_bytes = self.transport.get_write_buffer_size()
        if num_unsent_bytes == 0 or num_unsent_bytes != self._num_unsent_bytes:
            self._num_unsent_bytes, self._taken_at_seconds = num_unsent_bytes, now
        if now - self._taken_at_seconds > self.send_seconds:
            self.transport.abort()  # to close it would be to wait for the reader
        elif waits_since is not None and now - waits_since > self.request_seconds:
            self.transport.close()
        self._next_look = self.loop.call_later(self.look_seconds, self._look)

    # What comes

    def data_received(self, data: bytes) -> None:
        if self._ends_after_answer:
            return
        self._num_unparsed_bytes += len(data)
        super().data_received(data)
        # The parser says nothing of a header before its end, and it may have none.
        if self._num_unparsed_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_header_bytes = 0
        self._wait_anew()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_header_bytes += len(name) + len(value) + _HEADER_OVERHEAD_BYTES
        if self._num_header_bytes > MAX_HEADER_BYTES:
            raise ValueError("the headers are too large")  # stops the parser, and is answered 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_unparsed_bytes = 0
        if self.cycle is not None and not self.cycle.response_complete:
            # uvicorn would let it wait and stop reading, and so never hear that the client has left.
            self.cycle.keep_alive = False
            self._ends_after_answer = True
            return
        self._waits_since_seconds = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_unparsed_bytes = 0
        if not self._ends_after_answer:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_unparsed_bytes = 0
        if not self._ends_after_answer:
            super().on_message_complete()
            self._wait_anew()

    # What goes

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._waits_since_seconds = self.loop.time()

    def _wait_anew(self) -> None:
        if self._waits_since_seconds is not None:
            self._waits_since_seconds = self.loop.time()
