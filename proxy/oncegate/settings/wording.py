"""Messages about invalid values, in the words of an operator."""

from pydantic_core import ErrorDetails

from oncegate.settings.settings import PREFIX

# The types of pydantic's errors that a setting or a field of a rule can have.
_COMPLAINTS = {
    "missing": "is required",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a text in quotes",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
}


def variable_name(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def complaint(detail: ErrorDetails) -> str:
    """Return what is wrong with a value, from pydantic's description of the error."""
    limits = {name: number_text(value) for name, value in detail.get("ctx", {}).items()}
    return _COMPLAINTS.get(detail["type"], detail["msg"]).format(**limits)


def number_text(value: object) -> str:
    """Return a value as text, a whole number without its decimal point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
