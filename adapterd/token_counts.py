"""Which tokens a sequence holds, for its penalties: counted as they come, never again from the beginning. No torch."""

from array import array
from collections.abc import Sequence


class TokenCounts:
    """A row for each token of the vocabulary that prompt or output have held, in the order of their first places.

    token_ids: int64 [num_rows], none twice; num_outputs: int64 [num_rows], times put out, 0 if in the prompt alone.
    Both are buffers that grow in place: who keeps a view of them copies it before the next `update`.
    """

    def __init__(self) -> None:
        self.token_ids = array("q")
        self.num_outputs = array("q")
        self._rows: dict[int, int] = {}
        self._num_counted = 0

    def update(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Count what has come to prompt and output since the last call. A sequence only ever grows: one that loses its
        memory computes its tokens again, and keeps them."""
        for position in range(self._num_counted, len(token_ids)):
            token = token_ids[position]
            row = self._rows.setdefault(token, len(self.token_ids))
            if row == len(self.token_ids):
                self.token_ids.append(token)
                self.num_outputs.append(0)
            self.num_outputs[row] += position >= num_prompt_tokens
        self._num_counted = len(token_ids)

    def row(self, token_id: int) -> int | None:
        """Where a token stands, None if the sequence does not hold it."""
        return self._rows.get(token_id)
