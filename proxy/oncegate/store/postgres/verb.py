"""One verb of the store as a function in the database, and what its columns may hold. Pure."""

from dataclasses import dataclass, field

Row = tuple[bytes | int | None, ...]

# What a column may hold: whole numbers of a range, bytes of one size, or any bytes or none.
Kind = range | int | None


@dataclass(frozen=True, slots=True)
class Verb:
    """A function that takes one array for each column, and returns rows.

    `name`: of its metric. `token_at`: the column of the token, by which a row of the result is found.
    """

    name: str
    function: str
    token_at: int
    kinds: tuple[Kind, ...]
    # Columns of whole numbers with their range, of bytes with their size, and of any bytes or none.
    _numbers: tuple[tuple[int, int, int], ...] = field(init=False)
    _sized: tuple[tuple[int, int], ...] = field(init=False)
    _free: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        columns = tuple(enumerate(self.kinds))
        numbers = tuple((at, kind.start, kind.stop) for at, kind in columns if isinstance(kind, range))
        object.__setattr__(self, "_numbers", numbers)
        object.__setattr__(self, "_sized", tuple((at, kind) for at, kind in columns if isinstance(kind, int)))
        object.__setattr__(self, "_free", tuple(at for at, kind in columns if kind is None))

    @property
    def statement(self) -> str:
        # Behind the columns: who acts, whether that is audited, and the secret's blocks.
        marks = ", ".join(f"${number}" for number in range(1, len(self.kinds) + 4))
        return f"SELECT * FROM {self.function}({marks})"

    def size(self, row: Row) -> int | None:
        """Return how many bytes the values of a row take beyond those of every row; None if the server refuses one."""
        # By kind, and not by column: half the time (measured).
        for at, first, stop in self._numbers:
            number = row[at]
            if not isinstance(number, int) or not first <= number < stop:
                return None
        for at, size in self._sized:
            value = row[at]
            if not isinstance(value, bytes) or len(value) != size:
                return None
        taken = 0
        for at in self._free:
            if (value := row[at]) is not None:
                if not isinstance(value, bytes):
                    return None
                taken += len(value)
        return taken
