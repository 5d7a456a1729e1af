"""How a command of an operator says that it does nothing."""

NOT_DONE, WRONG = 1, 2  # exit codes


class Refusal(Exception):
    """Why a command does nothing, for the operator. `code`: the exit code."""

    def __init__(self, text: str, code: int = NOT_DONE) -> None:
        super().__init__(text)
        self.code = code
