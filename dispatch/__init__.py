"""Which instance serves next: what is known of each, and how one is chosen. No I/O, no clock."""
