"""Groups in before their step needs them; finished groups out, in the order they were asked for.

    group --waiting--> started --in flight--> finished --queued--> taken by its step

`flight.py` knows where each group is, and when it may start; `workers.py` lets an engine sample
them in threads; `requests.py` is what an engine offers that answers requests one by one.
"""

from .cycle import SharedCycle
from .flight import Flight, Group, Held, Sampled
from .requests import RequestEngine
from .workers import CallWorker, Converse, RequestWorkers, Workers, make_workers

__all__ = [
    "CallWorker",
    "Converse",
    "Flight",
    "Group",
    "Held",
    "RequestEngine",
    "RequestWorkers",
    "Sampled",
    "SharedCycle",
    "Workers",
    "make_workers",
]
