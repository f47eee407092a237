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

    def over_refused(self, sent, why):
        if "error" not in self.over(sent).answer:
            raise Wrong(f"{sent} has to be refused ({why}); it is accepted")

    def over_done(self, request):
        if self.over(request).error:
            raise Wrong(f"{request.export}: {request} has to be done; {os.strerror(request.error)}")

    def over_fails(self, request):
        if not self.over(request).error:
            raise Wrong(f"{request.export}: {request} has to fail; it is done")

    def over_in_order(self, request):
        """It is done, or it fails with an error that storage gave since it began."""
        error = self.over(request).error
        if error == errno.ESHUTDOWN:
            raise Wrong(f"{request.export}: {request} has to be answered; the daemon closes the connection instead")
        if error and not any(error == given and when > request.begun for given, when in self.given):
            raise Wrong(f"{request.export}: {request} fails: {os.strerror(error)}; storage did not")

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

    def request(self, export, request, flags=0):
        """For reads of our own, at the end."""
        guest = self.guest(export)
        guest.submit(request, flags)
        while not request.done:
            self.daemon.settle()
            if not request.done and not self.release_held():
                raise Wrong(f"{export}: {request} does not end; no request of the daemon waits: it hangs")
        return request

    def rest(self):
        """Nothing moves between releases; a step that stands alone takes what it needs."""
        self.release_all()

    def node_shows(self, node, length, disk):
        """At the end, this node reads as the history allows."""
        request = Request("read", 0, length)
        request.begun, request.disk, request.export = self.history.tick(), disk, f"node {node}, at the end"
        export = f"final-{node}".replace("#", "")
        command = {"type": "nbd", "id": export, "name": export, "node-name": self.made_up_names(f'"{node}"')[1:-1]}
        try:
            self.ask({"execute": "block-export-add", "arguments": command})
        except Unusable as error:
            say(f"  node {node} is not read: {error}")
            return
        self.request(export, request)
        if request.error:
            raise Wrong(f"node {node} cannot be read: {os.strerror(request.error)}")
        request.ended = self.history.tick()
        self.history.ends(request)
        self.daemon.guests.pop(export).lost()
        self.ask({"execute": "block-export-del", "arguments": {"id": export, "mode": "hard"}})

    def linked_as_recorded(self, node, image):
        """At the end, the node has a backing node if the header of its image names one, and has none if not."""
        graph = self.ask({"execute": "x-debug-query-block-graph"})
        numbers = [n["id"] for n in graph["nodes"] if n["name"] == self.made_up_names(f'"{node}"')[1:-1]]
        linked = any(e["parent"] in numbers and e["name"] == "backing" for e in graph["edges"])
        named = any(self.daemon.images[image].data[8:16])
        if linked != named:
            has = "has a backing node" if linked else "has no backing node any more"
            raise Wrong(f"{node} {has}, and the header of {image} names {'one' if named else 'none'}")

    def ignores_at_most(self, job, most):
        """The job told no more errors that it ignored than this."""
        told = [e["data"] for e in self.daemon.monitor.events if e["event"] == "BLOCK_JOB_ERROR"]
        ignored = sum(e["device"] == job and e["action"] == "ignore" for e in told)
        if ignored > most:
            raise Wrong(f"{job} ignores {ignored} errors, and there are {most} sectors: it asks for the same again and again")

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
