# ---- images made by QEMU's own tools -----------------------------------------------------------------------

def make(*arguments):
    code, said = tool(*arguments)
    if code:
        raise Unusable(f"{' '.join(arguments)}: {said}")


def fill(form, image, *commands):
    """Writes into an image before the daemon has it."""
    make("qemu-io", "-f", form, *(word for command in commands for word in ("-c", command)), image)
