"""The operator's page in a real browser; `make test-page` makes what these tests need."""
