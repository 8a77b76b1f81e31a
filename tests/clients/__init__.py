"""Client programs of others, tried against a fleet on the local cloud: `make test-clients`."""
