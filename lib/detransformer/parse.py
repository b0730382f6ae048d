"""Words from the command line to numbers, with one sentence that names the value, the limit and the remedy."""


def whole_number(text: str | int, name: str, minimum: int | None = None, maximum: int | None = None) -> int:
    """`text` as an int within the limits; `name` is how the user wrote the option, e.g. "--devices"."""
    try:
        value = int(str(text).strip())
    except ValueError:
        raise ValueError(f"{name} {text} is not a whole number; give {_range(minimum, maximum)}.") from None
    return _within(value, text, name, minimum, maximum)


def number(text: str | float, name: str, minimum: float | None = None, maximum: float | None = None) -> float:
    """`text` as a finite float within the limits."""
    try:
        value = float(str(text).strip())
    except ValueError:
        raise ValueError(f"{name} {text} is not a number; give {_range(minimum, maximum)}.") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} {text} is not a finite number; give {_range(minimum, maximum)}.")
    return _within(value, text, name, minimum, maximum)


def one_of(text: str, name: str, choices: tuple[str, ...]) -> str:
    """`text` if it is one of `choices`."""
    if text not in choices:
        raise ValueError(f"{name} {text} is unknown; choose one of {', '.join(choices)}.")
    return text


def words(text: str, name: str, choices: tuple[str, ...] | None = None) -> list[str]:
    """A comma-separated list, each word one of `choices` where they are given."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise ValueError(f"{name} is empty; give words separated by commas.")
    return [one_of(word, name, choices) for word in found] if choices else found


def _within(value, text, name, minimum, maximum):
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        raise ValueError(f"{name} {text} is out of range; give {_range(minimum, maximum)}.")
    return value


def _range(minimum, maximum) -> str:
    if minimum is None and maximum is None:
        return "a number such as 4"
    if maximum is None:
        return f"{minimum} or more"
    return f"at most {maximum}" if minimum is None else f"one from {minimum} to {maximum}"
