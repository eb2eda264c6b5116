"""What a user did wrong, as opposed to what we did."""

import argparse
from typing import NoReturn


class UserError(ValueError):
    """A mistake of the user's, told in one line: what, where, what would be right. Exit code 2.

    Line breaks come from what is quoted, such as a key of a file, and are left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def to_install(extra: str) -> str:
    """How a pip extra is had, as the README has it: pinned, and from the checkout, for no index has this package."""
    return f"pip install -c constraints.txt -e '.[{extra}]' in the checkout"


def count(text: str) -> int:
    """Of something, on a command line: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


class CommandLine(argparse.ArgumentParser):
    """A parser that tells its mistakes in one line as well: argparse puts the usage before, thirty lines for some."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help shows what there is)\n")
