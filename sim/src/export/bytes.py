# ---- what writers write ------------------------------------------------------------------------------------

def pattern(value, offset, length):
    """What a writer writes: its own byte all over."""
    return bytes([value]) * length


def whose(data, at, offset):
    """Who wrote the byte at `at`."""
    return who(data[at])


def who(value):
    """For messages."""
    return f"{value:#x} ({WRITERS.get(value, 'nobody writes that')})"
