"""Parameter types that components share: strict, finite, with ranges that show up in the JSON Schema.

A component's own parameters live beside its builder. No component is registered here.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict

Integer = Annotated[int, Strict()]
Real = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Positive = Annotated[Real, Field(gt=0)]
NonNegative = Annotated[Real, Field(ge=0)]
Share = Annotated[Real, Field(ge=0, lt=1)]
Count = Annotated[Integer, Field(ge=1, le=2**31 - 1)]
Width = Annotated[Integer, Field(ge=1, le=65_536)]
Seed = Annotated[Integer, Field(ge=0, le=2**63 - 1)]


class Parameters(BaseModel):
    """Base of every component's parameters: frozen, and an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NoParameters(Parameters):
    """A component without parameters."""
