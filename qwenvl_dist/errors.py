"""The two ways a command ends badly, apart from a fault of our own."""


class UserError(ValueError):
    """A mistake that the user can mend: value, rule and remedy in one line. Commands print it and exit with 2."""


class CheckFailed(Exception):  # noqa: N818 (a verdict, not an accident)
    """The work ran, and a check found faults. Commands print it and exit with 1."""
