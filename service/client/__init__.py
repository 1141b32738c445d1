"""Speaking to the service over HTTP. It imports the contract and nothing else of the service."""
