"""The one exception a user is meant to read."""


class UserError(Exception):
    """A mistake the user can mend: the message says what is wrong, where, and how to mend it.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """
