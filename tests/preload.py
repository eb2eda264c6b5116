"""What the fork server imports before it forks ranks. Nothing here may start a thread."""

from mtbert import trainer
from mtbert.engine import quiet_deepspeed

with quiet_deepspeed():
    assert trainer
