"""The client as its users install it; `make test-wheel` builds and installs it before."""
