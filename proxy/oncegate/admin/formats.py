"""How pages write numbers and times. Pure."""

from datetime import UTC, datetime

# Of a line that shows how a number went, in pixels.
LINE_WIDTH, LINE_HEIGHT = 120, 24


def age(ms: float) -> str:
    """Return a duration in its two largest units, such as `2 h 5 min`."""
    seconds = max(0, int(ms)) // 1000
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if hours == 0:
        return f"{minutes} min {seconds % 60} s" if minutes < 10 else f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 2 else f"{days} d {hours % 24} h"


def count(number: float) -> str:
    """Return a whole number in groups of three digits."""
    return f"{number:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def decimal(number: float) -> str:
    """Return a number with as many digits as tell something."""
    if number >= 100:
        return count(number)
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}".rstrip("0").rstrip(".")


def money(amount: float) -> str:
    """Return an amount with two digits behind the point; what is less than a cent has more."""
    return (
        f"{amount:,.2f}".replace(",", "\N{NARROW NO-BREAK SPACE}") if amount >= 0.01 or not amount else f"{amount:.4f}"
    )


def duration(seconds: float) -> str:
    """Return a short time in ms, a longer one in s."""
    return f"{decimal(seconds * 1000)} ms" if seconds < 1 else f"{decimal(seconds)} s"


def size(number: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    if number < 1024:
        return f"{number:.0f} bytes"
    units = iter(("KiB", "MiB", "GiB", "TiB"))
    while (unit := next(units)) != "TiB" and number >= 1024 * 1024:
        number /= 1024
    return f"{decimal(number / 1024)} {unit}"


def iso_time(ms: int) -> str:
    """Return a time in ms since 1970 as `<time datetime>` has it."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        # A damaged record may say anything.
        return ""


def clock(ms: int) -> str:
    """Return a time as people read it, in UTC."""
    return iso_time(ms).replace("T", " ").replace("+00:00", " UTC")


def line(values: list[float]) -> str:
    """Return the points of a line through values, the highest at the top and 0 at the bottom; empty without values."""
    if len(values) < 2:
        return ""
    highest, step = max(*values, 0.0) or 1.0, LINE_WIDTH / (len(values) - 1)
    # A pixel above and below, so that the line is as thick everywhere.
    heights = [LINE_HEIGHT - 1 - value / highest * (LINE_HEIGHT - 2) for value in values]
    return " ".join(f"{number * step:.1f},{height:.1f}" for number, height in enumerate(heights))


FORMATS = {one.__name__: one for one in (age, count, decimal, duration, size, iso_time, clock, line)}
