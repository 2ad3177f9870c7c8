"""How numbers are written for people: short, with the digits that carry meaning, and never a guess where there is no number."""

import math

ABSENT = "–"
_MAGNITUDES = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def count(number: float | None) -> str:
    """A count: whole up to a million with thousands separators, then 1.23M, 4.56B."""
    if number is None or math.isnan(number):
        return ABSENT
    for size, letter in _MAGNITUDES:
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"


def counted(number: int, noun: str) -> str:
    """A count with its noun, in the singular for one."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def measured(number: float | None, digits: int = 3) -> str:
    """A measurement with `digits` significant digits and a true minus sign."""
    if number is None or math.isnan(number):
        return ABSENT
    if number == 0 or math.isinf(number):
        return "0" if number == 0 else "∞" if number > 0 else "−∞"
    exponent = math.floor(math.log10(abs(number)))
    text = f"{number:.{max(digits - 1 - exponent, 0)}f}" if -4 <= exponent < 6 else _scientific(number, digits)
    return text.replace("-", "−")


def signed(number: float | None, digits: int = 3) -> str:
    """Like `measured`, with a plus sign where positive."""
    text = measured(number, digits)
    return f"+{text}" if number is not None and number > 0 else text


def probability(number: float | None) -> str:
    """A p-value."""
    if number is None or math.isnan(number):
        return ABSENT
    if number == 0:
        return "< 10⁻³⁰⁰"
    return f"{number:.3f}" if number >= 0.001 else _scientific(number, 2)


def size(num_bytes: float) -> str:
    """A number of bytes in the largest unit that fits: 512 B, 18.3 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.4g} TiB"


def percent(fraction: float | None) -> str:
    """A fraction in percent, two significant digits at least: 1.80%, 0.0031%."""
    if fraction is None or math.isnan(fraction):
        return ABSENT
    if fraction == 0:
        return "0%"
    value = 100 * fraction
    decimals = max(2, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}%" if abs(value) < 99.995 else f"{value:.0f}%"


def interval(low: float | None, high: float | None) -> str:
    """An interval with its true bounds; one-sided where the other bound does not exist."""
    if not is_number(low) and not is_number(high):
        return ABSENT
    return f"[{measured(low) if is_number(low) else '−∞'}, {measured(high) if is_number(high) else '∞'}]"


def duration(seconds: float | None) -> str:
    """A time span in the two largest fitting units."""
    if seconds is None or math.isnan(seconds):
        return ABSENT
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    return f"{int(hours)} h {int(minutes % 60)} min" if hours < 48 else f"{int(days)} d {int(hours % 24)} h"


def is_number(number: float | None) -> bool:
    """Whether there is a value: neither missing nor NaN."""
    return number is not None and not math.isnan(number)


def _scientific(number: float, digits: int) -> str:
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    return f"{mantissa}\u00a0×\u00a010{str(int(exponent)).translate(_SUPERSCRIPTS)}"
