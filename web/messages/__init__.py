"""What our processes say to each other: one typed struct a message, used at both ends."""
