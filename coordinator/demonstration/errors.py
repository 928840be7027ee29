"""What ends a demonstration early."""


class DemoError(RuntimeError):
    """The demonstration cannot go on; the text says why and what to do."""
