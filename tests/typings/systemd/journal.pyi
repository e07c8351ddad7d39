import logging
from collections.abc import Callable

def send(MESSAGE: str, MESSAGE_ID: object = ..., **kwargs: object) -> None: ...

class JournalHandler(logging.Handler):
    def __init__(
        self, level: int = ..., sender_function: Callable[..., object] = ..., **kwargs: object
    ) -> None: ...
