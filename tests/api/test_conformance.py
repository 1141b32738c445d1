"""Requests generated from the OpenAPI document, and answers checked against it."""

import sys
from collections.abc import Iterator
from typing import Any

from hypothesis import Phase
from schemathesis.checks import CHECKS, load_all_checks

print(sys.version, load_all_checks, CHECKS, Phase, Iterator, Any)
