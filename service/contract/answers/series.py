"""The answers about a job's series."""

from pydantic import Field

from halfstep.service.contract.answers.values import Answer, Cell, Number


class Series(Answer):
    """What there is of a series of a job."""

    name: str
    count: int = Field(ge=1, description="How many points.")
    first_step: int = Field(ge=0)
    last_step: int = Field(ge=0)
    last_value: Number


class SeriesList(Answer):
    """The series of a job, by name."""

    items: list[Series]


class SeriesPage(Answer):
    """Points of a series, column by column."""

    name: str
    count: int = Field(ge=0, description="Rows in each column.")
    columns: dict[str, list[Cell]] = Field(
        description="`step` and `value`, of equal length; in buckets also `value_first`, `value_min` and "
        "`value_max`. Non-finite numbers are spelled out."
    )
    next_from_step: int | None = Field(
        default=None, description="For the next `from_step=`; null at the end."
    )
    bucket_points: int | None = Field(default=None, description="Points of one bucket, with `max_points`.")
