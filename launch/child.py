"""One rank that another process owns: it lives no longer than its parent. `tune` starts the ranks of its trials so.

    python launch/child.py PARENT RUN TOKEN RESTARTS RANK WORLD LOCAL_RANK LOCAL_WORLD RENDEZVOUS HOST [HOST ...]

Signals, records and the lock are those of `launch.job`.
"""

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path

parent = int(sys.argv[1])
if sys.platform == "linux":
    # the kernel ends this process with the one that started it, however that one ends
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != parent:
    sys.exit("the process that started this rank is gone")
os.environ["SUBMITIT_LOCAL_JOB_ID"] = str(parent)  # whom the rank's watch looks for

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.job import EXIT_CODES, Attempt, Place, _output, _trainer  # noqa: E402
from mtbert.runs import Rank, Stopwatch  # noqa: E402

run, token = Path(sys.argv[2]), sys.argv[3]
restarts, rank, world, local_rank, local_world = map(int, sys.argv[4:9])
place = Place(
    Rank(rank, world, local_rank, local_world, sys.argv[9]), socket.gethostname(), tuple(sys.argv[10:]), restarts, None
)
with _output(run, place.rank, None):
    status = Attempt(run, token, place).run_to_end(_trainer(Stopwatch()))
os._exit(EXIT_CODES[status])  # an orderly exit may wait for peers that will not come
