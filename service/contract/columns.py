"""The table of the step record's columns: what each one is, and all that follows from it.

Stored chunks, roll-ups, plots, the summary, answers, CSV and the API's document follow this table; a column
that is added here, and filled by the worker, is in all of them. Programs of other versions have other tables:
a reader gives null for a column that a chunk lacks, and passes over one that it does not know. What a name
means never changes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from halfstep.service.contract.precision import ComputeDtype

COMPUTE_DTYPES: tuple[ComputeDtype, ...] = get_args(ComputeDtype)

ColumnType = Literal["number", "integer", "flag", "choice"]
Fold = Literal["last", "count", "first", "min", "max"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the step record.

    Attributes:
        name: as in every answer; never reused for something else.
        type: a flag is true or false, a choice is one of `choices`.
        meaning: one sentence without a full stop.
        unit: None for what has none.
        nullable: the worker may leave it out of a step. A step that was stored before the column existed has
            null for it in any case.
        in_summary: the newest step's value is in the job's summary, which has a field of this name.
        choices: in the order of their stored codes: new ones go to the end.
    """

    name: str
    type: ColumnType
    meaning: str
    unit: str | None = None
    nullable: bool = False
    in_summary: bool = False
    choices: tuple[str, ...] = ()

    @property
    def folds(self) -> dict[str, Fold]:
        """What a bucket of a plot, and an entry of a roll-up, has of it, and how many of them become one.

        The one of the column's own name is its value at the last step, or how often a flag was true.
        """
        if self.type == "flag":
            return {self.name: "count"}
        ends: dict[str, Fold] = {self.name: "last", f"{self.name}_first": "first"}
        if self.type == "choice":
            return ends
        return {**ends, f"{self.name}_min": "min", f"{self.name}_max": "max"}

    @property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of the column in an answer: a list of its values."""
        forms: dict[ColumnType, list[dict[str, Any]]] = {
            "number": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}],
            "integer": [{"type": "integer"}],
            "flag": [{"type": "boolean"}, {"type": "integer"}],  # counted in a bucket
            "choice": [{"enum": list(self.choices)}],
        }
        form = forms[self.type]
        items = form[0] if self.name == "step" else {"anyOf": [*form, {"type": "null"}]}
        unit = f", in {self.unit}" if self.unit else ""
        return {"type": "array", "items": items, "description": f"{self.meaning}{unit}."}


@dataclass(frozen=True)
class ColumnTable:
    """Columns in the order of every answer, `step` first, and what is looked up in them often."""

    columns: tuple[Column, ...]
    names: tuple[str, ...] = field(init=False)
    by_name: dict[str, Column] = field(init=False, compare=False)
    folds: dict[str, Fold] = field(init=False, compare=False)
    of_series: dict[str, Column] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.columns or self.columns[0].name != "step":
            raise ValueError("the table of columns must begin with step")
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError(f"the table of columns has a name twice: {', '.join(names)}")
        object.__setattr__(self, "names", tuple(names))
        object.__setattr__(self, "by_name", {column.name: column for column in self.columns})
        folds = [(each, how) for column in self.columns[1:] for each, how in column.folds.items()]
        if len(dict(folds)) < len(folds):
            raise ValueError("two columns of the table have a series of the same name in plots")
        object.__setattr__(self, "folds", dict(folds))
        of_series = {each: column for column in self.columns[1:] for each in column.folds}
        object.__setattr__(self, "of_series", of_series)

    def of_type(self, *types: ColumnType) -> tuple[str, ...]:
        """The names of the columns of these types, in order."""
        return tuple(column.name for column in self.columns if column.type in types)

    def plus(self, added: Iterable[Column]) -> "ColumnTable":
        """This table with more columns at its end."""
        return ColumnTable((*self.columns, *added))


RECORD = ColumnTable(
    (
        Column("step", "integer", "Optimizer steps attempted, skipped ones included, from 1"),
        Column("epoch", "integer", "The epoch of the step's samples, from 1"),
        Column("loss", "number", "Mean over the step's micro-batches, unscaled", in_summary=True),
        Column("scale", "number", "The loss scale used in this step; 1.0 where nothing is scaled"),
        Column("overflow", "flag", "Gradients were not finite, and a smaller scale cures that"),
        Column("nan", "flag", "The loss was not finite, or gradients were and no scale cures that"),
        Column("underflow", "flag", "The underflow estimate was above its threshold"),
        Column("skipped", "flag", "The step changed no weights"),
        Column("has_inf", "flag", "An infinity was among the loss or the gradients"),
        Column("has_nan", "flag", "A NaN was among the loss or the gradients"),
        Column(
            "underflow_estimate",
            "number",
            "Relative rounding error that the range of FP16 puts on the gradients",
            in_summary=True,
        ),
        Column(
            "grad_norm",
            "number",
            "L2 norm of the unscaled gradients over all parameters, before clipping",
            in_summary=True,
        ),
        Column(
            "learning_rate",
            "number",
            "Of the first parameter group, as used in this step",
            in_summary=True,
        ),
        Column(
            "memory_usage", "number", "Share of the device's or host's memory, from 0 to 1", in_summary=True
        ),
        Column(
            "memory_allocated_bytes", "integer", "Memory in use by tensors", unit="bytes", in_summary=True
        ),
        Column("memory_reserved_bytes", "integer", "Memory held in all", unit="bytes", in_summary=True),
        Column(
            "step_time_ms",
            "number",
            "From the end of the step before to the end of this one; NaN where it is not measured",
            unit="milliseconds",
        ),
        Column(
            "compute_dtype",
            "choice",
            "The data type that the step computed in",
            in_summary=True,
            choices=COMPUTE_DTYPES,
        ),
    )
)
"""The table that this version writes and answers with. Read it from the module, at the time of use."""
