#!/usr/bin/env python3
"""A min-cluster-size of more than 128 MiB aborts the daemon, at once or when the first cluster is copied

What qemu-storage-daemon 10.0.2 does: the size is never held against the memory that copies have, nor, from 4
GiB on, against the 32 bits of a bitmap's granularity.

Right: a refusal, as for a size that is no power of two: no argument of a command may end the process.

Needs Python 3.8 or later and qemu-utils (qemu-storage-daemon, qemu-img, qemu-io); Linux; no root. Works in a
private temporary directory, which is removed at the end together with the daemon.
Exit code: 0 the daemon does everything right, 1 it does not (reproduced), 2 this machine cannot tell, and
stderr says why.

Made by: blkcheck export docs/findings/cbw-huge-clusters.json
"""

import argparse
import ctypes
import glob
import json
import os
import select
import shutil
import signal
import socket
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
    make("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=65536", "s.img", "65536")
    make("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=65536", "t.img", "65536")


def steps(run):
    """What is done, and what is right."""
    run.step(0)
    run.accepted('''{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "s",
            "file": {"driver": "file", "node-name": "f-s", "filename": "s.img"}, "backing": null}}''')
    run.step(1)
    run.accepted('''{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "t",
            "file": {"driver": "file", "node-name": "f-t", "filename": "t.img"}, "backing": null}}''')
    run.step(2)
    run.refused('''{"execute": "blockdev-add", "arguments": {"driver": "copy-before-write",
            "node-name": "c", "file": "s", "target": "t", "min-cluster-size": 4294967296}}''',
                "Cannot create block-copy-state: min-cluster-size too large: 4294967296 > 134217728")


def afterwards():
    """What is right for the images, once the daemon is gone."""
    sound("s.img")
    sound("t.img")
    unallocated("s.img", (0x0, 0x10000))
    unallocated("t.img", (0x0, 0x10000))


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
