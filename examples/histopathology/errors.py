"""The one error of the example: a user's mistake or a missing file, said in one line with its remedy."""


class ExampleError(Exception):
    """Printed without a traceback by the command line, which then exits with status 1."""
