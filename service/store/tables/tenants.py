"""Who may ask."""

from sqlalchemy import Column, String, Table, Text, UniqueConstraint

from halfstep.service.store.tables.types import Id, JsonText, Time, metadata

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),  # the first characters, to tell keys apart in a list
    Column("secret_sha256", String(64), nullable=False),  # the secret itself is never stored
    Column("scopes", JsonText, nullable=False),
    Column("created_at", Time, nullable=False),
    Column("expires_at", Time),
    Column("revoked_at", Time),
    UniqueConstraint("secret_sha256"),
)
