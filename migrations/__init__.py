"""Schema migrations, run by `halfstep.service.store.schema.migrate`; the steps are in `versions`."""
