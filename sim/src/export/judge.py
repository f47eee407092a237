# ---- QEMU's tools; the closed images -----------------------------------------------------------------------

def tool(*arguments):
    """Runs one of QEMU's tools in the directory of the images."""
    done = subprocess.run(arguments, cwd=DIRECTORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                          timeout=20 * LIMIT)
    return done.returncode, done.stdout.decode(errors="replace").strip()


def alone(image):
    """An image without what is below it."""
    return "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": image}})


def sound(image):
    """No corruption and no leak."""
    code, said = tool("qemu-img", "check", alone(image))
    if code:
        raise Wrong(f"qemu-img check {image}: {said}")


def header(image, backing, backing_format):
    """What the image says of its backing file."""
    code, said = tool("qemu-img", "info", "--output=json", "-f", "qcow2", image)
    if code:
        raise Wrong(f"qemu-img info {image}: {said}")
    info = json.loads(said)
    found = (info.get("backing-filename"), info.get("backing-filename-format"))
    if found != (backing, backing_format):
        raise Wrong(f"{image} names {found[0]} of format {found[1]} as its backing file; "
                    f"it has to be {backing} of format {backing_format}")


def unallocated(image, *ranges):
    """These ranges (offset, bytes), which no guest wrote to, hold nothing of their own."""
    code, said = tool("qemu-img", "map", "--output=json", alone(image))
    if code:
        raise Wrong(f"qemu-img map {image}: {said}")
    for extent in json.loads(said):
        start, end = extent["start"], extent["start"] + extent["length"]
        for offset, length in ranges:
            first, last = max(start, offset), min(end, offset + length)
            if extent["present"] and first < last:
                raise Wrong(f"{image} holds something of its own at {first:#x}+{last - first:#x}; nothing had to be "
                            "copied there")
