"""Schema migrations, run by `halfstep.service.store.sql.schema.migrate`; the steps are in `versions`."""
