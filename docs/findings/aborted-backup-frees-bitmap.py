#!/usr/bin/env python3
"""A transaction that is taken back after an action on a bitmap and a backup with bitmap-mode always of it
crashes the daemon

What qemu-storage-daemon 10.0.2 does: taking the backup back puts another bitmap in the place of the one that
it used, and frees that; the earlier action is then taken back on freed memory.

Right: a refused transaction changes nothing: the bitmap is the same one, as it was.

Needs Python 3.8 or later and qemu-utils (qemu-storage-daemon, qemu-img, qemu-io); Linux; no root. Works in a
private temporary directory, which is removed at the end together with the daemon.
Exit code: 0 the daemon does everything right, 1 it does not (reproduced), 2 this machine cannot tell, and
stderr says why.

Made by: blkcheck export docs/findings/aborted-backup-frees-bitmap.json
"""

import argparse
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

# A daemon that gives no answer for so many seconds, working or sleeping, hangs.
LIMIT = 10
# Who writes which byte.
WRITERS = {0: "zeroes"}
# Jobs that are limited in speed, so that nobody waits for them.
SLOW_JOBS = []


def make_images():
    """The images, before the daemon has them."""
    make("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=65536", "s.img", "131072")
    make("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=65536", "t.img", "131072")


def steps(run):
    """What is done, and what is right."""
    run.step(0)
    run.accepted('''{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "s",
            "file": {"driver": "file", "node-name": "f-s", "filename": "s.img"}, "backing": null}}''')
    run.step(1)
    run.accepted('''{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "t",
            "file": {"driver": "file", "node-name": "f-t", "filename": "t.img"}, "backing": null}}''')
    run.step(2)
    run.accepted('''{"execute": "block-dirty-bitmap-add", "arguments": {"node": "s", "name": "b"}}''')
    run.step(3)
    run.refused('''{"execute": "transaction", "arguments": {"actions": [{"type": "block-dirty-bitmap-clear",
                    "data": {"node": "s", "name": "b"}},
                {"type": "blockdev-backup",
                    "data": {"job-id": "j", "device": "s", "target": "t", "sync": "bitmap", "bitmap": "b",
                        "bitmap-mode": "always", "filter-node-name": "f"}}, {"type": "abort", "data": {}}]}}''',
                "Transaction aborted using Abort action")

    # Every node reads as it should.
    run.node_holds("s", 0x20000, [(0x20000, 0)])
    run.node_holds("t", 0x20000, [(0x20000, 0)])


def afterwards():
    """What is right for the images, once the daemon is gone."""
    sound("s.img")
    sound("t.img")
    unallocated("s.img", (0x0, 0x20000))
    unallocated("t.img", (0x0, 0x20000))


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

    def step(self, number):
        say(f"step {number}")

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

    def refused(self, text, why):
        """This command has to be refused, for a reason like `why`, and to change nothing."""
        before = self.graph()
        name, error = self.command(text)
        if not error:
            raise Wrong(f"{name} has to be refused ({why}); it is accepted")
        after = self.graph()
        if after != before:
            raise Wrong("\n    ".join([f"{name} is refused, and changes the block graph all the same:"]
                                      + [f"before: {line}" for line in before if line not in after]
                                      + [f"after:  {line}" for line in after if line not in before]))

    def made_up_names(self, text):
        """`#blockN00` is the N-th name that the daemon makes up; it adds two digits of its own."""
        if "#block" in text:
            nodes = self.ask({"execute": "x-debug-query-block-graph"})["nodes"]
            for name in (n["name"] for n in nodes if n["name"].startswith("#block")):
                text = text.replace(name[:-2] + '00"', name + '"')
        return text

    def graph(self):
        """Nodes, and who uses them for what, one a line."""
        graph = self.ask({"execute": "x-debug-query-block-graph"})
        names = {n["id"]: n["name"] if n["type"] == "block-driver" else f"{n['type']} '{n['name']}'"
                 for n in graph["nodes"]}
        lines = [f"node {name}" for name in names.values()]
        for e in graph["edges"]:
            lines.append(f"{names[e['parent']]} -{e['name']}-> {names[e['child']]}, takes "
                         f"{sorted(e['perm'])}, shares {sorted(e['shared-perm'])}")
        return sorted(lines)

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

    def request(self, export, request, flags=0):
        say(f"  {export}: {request}")
        guest = self.guest(export)
        guest.submit(request, flags)
        self.daemon.wait(lambda: request.done, f"{export}: {request} is not answered")
        if request.error:
            say(f"  {export}: {request}: {os.strerror(request.error)}")
        if guest.gone:
            # The export is not there, or the daemon is not.
            self.ask({"execute": "query-jobs"})
        self.rest()
        return request

    # -- the end

    def node_holds(self, node, length, holds):
        """The whole of a node reads like this, through an export made for it."""
        export = f"final-{node}".replace("#", "")
        command = {"type": "nbd", "id": export, "name": export, "node-name": self.made_up_names(f'"{node}"')[1:-1]}
        try:
            self.ask({"execute": "block-export-add", "arguments": command})
        except Unusable as error:
            say(f"  node {node} is not read: {error}")
            return
        request = self.request(export, Request("read", 0, length))
        if request.error:
            raise Wrong(f"node {node} cannot be read: {os.strerror(request.error)}")
        compare(f"node {node}, at the end", request.data, 0, holds)
        self.daemon.guests.pop(export).lost()
        self.ask({"execute": "block-export-del", "arguments": {"id": export, "mode": "hard"}})
        self.rest()

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


def compare(what, data, offset, holds):
    """Holds what was read against what is right."""
    at, runs = 0, []
    for length, value in holds:
        here, right = data[at:at + length], value if value is None else pattern(value, offset + at, length)
        if right is not None and here != right:
            first = next(i for i in range(length) if here[i] != right[i])
            runs.append(f"{offset + at + first:#x}: expected {who(value)}, found {whose(here, first, offset + at)}")
        at += length
    if len(data) != at:
        runs.append(f"{len(data)} bytes instead of {at}")
    if runs:
        raise Wrong("\n    ".join([f"{what} holds the wrong data"] + runs[:8]))


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


# ---- images made by QEMU's own tools -----------------------------------------------------------------------

def make(*arguments):
    code, said = tool(*arguments)
    if code:
        raise Unusable(f"{' '.join(arguments)}: {said}")


# ---- the daemon over plain files ---------------------------------------------------------------------------

def reproduce(program, directory):
    global DIRECTORY
    DIRECTORY = directory
    make_images()
    daemon = Daemon(program, directory)
    try:
        run = Run(daemon)
        daemon.wait(lambda: daemon.monitor.greeted, "no greeting")
        run.ask({"execute": "qmp_capabilities"})
        steps(run)
        run.quit()
    finally:
        daemon.end()
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
