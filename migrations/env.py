"""Alembic's entry: it runs on the connection that `store.sql.schema.migrate` opened and locked."""

from alembic import context

from halfstep.service.store.tables import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    message = (
        "run `halfstep migrate`: it opens the database, lets one process at a time in, and calls Alembic"
    )
    raise RuntimeError(message)

context.configure(
    connection=connection,
    target_metadata=metadata,
    compare_type=True,
    compare_server_default=True,
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
