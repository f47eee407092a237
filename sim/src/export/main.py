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
