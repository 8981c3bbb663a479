"""Numbers as people write them in options and policies: 200K images, 50MB, 0.9,0.99."""

from .errors import UsageError


def pair(option: str, text: str) -> tuple[float, float]:
    """Two numbers in one option, e.g. 0.9,0.99."""
    first, second = numbers(option, text, "two numbers", exactly=2)
    return first, second


def numbers(option: str, text: str, wanted: str = "numbers", *, exactly: int | None = None) -> tuple[float, ...]:
    """Numbers in one option, e.g. 0.9,0.99."""
    try:
        found = tuple(float(part) for part in text.split(","))
        if exactly not in (None, len(found)):
            raise ValueError
    except ValueError as error:
        raise UsageError(f"{option} {text}: give {wanted} such as 0.9,0.99") from error
    return found


def count(option: str, text: str) -> int:
    """'200K' → 200000.

    Raises:
        UsageError: not such a number.
    """
    return _number(option, text, {"K": 10**3, "M": 10**6}, "50000, 200K or 1.5M")


def size(option: str, text: str) -> int:
    """'50MB' → 50000000 bytes.

    Raises:
        UsageError: not such a number.
    """
    return _number(option, text, {"KB": 10**3, "MB": 10**6, "GB": 10**9}, "500KB, 50MB or 1.5GB")


def _number(option: str, text: str, units: dict[str, int], examples: str) -> int:
    digits = text.strip().upper()
    unit = next((unit for unit in units if digits.endswith(unit)), "")
    try:
        return round(float(digits.removesuffix(unit)) * units.get(unit, 1))
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{option} {text}: give a number such as {examples}") from error
