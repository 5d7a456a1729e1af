"""What is wrong with a value, in the operator's words."""

from pydantic_core import ErrorDetails

from oncegate.settings.settings import PREFIX

# The kinds of pydantic's errors that a variable can meet, in the operator's words.
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


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def worded(detail: ErrorDetails) -> str:
    """Return what pydantic found wrong with a value, in the operator's words."""
    limits = {name: _number(value) for name, value in detail.get("ctx", {}).items()}
    return _COMPLAINTS.get(detail["type"], detail["msg"]).format(**limits)


def _number(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
