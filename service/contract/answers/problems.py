"""The problem document: what a request that failed is answered with."""

from typing import Literal

from pydantic import BaseModel, Field

from halfstep.service.contract.answers.examples import PROBLEM
from halfstep.service.contract.answers.values import with_example


class WrongPlace(BaseModel):
    """One wrong place of a request: in the body by `pointer`, elsewhere by `in` and `parameter`."""

    pointer: str | None = Field(default=None, description="JSON pointer (RFC 6901) into the body.")
    where: Literal["query", "path", "header"] | None = Field(default=None, alias="in")
    parameter: str | None = None
    detail: str = Field(description="What is wrong and what to do.")


class Problem(BaseModel):
    """Why a request failed (RFC 9457). The rejected input is never repeated."""

    model_config = with_example(PROBLEM)

    type: str = Field(description="`about:blank`: `code` tells the kind.")
    title: str
    status: int
    detail: str
    instance: str = Field(description="The request's path.")
    code: str = Field(description="Stable and made for programs.")
    errors: list[WrongPlace] = Field(default=[], description="Each wrong place, where places are known.")
