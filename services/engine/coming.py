"""A cached prefix whose upper layers are still being decoded while the lower ones are computed with."""

from __future__ import annotations

import threading
from collections.abc import Callable

#: A wait pauses so often for what else there is to do.
PAUSE_S = 0.002


class Coming:
    """How many of the model's layers are in place. All methods may be called from any thread.

    Whoever decodes calls `there` and, in every case, `end`.

    Parameters
    ----------
    stop : callable
        Called when some layers are lost or nobody wants them any more, from any thread: what is still fetched need not come.
    """

    def __init__(self, stop: Callable[[], None] = lambda: None) -> None:
        #: Whether some layers will never be there.
        self.lost = False
        self._stop = stop
        self._there = 0
        self._ended = self._abandoned = False
        self._changed = threading.Condition()
        self._when_whole: list[Callable[[], None]] = []
        self._when_ended: Callable[[], None] = lambda: None

    def there(self, layers: int) -> None:
        """The first `layers` are in place for good."""
        with self._changed:
            self._there = layers
            self._changed.notify_all()

    def end(self, lost: bool = False) -> None:
        """Nothing is written any more: all layers are there, or some never will be."""
        with self._changed:
            self._ended, self.lost = True, lost
            self._changed.notify_all()
            if not lost and not self._abandoned:
                for call in self._when_whole:
                    call()
        if lost:
            self._stop()
        self._when_ended()

    def wait(self, layer: int, meanwhile: Callable[[], None] | None = None) -> None:
        """Until `layer` is there, or lost; now and then `meanwhile` is called."""
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._ended or self._there > layer, PAUSE_S if meanwhile else None):
                    return
            meanwhile()

    def whole(self, call: Callable[[], None]) -> None:
        """Have `call` made when all layers are there, now or by whoever ends it; not after `abandon`."""
        with self._changed:
            if not self._ended:
                self._when_whole.append(call)
            elif not self.lost:
                call()

    def abandon(self, call: Callable[[], None]) -> None:
        """Nobody wants it any more; `call` is made when nothing is written any more, now or by whoever ends it."""
        with self._changed:
            self._abandoned = True
            ended = self._ended
            if not ended:
                self._when_ended = call
        if ended:
            call()
        else:
            self._stop()
