"""First in PYTHONPATH of a job's ranks: at a SIGUSR1 the next module that computes something gives NaN, once."""

import signal
import sys
from typing import Any


def poison(*_: object) -> None:
    torch = sys.modules["torch"]

    def once(module: object, inputs: object, output: Any) -> Any:
        if not (torch.is_tensor(output) and output.is_floating_point() and torch.is_grad_enabled()):
            return None
        handle.remove()
        return output * float("nan")

    handle = torch.nn.modules.module.register_module_forward_hook(once)


signal.signal(signal.SIGUSR1, poison)
