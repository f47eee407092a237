# ---- guests: NBD, as many requests in flight as one likes --------------------------------------------------

class Request:
    """A guest's request, and what came of it."""

    def __init__(self, kind, offset, length, value=0):
        self.kind, self.offset, self.length, self.value = kind, offset, length, value
        self.data, self.extents, self.error, self.done = bytearray(length if kind == "read" else 0), [], 0, False
        self.begun = self.ended = None

    def __str__(self):
        return self.kind if self.kind == "flush" else f"{self.kind} {self.offset:#x}+{self.length:#x}"


class Guest(Peer):
    """A client of one export."""

    COMMANDS = {"read": 0, "write": 1, "flush": 3, "discard": 4, "write-zeroes": 6, "status": 7}
    FUA, NO_HOLE = 1, 2

    def __init__(self, daemon, export):
        self.export, self.open, self.cookie, self.size = export, {}, 0, None
        self.early, self.ready, self.unknown, self.allocation = bytearray(), False, False, None
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.path.join(daemon.directory, "guests.sock"))
        super().__init__(sock)

    def talk(self):
        name = self.export.encode()
        yield 18
        self.send(struct.pack(">I", 3))
        contexts = b"".join(struct.pack(">I", len(c)) + c for c in (b"base:allocation", b"qemu:allocation-depth"))
        for option, data in (
            (8, b""),  # structured replies
            (10, struct.pack(">I", len(name)) + name + struct.pack(">I", 2) + contexts),
            (7, struct.pack(">I", len(name)) + name + struct.pack(">H", 0)),  # go
        ):
            self.send(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        while not self.ready:
            _, option, kind, length = struct.unpack(">QIII", (yield 20))
            data = yield length
            if option == 10 and kind == 4 and data[4:] == b"base:allocation":
                self.allocation = data[:4]
            elif option == 7 and kind == 3 and data[:2] == b"\0\0":
                self.size = struct.unpack(">Q", data[2:10])[0]
            elif option == 7 and kind == 1:
                self.ready = True
            elif option == 7 and kind >> 31:
                self.unknown = True
                return
        self.send(self.early)
        while True:
            magic = struct.unpack(">I", (yield 4))[0]
            if magic == 0x67446698:
                error, cookie = struct.unpack(">IQ", (yield 12))
                last, request = True, self.asked(cookie)
                request.error = request.error or error
            else:
                flags, kind, cookie, length = struct.unpack(">HHQI", (yield 16))
                last, request = flags & 1, self.asked(cookie)
                self.chunk(request, kind, (yield length))
            if last:
                request.done = True
                del self.open[cookie]

    def asked(self, cookie):
        if cookie not in self.open:
            raise Wrong(f"{self.export}: the daemon answers a request that is not in flight, or answers one twice")
        return self.open[cookie]

    def chunk(self, request, kind, data):
        if kind == 1:  # data
            at = struct.unpack(">Q", data[:8])[0] - request.offset
            request.data[at:at + len(data) - 8] = data[8:]
        elif kind == 5 and data[:4] == self.allocation:  # block status
            words = struct.unpack(f">{len(data) // 4}I", data)[1:]
            request.extents += zip(words[::2], words[1::2])
        elif kind & 0x8000:
            request.error = request.error or struct.unpack(">I", data[:4])[0]

    def submit(self, request, flags=0):
        self.cookie += 1
        self.open[self.cookie] = request
        head = struct.pack(">IHHQQI", 0x25609513, flags, self.COMMANDS[request.kind], self.cookie, request.offset,
                           request.length)
        data = pattern(request.value, request.offset, request.length) if request.kind == "write" else b""
        if self.ready:
            self.send(head + data)
        else:
            self.early += head + data

    def lost(self):
        super().lost()
        for request in self.open.values():
            request.error, request.done = request.error or errno.ESHUTDOWN, True
        self.open.clear()
