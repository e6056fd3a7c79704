"""Numbers as text."""


def duration(seconds: float) -> str:
    """ "45 s", "12.3 min" or "13.4 h"."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def pluralize(number: int, thing: str) -> str:
    """ "1 step" or "1,200 steps"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
