# ---- what writers write ------------------------------------------------------------------------------------

def fill(image, number):
    """Writer: the given fill of the given image, before the daemon has it."""
    return 1 << 40 | image << 16 | number


def step(number):
    """Writer: this step."""
    return 2 << 40 | number


def pattern(value, offset, length):
    """What a writer writes: 16 bytes over and over that say who it is, and where the grain begins."""
    if value == 0:
        return bytes(length)
    data = bytearray()
    while len(data) < length:
        at = offset + len(data)
        grain, inside = at - at % GRAIN, at % GRAIN
        stamp = struct.pack("<QQ", 0xb10c << 48 | value, grain ^ 0x5eed5eed5eed5eed) * (GRAIN // 16)
        data += stamp[inside:]
    return bytes(data[:length])


def whose(data, at, offset):
    """Who wrote the byte at `at`; `data` begins at `offset` of the disk."""
    at -= (offset + at) % 16
    unit, grain = data[max(at, 0):at + 16], offset + at - (offset + at) % GRAIN
    if not any(unit):
        return who(0)
    value, place = struct.unpack("<QQ", unit) if len(unit) == 16 else (0, 0)
    value, place = value ^ 0xb10c << 48, place ^ 0x5eed5eed5eed5eed
    if value >> 42:
        return f"bytes that nobody wrote ({unit.hex()})"
    return who(value) + ("" if place == grain else f", which belongs at {place:#x}")


def who(value):
    """For messages."""
    if value >> 40 == 1:
        return f"fill {value & 0xffff} of image {value >> 16 & 0xffffff}"
    return f"what step {value & 0xffffffffff} wrote" if value else "zeroes"
