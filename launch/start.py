"""What submitit starts on every rank in place of plain `python`: imports come from beside this file, nowhere else.

`python -m` would look in the working directory first, and that is the checkout the snapshot is there to replace.
Called as `python start.py -u -m submitit.core._submit FOLDER`; the words in the middle are submitit's.
"""

import os
import signal
import sys
import time
from pathlib import Path

os.environ["MTBERT_RANK_STARTED"] = str(time.time())

# a signal that asks for a stop would end the interpreter; it waits until the job has its own handlers
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
sys.path[0] = str(Path(__file__).resolve().parent.parent)
folder = Path(sys.argv[-1])
sys.argv[1:] = [str(folder)]

# a requeued job finds the half-written result of the attempt before, and submitit would refuse to write over it
for stale in folder.glob("*_result.pkl.save_tmp"):
    stale.unlink(missing_ok=True)

os.environ["SUBMITIT_FOLDER"] = str(folder)
os.environ.setdefault("SUBMITIT_LOG_LEVEL", "WARNING")
from submitit.core.job_environment import JobEnvironment  # noqa: E402
from submitit.core.submission import submitit_main  # noqa: E402

# a pickle can do anything: only one that nobody but its user, who runs this, can have written
pickle = JobEnvironment().paths.submitted_pickle
for path in (folder, *([pickle] if os.path.lexists(pickle) else [])):  # until sbatch has answered it is not there
    found = path.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        acl = "" if path == folder else ", unless its folder hands write permission on (an ACL?)"
        print(f"error: {path}: others than user {os.geteuid()} can write to it; submit it again{acl}", file=sys.stderr)
        sys.exit(2)

submitit_main()
