"""What a user did wrong, as opposed to what we did."""


class UserError(ValueError):
    """A mistake of the user's, told in one line: what, where, what would be right. Exit code 2.

    Line breaks come from what is quoted, such as a key of a file, and are left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))
