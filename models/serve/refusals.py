"""What a request is refused with."""

from __future__ import annotations


class Refused(Exception):
    """A request that is not answered as asked.

    Args:
        status: of HTTP.
        message: what the caller can do about it.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
