"""What a session promises while devices fail, in one place for those that measure it and those that show it."""

NAMED_S = 5.0  # from a fault to the sentence that names the device, at most
SERVED_S = 20.0  # until the next answer, at most
MAX_GROWTH = 0.02  # of memory, after the warm-up
