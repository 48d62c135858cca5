"""The root of the error hierarchy, and what can go wrong in an engine."""


class ClapsepError(Exception):
    """Anything that this package reports on purpose: one sentence with what was wrong, with what, and what to do."""

    exit_code = 1


class EngineError(ClapsepError):
    """An engine could not load or run a graph."""


class EngineUnavailable(EngineError):
    """The engine kind that was asked for cannot run here; nothing else is tried in its place."""
