"""The errors that commands turn into exit codes."""


class UserError(ValueError):
    """A mistake the user can mend: value, rule and remedy in one line. Commands print it and exit 2."""


class CheckFailed(Exception):  # noqa: N818
    """The work failed or a check found faults, named in one line. Commands print it and exit 1."""


class Stopped(CheckFailed):
    """A signal asked for an early exit; everything done so far is in a checkpoint."""
