#!/usr/bin/env python3
"""After a crash a cluster that was zeroed or discarded shows what was written somewhere else.

A stand-alone reproducer: python3 (standard library) and qemu-utils. The scenario is freed-cluster-shows-write.json, embedded below; no script can
cut the power, and killing the daemon at the right moment is enough, so that this one was written by hand. The moment is held by a throttle filter
below the image. The guest is qemu-io, which kills itself: closing in an orderly way would flush.
Ends with code 1 and a line REPRODUCED when the defect is there, with 0 when everything is as it should be.
"""
import argparse, json, os, select, subprocess, sys, tempfile, time

SCENARIO = json.loads(r"""
{
  "version": 1,
  "title": "the power fails after a cluster was zeroed and its space used for another write",
  "grain": 4096,
  "disk": {
    "unmap": true,
    "power-cut": 4
  },
  "images": [
    {
      "file": "a.img",
      "format": "qcow2",
      "size": 131072,
      "cluster-size": 65536,
      "fill": [
        {
          "offset": 0,
          "length": 65536,
          "stored": "data"
        }
      ]
    }
  ],
  "steps": [
    {
      "actor": "setup",
      "execute": "blockdev-add",
      "arguments": {
        "driver": "qcow2",
        "node-name": "a",
        "discard": "unmap",
        "file": {
          "driver": "file",
          "node-name": "f-a",
          "filename": "a.img",
          "discard": "unmap"
        },
        "backing": null
      }
    },
    {
      "actor": "setup",
      "execute": "block-export-add",
      "arguments": {
        "type": "nbd",
        "id": "x-a",
        "node-name": "a",
        "writable": true
      }
    },
    {
      "actor": "guest",
      "export": "x-a",
      "do": {
        "write-zeroes-unmap": {
          "offset": 0,
          "length": 65536
        }
      }
    },
    {
      "actor": "guest",
      "export": "x-a",
      "do": {
        "write": {
          "offset": 65536,
          "length": 65536
        }
      }
    },
    {
      "actor": "guest",
      "export": "x-a",
      "do": {
        "read": {
          "offset": 0,
          "length": 4096
        }
      }
    }
  ],
  "expect": "transparency"
}
""")
OLD, NEW, CLUSTER = 0x5a, 0x77, 65536


def image(spec):
    options = 'cluster_size=%d' % spec['cluster-size']
    subprocess.check_call(['qemu-img', 'create', '-q', '-f', 'qcow2', '-o', options, spec['file'], str(spec['size'])])
    for fill in spec.get('fill', []):
        subprocess.check_call(['qemu-io', '-f', 'qcow2', '-c', 'write -q -P 0x5a %d %d' % (fill['offset'], fill['length']),
                               spec['file']], stdout=subprocess.DEVNULL)


class Monitor:
    def __init__(self, process, limit):
        self.process, self.limit, self.buffer, self.events = process, limit, b'', []
        self.line()
        self.command('qmp_capabilities', {})

    def line(self):
        while b'\n' not in self.buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], self.limit)
            if not ready:
                sys.exit('\nREPRODUCED: the daemon does not answer')
            got = os.read(self.process.stdout.fileno(), 65536)
            if not got:
                self.process.wait()
                print('\nREPRODUCED: the daemon died of signal %d' % -self.process.returncode)
                sys.exit(1)
            self.buffer += got
        line, self.buffer = self.buffer.split(b'\n', 1)
        return json.loads(line)

    def command(self, execute, arguments):
        self.process.stdin.write(json.dumps({'execute': execute, 'arguments': arguments}).encode() + b'\n')
        self.process.stdin.flush()
        while True:
            answer = self.line()
            if 'event' in answer:
                self.events.append(answer)
            else:
                print(execute, json.dumps(arguments), '->', json.dumps(answer))
                return answer


def guest_commands(*wanted):
    """What the guest of the scenario asks for, in qemu-io's words."""
    words = {'write-zeroes-unmap': 'write -z -u', 'write': 'write -P %d' % NEW}
    for step in SCENARIO['steps']:
        for op, range in step.get('do', {}).items():
            if op in wanted:
                yield '%s %d %d' % (words[op], range['offset'], range['length'])


def guest(*wanted):
    commands = [word for command in guest_commands(*wanted) for word in ('-c', command)]
    return subprocess.Popen(['qemu-io', '-t', 'writeback', '-d', 'unmap', '-f', 'raw'] + commands
                            + ['-c', 'sigraise 9', 'nbd+unix:///a?socket=nbd.sock'])


def commands(monitor):
    """Those of the scenario, with a throttle filter between image and file that lets everything through until it is told otherwise."""
    monitor.command('object-add', {'qom-type': 'throttle-group', 'id': 'slow'})
    for step in SCENARIO['steps']:
        if 'execute' in step:
            given = dict(step['arguments'])
            if 'file' in given:
                given['file'] = {'driver': 'throttle', 'node-name': 'th', 'throttle-group': 'slow', 'file': given['file'], 'discard': 'unmap'}
            monitor.command(step['execute'], given)


def somewhere(value):
    """The file of the image has a cluster of this."""
    with open('a.img', 'rb') as file:
        return bytes([value]) * CLUSTER in file.read()


def wait_until(done, limit):
    end = time.monotonic() + limit
    while not done():
        if time.monotonic() > end:
            sys.exit('the write has not come to the file')
        time.sleep(0.001)


def run(limit):
    process = subprocess.Popen(['qemu-storage-daemon', '--nbd-server', 'addr.type=unix,addr.path=nbd.sock',
                                '--chardev', 'stdio,id=monitor', '--monitor', 'monitor'],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        monitor = Monitor(process, limit)
        commands(monitor)
        guest('write-zeroes-unmap').wait(limit)
        # From now on one request every ten seconds: the data of the write get through, the table that follows has to wait.
        monitor.command('qom-set', {'path': '/objects/slow', 'property': 'limits', 'value': {'iops-write': 1, 'iops-size': CLUSTER // 10}})
        writer = guest('write')
        wait_until(lambda: somewhere(NEW), limit)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    writer.wait(limit)
    # The first cluster: what was there before, or zeroes.
    shows = {value: subprocess.run(['qemu-io', '-f', 'qcow2', '-c', 'read -P %d 0 %d' % (value, CLUSTER), 'a.img'], capture_output=True, text=True).stdout
             for value in (OLD, 0, NEW)}
    if not any('Pattern verification failed' not in shows[value] for value in (OLD, 0)):
        what = 'what was written at 64 KiB' if 'Pattern verification failed' not in shows[NEW] else 'something else'
        print('\nREPRODUCED: after the daemon was killed, the first cluster of a.img holds %s, neither the old data nor zeroes' % what)
        sys.exit(1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--limit', type=float, default=10, help='seconds to wait for an answer')
    limit = parser.parse_args().limit
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        for spec in SCENARIO['images']:
            image(spec)
        try:
            run(limit)
        finally:
            os.chdir('/')
    print('\nnot reproduced: everything is as it should be')


main()
