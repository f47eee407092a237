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
