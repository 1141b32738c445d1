"""Schema migrations, run by `service.store.schema.migrate`; the steps are in `versions`."""
