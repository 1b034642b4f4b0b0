"""What all clients of a run may send and spend together, and how fast."""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from extras.judges.waits import Pace


@dataclass
class Ledger:
    """What all clients of one run have sent and spent together."""

    requests: int = 0
    spent: float = 0.0
    held: float = 0.0  # what requests under way can cost at most
    clients: list = field(default_factory=list)
    paces: dict = field(default_factory=dict)  # {address: Pace}
    lock: threading.Lock = field(default_factory=threading.Lock)

    def pace(self, address: str, per_minute: float) -> Pace:
        """The pace of all clients that ask at an address."""
        pace = self.paces.setdefault(address, Pace())
        pace.limit(per_minute)
        return pace

    def tell(self, say: Callable[[str], None]) -> None:
        """Report what each client was asked and what it cost, if that is news."""
        for client in self.clients:
            if client.counts != client.reported:
                client.reported = Counter(client.counts)
                say(client.summary())

    def close(self, say: Callable[[str], None]) -> None:
        """The run is over, however it ended: report, and count from zero."""
        self.tell(say)
        self.requests, self.spent, self.held = 0, 0.0, 0.0
        self.clients, self.paces = [], {}


RUN = Ledger()  # that of this process
