"""How values look on screen: times, sizes, rates, shares. Jinja filters; all text, escaped by the template.

A time is one `<time>` element: relative words for people without JavaScript, the absolute UTC as its title. On live
fragments the words are left to the script, so that a fragment changes only when the fleet does.
"""

from __future__ import annotations

from datetime import datetime, timezone

from markupsafe import Markup

from side_tuning.tasks import NOTHING, said_of

_UNITS = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
_BYTES = ("B", "kB", "MB", "GB", "TB")


def span(seconds: float) -> str:
    """A length of time in one unit, or two where the first is small: `40 s`, `3 min`, `26 h`, `12 d`."""
    seconds = abs(seconds)
    for unit, length in _UNITS:
        if seconds >= 2 * length or length == 1:
            return f"{seconds / length:.0f} {unit}"
    raise AssertionError("unreachable: a second always fits")


def relative(moment: datetime, now: datetime) -> str:
    """`3 min ago`, `in 12 d`, `now`."""
    seconds = (now - moment).total_seconds()
    if abs(seconds) < 1:
        return "now"
    return f"{span(seconds)} ago" if seconds > 0 else f"in {span(seconds)}"


def when(moment: datetime | None, now: datetime | None = None) -> Markup | str:
    """A `<time>` element; without `now` it shows the absolute time until the script makes it relative."""
    if moment is None:
        return NOTHING
    moment = moment.astimezone(timezone.utc)
    absolute = f"{moment:%Y-%m-%d %H:%M:%S} UTC"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        moment.isoformat(timespec="seconds"), absolute, absolute if now is None else relative(moment, now)
    )


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return NOTHING
    number, unit = float(value), 0
    while abs(number) >= 1000 and unit < len(_BYTES) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.0f} {_BYTES[unit]}" if unit == 0 or number >= 100 else f"{number:.1f} {_BYTES[unit]}"


def count(value: float | None) -> str:
    """A whole number, in groups of three."""
    return NOTHING if value is None else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def rate(per_second: float | None) -> str:
    """Samples per minute, two significant digits where they are few."""
    if per_second is None:
        return NOTHING
    per_minute = per_second * 60
    if per_minute == 0:
        return "0"
    if per_minute < 0.01:
        return "< 0.01"
    return f"{per_minute:.2g}" if per_minute < 10 else count(per_minute)


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value * 100:.1f} %"


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    if value is None:
        return NOTHING
    return f"{value:.{digits}f} {unit}".rstrip()


def short(fingerprint: str | None) -> str:
    """The first eight digits of a hash."""
    return (fingerprint or NOTHING)[:8]


def commands(words: str) -> Markup:
    """Escaped, with what stands between backticks as code."""
    return Markup("").join(Markup("<code>{}</code>").format(part) if n % 2 else part for n, part in enumerate(words.split("`")))


FILTERS = {
    "commands": commands,
    "when": when,
    "span": span,
    "size": size,
    "count": count,
    "rate": rate,
    "percent": percent,
    "number": number,
    "short": short,
    "said_of": said_of,
}
