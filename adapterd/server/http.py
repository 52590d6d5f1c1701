"""uvicorn's fast parser, with an end to headers: it would keep collecting them as long as a client sends."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 2**10


class BoundedHttp(HttpToolsProtocol):
    """Answers 400 and closes when the headers of a request go on for MAX_HEADER_BYTES beyond its first read."""

    _is_in_headers = False
    _num_header_bytes = 0

    def data_received(self, data: bytes) -> None:
        was_in_headers = self._is_in_headers
        super().data_received(data)
        # Only reads that lie wholly within headers count: any other may hold a body as well.
        if was_in_headers and self._is_in_headers:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > MAX_HEADER_BYTES:
                self.send_400_response("The headers are too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_headers, self._num_header_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        super().on_headers_complete()
