"""A whole fleet in virtual time, and the fluid model that replays days in milliseconds."""
