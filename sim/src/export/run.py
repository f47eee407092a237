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

    def wait_job(self, job, status):
        """The job has been in this status; all jobs are at rest after every step, so there is nothing to wait for."""
        say(f"  wait for job {job} to be {status}")

    def hurry(self, job):
        """At the end nobody is limited in speed."""
        self.ask({"execute": "block-job-set-speed", "arguments": {"device": job, "speed": 0}})
        SLOW_JOBS.remove(job)
        self.rest()

    def settled(self):
        """Guests' requests are waited for one by one, so there is nothing to wait for."""

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

    def modify(self, export, request, fails, flags=0):
        self.request(export, request, flags)
        if bool(request.error) != fails:
            found = os.strerror(request.error) if request.error else "it is done"
            raise Wrong(f"{export}: {request} has to {'fail' if fails else 'be done'}; {found}")

    def write(self, export, offset, length, value, fua=False, fails=False):
        self.modify(export, Request("write", offset, length, value), fails, Guest.FUA if fua else 0)

    def write_zeroes(self, export, offset, length, unmap=False, fails=False):
        self.modify(export, Request("write-zeroes", offset, length), fails, 0 if unmap else Guest.NO_HOLE)

    def discard(self, export, offset, length, fails=False):
        self.modify(export, Request("discard", offset, length), fails)

    def flush(self, export, fails=False):
        self.modify(export, Request("flush", 0, 0), fails)

    def read(self, export, offset, length, holds):
        """Reads; `holds` says what is right: (bytes, whose) one after the other, or None for an error."""
        request = self.request(export, Request("read", offset, length))
        if bool(request.error) != (holds is None):
            found = os.strerror(request.error) if request.error else "it is done"
            raise Wrong(f"{export}: {request} has to {'fail' if holds is None else 'be done'}; {found}")
        if holds is not None:
            compare(f"{export}: {request}", request.data, offset, holds)

    def status(self, export, offset, length, data=(), fails=False):
        """Block status: it has to cover the range. Where there may be `data` (offset, bytes) and it says zeroes, a read
        has to say so, too."""
        request = self.request(export, Request("status", offset, length))
        if bool(request.error) != fails:
            raise Wrong(f"{export}: {request} has to {'fail' if fails else 'be done'}")
        at = offset
        for size, flags in request.extents:
            end = min(at + size, offset + length)
            for first, last in ((max(at, o), min(end, o + n)) for o, n in data if flags & 2):
                if first < last and any(self.request(export, Request("read", first, last - first)).data):
                    raise Wrong(f"{export}: {request} says that {first:#x}+{last - first:#x} are zeroes; they are not")
            at = end
        if not fails and at == offset:
            raise Wrong(f"{export}: {request} says nothing")

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
