"""The example's only error: a user's mistake or a missing file, in one line with its remedy."""


class ExampleError(Exception):
    """Printed without a traceback by the command line, which then exits with status 1."""
