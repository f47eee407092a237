class OpenDaemon(ServedDaemon):
    """Nothing waits: requests are carried out in the order in which they come."""

    def pump(self, seconds=0.05):
        stirred = super().pump(seconds)
        while self.held:
            self.held.pop(0).release()
        return stirred


def reproduce(program, directory):
    global DIRECTORY
    DIRECTORY = directory
    daemon = OpenDaemon(program, directory, [Image(*image) for image in images()])
    try:
        run = Run(daemon)
        daemon.wait(lambda: daemon.monitor.greeted, "no greeting")
        run.ask({"execute": "qmp_capabilities"})
        steps(run)
        run.quit()
        daemon.save()
    finally:
        daemon.end()
    afterwards()
