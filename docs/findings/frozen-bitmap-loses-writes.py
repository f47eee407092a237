#!/usr/bin/env python3
"""An image that becomes read-only during an incremental backup loses what its bitmap records meanwhile.

A stand-alone reproducer: python3 (standard library) and qemu-utils. The scenario is frozen-bitmap-loses-writes.json, embedded below; what is
lost shows only when the image is opened again, so that this script was written by hand.
Ends with code 1 and a line REPRODUCED when the defect is there, with 0 when everything is as it should be.
"""
import argparse, json, os, select, socket, struct, subprocess, sys, tempfile

SCENARIO = json.loads(r"""
{
  "version": 1,
  "title": "a snapshot during an incremental backup whose bitmap is stored in the image",
  "grain": 512,
  "images": [
    {
      "file": "s.img",
      "format": "qcow2",
      "size": 1048576,
      "cluster-size": 65536
    },
    {
      "file": "o.img",
      "format": "qcow2",
      "size": 1048576,
      "cluster-size": 65536
    },
    {
      "file": "t.img",
      "format": "qcow2",
      "size": 1048576,
      "cluster-size": 65536
    }
  ],
  "steps": [
    {
      "actor": "monitor",
      "execute": "blockdev-add",
      "arguments": {
        "driver": "qcow2",
        "node-name": "s",
        "file": {
          "driver": "file",
          "node-name": "f-s",
          "filename": "s.img"
        },
        "backing": null
      }
    },
    {
      "actor": "monitor",
      "execute": "blockdev-add",
      "arguments": {
        "driver": "qcow2",
        "node-name": "o",
        "file": {
          "driver": "file",
          "node-name": "f-o",
          "filename": "o.img"
        },
        "backing": null
      }
    },
    {
      "actor": "monitor",
      "execute": "blockdev-add",
      "arguments": {
        "driver": "qcow2",
        "node-name": "t",
        "file": {
          "driver": "file",
          "node-name": "f-t",
          "filename": "t.img"
        },
        "backing": null
      }
    },
    {
      "actor": "monitor",
      "execute": "block-dirty-bitmap-add",
      "arguments": {
        "node": "s",
        "name": "b",
        "persistent": true
      }
    },
    {
      "actor": "monitor",
      "execute": "block-export-add",
      "arguments": {
        "type": "nbd",
        "id": "e",
        "node-name": "s",
        "writable": true
      }
    },
    {
      "actor": "monitor",
      "execute": "blockdev-backup",
      "arguments": {
        "job-id": "j",
        "device": "s",
        "target": "t",
        "sync": "bitmap",
        "bitmap": "b",
        "bitmap-mode": "on-success",
        "auto-finalize": false
      }
    },
    {
      "actor": "guest",
      "export": "e",
      "do": {
        "write": {
          "offset": 65536,
          "length": 65536
        }
      }
    },
    {
      "actor": "monitor",
      "execute": "blockdev-snapshot",
      "arguments": {
        "node": "s",
        "overlay": "o"
      }
    },
    {
      "actor": "monitor",
      "execute": "job-finalize",
      "arguments": {
        "id": "j"
      }
    },
    {
      "actor": "monitor",
      "execute": "block-dirty-bitmap-clear",
      "arguments": {
        "node": "s",
        "name": "b"
      }
    }
  ]
}
""")


def image(spec):
    subprocess.check_call(['qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'cluster_size=%d' % spec['cluster-size'],
                           spec['file'], str(spec['size'])])
    for fill in spec.get('fill', []):
        subprocess.check_call(['qemu-io', '-f', 'qcow2', '-c', 'write -q -P 0x5a %d %d' % (fill['offset'], fill['length']),
                               spec['file']], stdout=subprocess.DEVNULL)


class Monitor:
    def __init__(self, process, limit):
        self.process, self.limit, self.buffer = process, limit, b''
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
            if 'event' not in answer:
                print(execute, json.dumps(arguments), '->', json.dumps(answer))
                return answer

    def settle(self):
        """Until no job runs by itself any more."""
        for _ in range(50):
            jobs = self.command('query-jobs', {})['return']
            if not [job for job in jobs if job['status'] in ('created', 'running', 'waiting', 'aborting')]:
                return
            select.select([], [], [], 0.05)


def bitmap_of_s(monitor):
    nodes = monitor.command('query-named-block-nodes', {'flat': True})['return']
    [bitmap] = [b for node in nodes if node['node-name'] == 's' for b in node['dirty-bitmaps'] if b.get('name') == 'b']
    return bitmap


def start(limit):
    process = subprocess.Popen(['qemu-storage-daemon', '--chardev', 'stdio,id=monitor', '--monitor', 'monitor'],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process, Monitor(process, limit)


def end(process):
    process.stdin.close()
    process.stdout.close()
    process.wait()


def guest_writes(step):
    write = step['do']['write']
    subprocess.check_call(['qemu-io', '-f', 'raw', '-c', 'write -q -P 0x5a %d %d' % (write['offset'], write['length']),
                           'nbd+unix:///%s?socket=nbd.sock' % step['export']])


def run(limit):
    process, monitor = start(limit)
    monitor.command('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': 'nbd.sock'}}})
    for step in SCENARIO['steps'][:-1]:
        if 'do' in step:
            guest_writes(step)
        else:
            named = {'name': step['arguments']['id']} if step['execute'] == 'block-export-add' else {}
            monitor.command(step['execute'], dict(step['arguments'], **named))
        monitor.settle()
    recorded = bitmap_of_s(monitor)['count']
    monitor.command('quit', {})
    end(process)
    # Nobody has told the user: the next backup begins with this.
    process, monitor = start(limit)
    monitor.command('blockdev-add', SCENARIO['steps'][0]['arguments'])
    stored = bitmap_of_s(monitor)
    monitor.command('quit', {})
    end(process)
    if recorded > 0 and stored['count'] < recorded and not stored.get('inconsistent'):
        print('\nREPRODUCED: %d bytes were dirty when the daemon ended, %d are in the bitmap of the image' % (recorded, stored['count']))
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
