"""Numbers as a reader wants them: three digits and a unit; a comparison within its spread is a tie."""

from __future__ import annotations

from vidfast.report.noise import Interval, Ratio


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    magnitude = abs(value)
    if magnitude >= 100:
        return f"{value:.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"


def time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{digits(seconds / scale)} {unit}"
    return f"{digits(seconds * 1e9)} ns"


def spread(interval: Interval) -> str:
    """The spread's width as a share of the median."""
    return f"{100 * (interval.high - interval.low) / interval.middle:.0f}%"


def rate(gb_per_s: float | None) -> str:
    return "" if gb_per_s is None else digits(gb_per_s)


def nbytes(value: float | None) -> str:
    if value is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def times(ratio: Ratio | None) -> str:
    """`12.3x`, or `tie` where the ratio's spread holds 1."""
    if ratio is None:
        return ""
    return "tie" if ratio.tie else f"{digits(ratio.value)}x"


def error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
