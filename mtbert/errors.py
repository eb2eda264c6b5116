"""What a user did wrong, as opposed to what we did."""


class UserError(ValueError):
    """A mistake of the user's, told in one line: what, where, what would be right. Exit code 2."""
