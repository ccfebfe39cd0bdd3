"""Studies: several recipes on the same work, compared, searched over or planned, with repeats and intervals."""

from importlib.util import find_spec


def needs(who: str, *packages: str) -> None:
    """Said before anything is run: what a command needs that is not installed by default.

    Raises:
        ImportError: naming what is missing, and how to install it.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"{who} needs {', '.join(missing)}: pip install 'deltaworks[study]'")
