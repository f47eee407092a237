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
