"""How our processes talk over HTTP: Flask faces, keys, signatures, the ASGI server and bridge."""
