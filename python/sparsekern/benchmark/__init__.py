"""``python -m sparsekern bench``: what sparsity pays on this machine, measured side by side.

``cases`` says what is measured, ``contenders`` who; ``run`` measures it with ``timing`` and ``roofline`` into
rows of ``results``, which ``report`` and ``goals`` print and ``plot`` draws. ``command`` is the command line;
``tune`` measures what ``backend="auto"`` chooses by.
"""

from .cases import SUITES, Case
from .contenders import OURS, PEERS, Contender
from .results import Row, append, last_run, read
from .run import Facts, run_case
from .timing import race, speedup

__all__ = [
    "OURS",
    "PEERS",
    "SUITES",
    "Case",
    "Contender",
    "Facts",
    "Row",
    "append",
    "last_run",
    "race",
    "read",
    "run_case",
    "speedup",
]
