"""One verb of the store as a function in the database. Pure."""

from dataclasses import dataclass

Row = tuple[bytes | int | None, ...]


@dataclass(frozen=True, slots=True)
class Verb:
    """A function that takes an array of rows, and returns rows.

    `name`: of its metric. `token_at`: the column of the token, by which a row of the result is found. `free`: the
    columns whose values may be long. `reply_bytes`: for how large a reply of one row there is to be room.
    """

    name: str
    function: str
    token_at: int
    free: tuple[int, ...] = ()
    reply_bytes: int = 0

    @property
    def statement(self) -> str:
        # Behind the rows: who acts, whether that is audited, and the secret's blocks.
        return f"SELECT * FROM {self.function}($1, $2, $3, $4)"

    def size(self, row: Row) -> int:
        """Return how many bytes the values of a row and its reply take beyond those of every row."""
        taken = self.reply_bytes
        for at in self.free:
            if isinstance(value := row[at], bytes):
                taken += len(value)
        return taken
