"""What the course does not need: a room each for formats, speed, judges, reports and runs."""

try:
    import tomllib  # noqa: F401
except ImportError:  # before Python 3.11
    import tomli as tomllib  # noqa: F401
