#!/usr/bin/env python3
"""Storage fails every flush while a guest writes and discards

What qemu-storage-daemon 10.0.2 did wrong in this course when this script was made (image): image 'a.img' is
corrupt after a clean close: data cluster at 0x50000: COPIED is true, the refcount 0

Needs Python 3.8 or later and qemu-utils (qemu-storage-daemon, qemu-img, qemu-io); Linux; no root. Works in a
private temporary directory, which is removed at the end together with the daemon.
Exit code: 0 the daemon does everything right, 1 it does not (reproduced), 2 this machine cannot tell, and
stderr says why.

Made by: blkcheck export docs/findings/failed-flush-loses-order.json
"""

import argparse
import base64
import ctypes
import errno
import glob
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib

# A daemon that gives no answer for so many seconds, working or sleeping, hangs.
LIMIT = 10
# Unit of guest requests and of stamps, bytes.
GRAIN = 4096
# Jobs that are limited in speed, so that nobody waits for them.
SLOW_JOBS = []


def steps(run):
    """What is done, and what is right."""

    # step 0, setup
    run.accepted('''{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a",
            "discard": "unmap",
            "file": {"driver": "nbd", "node-name": "f-a", "discard": "unmap",
                "server": {"type": "unix", "path": "s"}, "export": "a.img"}, "backing": null}}''')

    # step 1, setup
    run.accepted('''{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "x-a",
            "node-name": "a", "writable": true}}''')

    # step 2, guest
    s2 = run.begin("x-a", Request("write", 0x10000, 0x10000, step(2)), disk="a.img")
    run.release_all()
    run.over_done(s2)

    # step 3, guest
    s3 = run.begin("x-a", Request("discard", 0x0, 0x10000), disk="a.img")
    run.release("write a.img 0x20000+0x10000")
    run.fail("flush a.img", errno.EIO)
    run.release_all()
    run.over_done(s3)

    # step 4, guest
    run.accepted('''{"execute": "block-export-del", "arguments": {"id": "x-a", "mode": "hard"}}''')

    # step 5, guest
    s5 = run.begin_command('''{"execute": "blockdev-del", "arguments": {"node-name": "a"}}''')
    run.release("write a.img 0x20000+0x10000")
    run.fail("flush a.img", errno.EIO)
    run.fail("flush a.img", errno.EIO)
    run.fail("flush a.img", errno.EIO)
    run.fail("flush a.img", errno.EIO)
    run.over_accepted(s5)
    run.release_all()


def afterwards():
    """What is right for the images, once the daemon is gone."""
    sound("a.img")


def initial():
    """What every disk shows at the start: (offset, bytes, whose); None: anything."""
    return {
        "a.img": [(0x0, 0x10000, fill(0, 0)), (0x10000, 0x10000, 0)],
    }


def images():
    """(name, room behind it, bytes) of every image."""
    return [
        ("a.img", 0x270000, unpacked("""
c-rm9K?wo@5QfoNU2h^LFoF?03SI;Y7(q-Ro4^Q05G-H>BiKL-2;#DWvNw-1``$1=e5?855fS}p8#mkgbkS_TRYm-!tbZE-0000000000000
00000000000000000000000000000000000000000000000000000000000000008{IUH||9000000000000000000000000000000000000
000000000000000000000000000000000000000&~-(84*&oF00000000000000000000000000000000000000000000000000000000000
000000000000001h&Z?qT1^@s60000000000000000000000000000000000000000000000000000000000000000000000000009alwd5C
8xG0000000000000000000000000000000000000000000000000000000000000000000000000005K#<IxApr%Ypu1`T5GMf)_HrWwboi|
t+m!#>-4?TT5GMf)>><=b^6|Dt+m!#Ypu1`I(<*H)>><=wboi|oxVp}Ypu1`T5GMfPTw=Fwboi|t+m!#r|+rOT5GMf)>><=)Av<tt+m!#Ypu
1`>HDI!)>><=wboke^!?OYYpu1`T5GL!`o3$ewboi|t+m!VeIK;eT5GMf)>><wzV}*dt+m!#Ypu0T-)F70)>><=wbojv@1xdQYpu1`T5GMd_
6y^3DJu
        """)),
    ]


# ---- the daemon, its monitor, and everybody who is connected to it -----------------------------------------

class Wrong(Exception):
    """The daemon does what it should not."""


class Unusable(Exception):
    """This machine cannot tell."""


class Peer:
    """A non-blocking connection. `talk` is a generator: it yields how many bytes it needs and is sent them."""

    def __init__(self, sock):
        sock.setblocking(False)
        self.sock, self.inbox, self.outbox, self.gone = sock, bytearray(), bytearray(), False
        self.dialogue = self.talk()
        self.need = next(self.dialogue)

    def send(self, data):
        self.outbox += data
        self.push()

    def push(self):
        try:
            while self.outbox:
                del self.outbox[:self.sock.send(self.outbox)]
        except BlockingIOError:
            pass
        except OSError:
            self.lost()

    def pull(self):
        try:
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self.lost()
        self.inbox += data
        self.digest()

    def digest(self):
        while not self.gone and len(self.inbox) >= self.need:
            part = bytes(self.inbox[:self.need])
            del self.inbox[:self.need]
            try:
                self.need = self.dialogue.send(part)
            except StopIteration:
                self.lost()

    def lost(self):
        self.gone = True
        self.sock.close()


class Monitor(Peer):
    """QMP: one JSON object a line."""

    def __init__(self, sock):
        self.answers, self.events, self.greeted, self.last = {}, [], False, 0
        super().__init__(sock)

    def talk(self):
        line = b""
        while True:
            byte = yield 1
            if byte != b"\n":
                line += byte
                continue
            message, line = json.loads(line), b""
            if "event" in message:
                self.events.append(message)
                say("    event", message["event"], json.dumps(message.get("data", {})))
            elif "QMP" in message:
                self.greeted = True
            else:
                self.answers[message["id"]] = message

    def execute(self, command):
        self.last += 1
        self.send(json.dumps(dict(command, id=self.last)).encode() + b"\n")
        return self.last


class Daemon:
    """qemu-storage-daemon in a directory of its own, with its monitor on a socket pair."""

    def __init__(self, program, directory):
        self.directory, self.peers, self.guests, self.listener = directory, [], {}, None
        ours, theirs = socket.socketpair()
        self.stderr = open(os.path.join(directory, "stderr"), "w+b")
        arguments = [program, "--chardev", "socket,id=monitor,fd=0", "--monitor", "monitor",
                     "--nbd-server", "addr.type=unix,addr.path=guests.sock,max-connections=0"]
        try:
            self.process = subprocess.Popen(arguments, cwd=directory, stdin=theirs, stdout=subprocess.DEVNULL,
                                            stderr=self.stderr, preexec_fn=die_with_us)
        except OSError as error:
            raise Unusable(f"{program} does not start: {error}") from error
        theirs.close()
        self.monitor = Monitor(ours)
        self.peers.append(self.monitor)

    def pump(self, seconds=0.05):
        """Takes in what the daemon sent, or waits for that so long."""
        peers = [p for p in self.peers if not p.gone]
        writers = [p.sock for p in peers if p.outbox]
        readers = [p.sock for p in peers] + ([self.listener] if self.listener else [])
        ready, free, _ = select.select(readers, writers, [], seconds)
        for peer in peers:
            if peer.sock in free:
                peer.push()
            if not peer.gone and peer.sock in ready:
                peer.pull()
        if self.listener in ready:
            self.accept()
        self.peers = [p for p in self.peers if not p.gone]
        if self.monitor.gone:
            raise Wrong(self.how_it_ended())
        return bool(ready)

    def wait(self, done, what):
        """Pumps until `done()`. A daemon that does not come to it hangs: it works all the time, or nobody moves."""
        begun, used = time.monotonic(), self.cpu()
        while not done():
            stirred = self.pump()
            passed = time.monotonic() - begun
            if passed < LIMIT or stirred:
                continue
            busy = self.cpu() - used
            if busy > LIMIT / 3 or self.sleeps():
                how = f"used {busy:.1f} s of CPU time over it" if busy > 1 else "all its threads sleep"
                raise Wrong(f"{what}: nothing after {passed:.0f} s; the daemon hangs ({how})")
            if passed > 20 * LIMIT:
                raise Unusable("this machine is too busy to tell a hang from a wait")

    def how_it_ended(self):
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "the daemon closed its monitor and lives on"
        self.stderr.seek(0)
        words = self.stderr.read().decode(errors="replace").strip().splitlines()[-3:]
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return "\n    ".join([f"the daemon {how}"] + words)

    def stats(self):
        """(state, CPU seconds) of each of its threads."""
        threads, tick = [], os.sysconf("SC_CLK_TCK")
        for path in glob.glob(f"/proc/{self.process.pid}/task/*/stat"):
            try:
                fields = open(path).read().rpartition(")")[2].split()
            except OSError:
                continue
            threads.append((fields[0], (int(fields[11]) + int(fields[12])) / tick))
        return threads

    def cpu(self):
        return sum(seconds for _, seconds in self.stats())

    def sleeps(self):
        return all(state in "SZX" for state, _ in self.stats())

    def end(self):
        for peer in self.peers:
            peer.sock.close()
        self.process.kill()
        self.process.wait()
        self.stderr.close()


def die_with_us():
    """The daemon ends when this script ends, in whichever way."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass


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


# ---- one run: what is asked of the daemon, and whether the answer is right ---------------------------------

class Run:
    """Steps one after the other; each is over, and jobs have come as far as they can, before the next."""

    def __init__(self, daemon):
        self.daemon, self.exports = daemon, {}

    # -- commands

    def ask(self, command):
        """A command of our own: its return value."""
        answer = self.answer(self.daemon.monitor.execute(command), command["execute"])
        if "error" in answer:
            raise Unusable(f"{command['execute']}: {answer['error']['desc']}")
        return answer["return"]

    def answer(self, number, what):
        answers = self.daemon.monitor.answers
        self.daemon.wait(lambda: number in answers, f"{what} is not answered")
        return answers.pop(number)

    def command(self, text):
        say("  ->", " ".join(text.split()))
        text = self.made_up_names(text)
        command = json.loads(text)
        self.before(command)
        answer = self.answer(self.daemon.monitor.execute(command), command["execute"])
        say("  <-", json.dumps(answer.get("error", answer.get("return"))))
        self.rest()
        return command["execute"], answer.get("error")

    def before(self, command):
        """A guest that has nothing in flight does not stay connected to an export that goes."""
        arguments = command.get("arguments", {})
        if command["execute"] == "block-export-add":
            self.exports[arguments.get("id")] = arguments.get("name", arguments.get("node-name"))
        if command["execute"] == "block-export-del":
            guest = self.daemon.guests.get(self.exports.get(arguments.get("id")))
            if guest and not guest.gone and not guest.open:
                guest.lost()
                self.rest()

    def accepted(self, text):
        """This command has to be accepted."""
        name, error = self.command(text)
        if error:
            raise Wrong(f"{name} has to be accepted; it is refused: {error['desc']}")

    def made_up_names(self, text):
        """`#blockN00` is the N-th name that the daemon makes up; it adds two digits of its own."""
        if "#block" in text:
            nodes = self.ask({"execute": "x-debug-query-block-graph"})["nodes"]
            for name in (n["name"] for n in nodes if n["name"].startswith("#block")):
                text = text.replace(name[:-2] + '00"', name + '"')
        return text

    def rest(self):
        """Waits until every job has come as far as it can by itself."""
        def resting():
            if self.jobs_asked is not None:
                jobs = self.daemon.monitor.answers.pop(self.jobs_asked, None)
                if jobs is None:
                    return False
                self.jobs_asked = None
                if all(self.job_rests(job) for job in jobs["return"]):
                    return True
                time.sleep(0.01)
            self.jobs_asked = self.daemon.monitor.execute({"execute": "query-jobs"})
            return False
        self.jobs_asked = None
        self.daemon.wait(resting, "a job does not come to rest")

    def job_rests(self, job):
        return job["status"] in ("paused", "ready", "standby", "pending", "concluded") or job["id"] in SLOW_JOBS

    # -- guests

    def guest(self, export):
        if export not in self.exports.values():
            export = self.exports.get(export, export)  # by its id
        guest = self.daemon.guests.get(export)
        if guest is None or guest.gone:
            guest = self.daemon.guests[export] = Guest(self.daemon, export)
            self.daemon.peers.append(guest)
        return guest

    def quit(self):
        """Ends the daemon in an orderly way, so that the images can be looked at."""
        for guest in self.daemon.guests.values():
            guest.lost()
        self.daemon.monitor.execute({"execute": "quit"})
        try:
            self.daemon.wait(lambda: False, "quit does not end the daemon")
        except Wrong as wrong:
            if self.daemon.process.poll() != 0:
                raise wrong
        say("the daemon is gone")


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


# ---- images as bytes ---------------------------------------------------------------------------------------

def unpacked(text):
    return zlib.decompress(base64.b85decode("".join(text.split())))


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


# ---- the gate: which request of the daemon is carried out next, and when the next step is taken ------------

class GatedDaemon(ServedDaemon):
    """Requests wait until the script releases them, one by one."""

    def settle(self):
        """Waits until the daemon has done everything it can do without us, and all of it is here."""
        begun = self.cpu()
        while True:
            looks = 0
            while looks < 2:
                looks = looks + 1 if self.sleeps() else 0
                if looks == 0 and self.cpu() - begun > LIMIT / 3:
                    raise Wrong(f"the daemon works and works, {self.cpu() - begun:.0f} s of CPU time by now: it hangs")
            if not self.pump(0):
                return


class GatedRun(Run):
    """Several steps at once: they are begun, requests of the daemon's are released, they are over."""

    def __init__(self, daemon, history):
        super().__init__(daemon)
        self.history, self.waiting, self.deviates = history, [], 0
        self.given = []  # errors of storage, and when

    def settle(self):
        """The daemon at rest. Commands go one at a time, the next one when the last is answered."""
        while True:
            self.daemon.settle()
            current = self.waiting[0] if self.waiting else None
            if current is None or (current.number and current.number not in self.daemon.monitor.answers):
                return
            if current.number:
                self.waiting.pop(0)
                current.answer = self.daemon.monitor.answers.pop(current.number)
                say("  <-", json.dumps(current.answer.get("error", current.answer.get("return"))))
            else:
                text = self.made_up_names(current.text)
                self.before(json.loads(text))
                current.number = self.daemon.monitor.execute(json.loads(text))

    def begin_command(self, text):
        """Sends a command; `over` waits for its answer."""
        self.settle()
        say("  ->", " ".join(text.split()))
        self.waiting.append(Sent(text))
        return self.waiting[-1]

    def begin(self, export, request, disk=None, flags=0):
        """Sends a guest's request; `over` waits for its end. `disk`: what it shows, to be held against the history."""
        self.settle()
        say(f"  {export}: {request} is sent")
        request.export, request.disk, request.begun = export, disk, self.history.tick()
        self.history.begins(request)
        self.guest(export).submit(request, flags)
        return request

    def release(self, text):
        """Lets this request of the daemon happen."""
        self.settle()
        for held in self.daemon.held:
            if str(held) == text:
                self.daemon.held.remove(held)
                say(f"    released: {text}")
                return held.release()
        self.deviates += 1
        say(f"    (not asked by this daemon: {text})")

    def fail(self, text, error, done=0):
        """Lets this request of the daemon fail, after so many bytes of it."""
        self.settle()
        for held in self.daemon.held:
            if str(held) == text:
                self.daemon.held.remove(held)
                part = f", {done:#x} bytes of it done" if done else ""
                self.given.append((error, self.history.tick()))
                say(f"    failed: {text}: {os.strerror(error)}{part}")
                return held.fail(error, done)
        self.deviates += 1
        say(f"    (not asked by this daemon: {text})")

    def release_one(self):
        self.settle()
        if not self.daemon.held:
            return False
        self.daemon.held.pop(0).release()
        return True

    def release_all(self):
        """Lets requests happen in the order in which they come, until there are none."""
        while self.release_one():
            pass
        self.settle()

    def over(self, what):
        """Waits until a command is answered or a request is done; what it waits for is released in order."""
        self.settle()
        done = (lambda: what.answer is not None) if isinstance(what, Sent) else (lambda: what.done)
        while not done() and self.release_one():
            self.settle()
        if not done():
            raise Wrong(f"{what} does not end; no request of the daemon waits, and all its threads sleep: it hangs")
        if not isinstance(what, Sent):
            what.ended = self.history.tick()
            if what.error:
                say(f"  {what.export}: {what}: {os.strerror(what.error)}")
            else:
                say(f"  {what.export}: {what} is done")
            if what.error == errno.ESHUTDOWN:
                self.ask({"execute": "query-jobs"})  # its export went, or the daemon did
            self.history.ends(what)
        return what

    def over_accepted(self, sent):
        error = self.over(sent).answer.get("error")
        if error:
            raise Wrong(f"{sent} has to be accepted; it is refused: {error['desc']}")

    def over_done(self, request):
        if self.over(request).error:
            raise Wrong(f"{request.export}: {request} has to be done; {os.strerror(request.error)}")

    def answer(self, number, what):
        """Of a command that stands alone."""
        answers = self.daemon.monitor.answers
        while number not in answers:
            self.daemon.settle()
            if number not in answers and not self.release_held():
                raise Wrong(f"{what} is not answered; no request of the daemon waits: it hangs")
        return answers.pop(number)

    def release_held(self):
        if not self.daemon.held:
            return False
        self.daemon.held.pop(0).release()
        return True

    def rest(self):
        """Nothing moves between releases; a step that stands alone takes what it needs."""
        self.release_all()

    def quit(self):
        for guest in self.daemon.guests.values():
            guest.lost()
        self.daemon.monitor.execute({"execute": "quit"})
        try:
            while True:
                self.daemon.settle()
                self.release_held()
                self.daemon.pump()
        except Wrong as wrong:
            if self.daemon.process.poll() != 0:
                raise wrong
        say("the daemon is gone")


class Sent:
    """A command, and its answer."""

    def __init__(self, text):
        self.text, self.number, self.answer = text, None, None

    def __str__(self):
        return json.loads(self.text)["execute"]


class History:
    """Every grain of a disk is a register. A read may return a write that began before the read ended, unless it was
    overwritten: a later write, begun after it ended, ended (or was seen by an earlier read) before the read began."""

    def __init__(self, initial):
        self.now, self.writes, self.initial = 0, {}, initial

    def tick(self):
        self.now += 1
        return self.now

    def begins(self, request):
        if request.disk and request.kind in ("write", "write-zeroes", "discard"):
            self.writes.setdefault(request.disk, []).append(request)

    def ends(self, request):
        if request.error and request in self.writes.get(request.disk, []):
            request.ended = None  # it may have happened, or not
        if request.disk and request.kind == "read" and not request.error:
            self.check(request)

    def before(self, disk, at):
        """What the disk held there at the start."""
        for offset, length, value in self.initial[disk]:
            if offset <= at < offset + length:
                return value
        return 0

    def check(self, read):
        unit = min(GRAIN, 512)  # writes that overlap may tear a grain at a sector
        for at in range(read.offset, read.offset + read.length, unit):
            end = min(at + unit, read.offset + read.length)
            data = bytes(read.data[at - read.offset:end - read.offset])
            writes = [w for w in self.writes.get(read.disk, []) if w.offset <= at < w.offset + w.length]
            allowed, seen = [], None
            for value, write in [(self.before(read.disk, at), None)] + [(w.value, w) for w in writes]:
                if value is None:
                    break
                if write and write.begun > read.ended:
                    continue
                begun, over = (write.begun, write.ended) if write else (0, 0)
                hidden = over is not None and any(
                    w.kind != "discard" and w.begun > over and self.effective(w, at) < read.begun for w in writes)
                if not hidden:
                    allowed.append(value)
                    if data == pattern(value, at, end - at):
                        seen = write
                        break
            else:
                found = whose(data, 0, at)
                raise Wrong(f"{read.export}: {read}: {at:#x} holds {found}; possible: "
                            + ", ".join(who(v) for v in dict.fromkeys(allowed)))
            if seen is not None:
                seen.seen = getattr(seen, "seen", {})
                seen.seen[at] = min(read.ended, seen.seen.get(at, read.ended))

    @staticmethod
    def effective(write, at):
        """When a write had certainly taken effect."""
        times = [t for t in (write.ended, getattr(write, "seen", {}).get(at)) if t is not None]
        return min(times, default=float("inf"))


def reproduce(program, directory):
    global DIRECTORY
    DIRECTORY = directory
    daemon = GatedDaemon(program, directory, [Image(*image) for image in images()])
    try:
        run = GatedRun(daemon, History(initial()))
        daemon.wait(lambda: daemon.monitor.greeted, "no greeting")
        run.ask({"execute": "qmp_capabilities"})
        steps(run)
        run.quit()
        daemon.save()
    finally:
        daemon.end()
        if "run" in locals() and run.deviates:
            say(f"\n{run.deviates} releases were not to be had: another version of QEMU, which asks for other things")
    afterwards()


# ---- the command line --------------------------------------------------------------------------------------

def say(*words):
    print(*words, flush=True)


def main():
    global LIMIT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qemu", metavar="DIR", help="directory with qemu-storage-daemon, qemu-img and qemu-io")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="what never answers hangs")
    arguments = parser.parse_args()
    LIMIT = arguments.limit
    if arguments.qemu:
        os.environ["PATH"] = arguments.qemu + os.pathsep + os.environ.get("PATH", "")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    try:
        tools = {name: shutil.which(name) for name in ("qemu-storage-daemon", "qemu-img", "qemu-io")}
        missing = [name for name, path in tools.items() if not path]
        if missing:
            raise Unusable(f"needs {', '.join(missing)} (package qemu-utils, or --qemu DIR)")
        version = subprocess.run([tools["qemu-storage-daemon"], "--version"], stdout=subprocess.PIPE, check=True)
        say(version.stdout.decode().splitlines()[0])
        with tempfile.TemporaryDirectory(prefix="qemu-repro-") as directory:
            reproduce(tools["qemu-storage-daemon"], directory)
    except Wrong as wrong:
        say(f"\nREPRODUCED: {wrong}")
        return 1
    except (Unusable, OSError, subprocess.SubprocessError) as error:
        print(f"cannot tell: {error}", file=sys.stderr)
        return 2
    say("\nnot reproduced: everything is as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
