"""Why an operator's command stops without a change."""


class OperatorError(Exception):
    """Nothing was changed. The text is for the operator. `is_usage`: what they gave makes no sense."""

    def __init__(self, text: str, is_usage: bool = False) -> None:
        super().__init__(text)
        self.is_usage = is_usage


def usage_error(text: str) -> OperatorError:
    """Return the error for arguments that make no sense."""
    return OperatorError(text, is_usage=True)
