# ---- the storage under every image: an NBD server; a request waits until it is released --------------------

class Image:
    """An image in memory, with room behind it into which the format may grow."""

    def __init__(self, name, room, data):
        self.name, self.end = name, len(data)
        self.data = bytearray(data) + bytes(room)


class Held:
    """A request of the daemon that waits."""

    def __init__(self, storage, kind, image, offset, length, cookie, data):
        self.storage, self.kind, self.image = storage, kind, image
        self.offset, self.length, self.cookie, self.data = offset, length, cookie, data

    def __str__(self):
        where = "" if self.kind == "flush" else f" {self.offset:#x}+{self.length:#x}"
        return f"{self.kind} {self.image.name}{where}"

    def release(self):
        """Carries it out and answers it."""
        end, error, data = self.offset + self.length, 0, b""
        if end > len(self.image.data):
            error = errno.ENOSPC if self.kind in ("write", "zero") else errno.EINVAL
        elif self.kind == "read":
            data = self.image.data[self.offset:end]
        elif self.kind != "flush":
            self.change(self.length)
        self.answer(error, data)

    def change(self, length):
        """Carries out so many bytes of what changes the image."""
        start, end, image = self.offset, self.offset + length, self.image
        image.data[start:end] = self.data[:length] if self.kind == "write" else bytes(length)
        if self.kind != "discard":
            image.end = max(image.end, end)

    def fail(self, error, done):
        """Carries out so many bytes of it and answers it with an error."""
        if done:
            self.change(done)
        self.answer(error)

    def answer(self, error, data=b""):
        self.storage.send(struct.pack(">IIQ", 0x67446698, error, self.cookie) + data)


class Storage(Peer):
    """The server's end of one connection of the daemon."""

    KINDS = {0: "read", 1: "write", 3: "flush", 4: "discard", 6: "zero"}

    def __init__(self, sock, images, held):
        self.images, self.held = images, held
        super().__init__(sock)

    def talk(self):
        self.send(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        yield 4
        image = None
        while image is None:
            _, option, length = struct.unpack(">QII", (yield 16))
            data = yield length

            def reply(kind, content=b""):
                self.send(struct.pack(">QIII", 0x3e889045565a9, option, kind, len(content)) + content)

            if option not in (6, 7):  # info, go
                reply(1 if option == 2 else 1 << 31 | 1)
                continue
            size = struct.unpack(">I", data[:4])[0]
            image = self.images.get(data[4:4 + size].decode())
            if image is None:
                reply(1 << 31 | 6)
                continue
            # Flush, FUA, trim and write-zeroes; any alignment.
            reply(3, struct.pack(">HQH", 0, len(image.data), 1 | 4 | 8 | 32 | 64))
            reply(3, struct.pack(">HIII", 3, 1, 4096, 32 << 20))
            reply(1)
            image = image if option == 7 else None
        while True:
            _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", (yield 28))
            if command == 2:  # disconnect
                return
            data = (yield length) if command == 1 else b""
            self.held.append(Held(self, self.KINDS[command], image, offset, length, cookie, data))

    def lost(self):
        super().lost()
        self.held[:] = [h for h in self.held if h.storage is not self]


class ServedDaemon(Daemon):
    """A daemon whose storage is ours."""

    def __init__(self, program, directory, images):
        self.images, self.held = {image.name: image for image in images}, []
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.path.join(directory, "s"))
        listener.listen(64)
        listener.setblocking(False)
        super().__init__(program, directory)
        self.listener = listener

    def accept(self):
        try:
            self.peers.append(Storage(self.listener.accept()[0], self.images, self.held))
        except BlockingIOError:
            pass

    def end(self):
        self.listener.close()
        super().end()

    def save(self):
        """Writes the images into files, for qemu-img."""
        for image in self.images.values():
            with open(os.path.join(self.directory, image.name), "wb") as file:
                file.write(image.data[:image.end])
