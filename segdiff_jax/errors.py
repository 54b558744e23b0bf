"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, in which file or flag, and the mend.

    Entry points print it without a traceback and exit with `exit_code`.
    """

    exit_code = 2
