"""Ctrl-C at the end of a step, on one process or several."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hf_gradiend.training.sharding import Share


@contextmanager
def interrupts_held_back(share: Share) -> Iterator[Callable[[], None]]:
    """Ctrl-C waits until the function that this yields is called; a second one does not wait.

    A step that is cut in half leaves weights that no number of steps gives, and nothing to go on
    from. Several processes stop after the same step, also if the Ctrl-C comes to them in different
    ones; it may come to each twice, from the terminal and from the launcher.

    Args:
        share: This process among the others.

    Yields:
        A function that raises the Ctrl-C that was held back, if there was one on any process.
    """
    held: list[int] = []

    def hold(number: int, _frame: object) -> None:
        held.append(number)
        if len(held) > 1 and share.world_size == 1:
            raise KeyboardInterrupt

    def interrupt_now() -> None:
        if share.any(here=bool(held)):
            raise KeyboardInterrupt

    # Python hands signals to the main thread alone, and a handler of somebody else's stays his.
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield interrupt_now
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield interrupt_now
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
