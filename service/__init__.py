"""The service: contract, store, queue, HTTP API, dispatcher and command line. Never imports torch."""
