"""What submitit starts on every rank in place of plain `python`: imports come from beside this file, nowhere else.

`python -m` would look in the working directory first, and that is the checkout the snapshot is there to replace.
Called as `python start.py -u -m submitit.core._submit FOLDER`; the words in the middle are submitit's.
"""

import signal
import sys
from pathlib import Path

# until the job has its own handlers, a signal that asks for a stop would end the interpreter
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
sys.path[0] = str(Path(__file__).resolve().parent.parent)
sys.argv[1:] = sys.argv[-1:]

from submitit.core.submission import submitit_main  # noqa: E402

submitit_main()
