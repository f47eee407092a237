#!/usr/bin/env python3
"""An aborted transaction with a backup marks everything in the backup's bitmap.

A stand-alone reproducer: python3 (standard library) and qemu-utils. The scenario is aborted-backup-fills-bitmap.json, embedded below; it asks for
what no guest sees,
so that this script was written by hand.
Ends with code 1 and a line REPRODUCED when the defect is there, with 0 when everything is as it should be.
"""
import argparse, json, os, select, socket, struct, subprocess, sys, tempfile

SCENARIO = json.loads(r"""
{
  "version": 1,
  "title": "an aborted transaction with a backup that brings a bitmap up to date",
  "grain": 512,
  "images": [
    {
      "file": "s.img",
      "format": "qcow2",
      "size": 131072,
      "cluster-size": 65536
    },
    {
      "file": "t.img",
      "format": "qcow2",
      "size": 131072,
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
        "name": "b"
      }
    },
    {
      "actor": "monitor",
      "execute": "transaction",
      "arguments": {
        "actions": [
          {
            "type": "blockdev-backup",
            "data": {
              "job-id": "j",
              "device": "s",
              "target": "t",
              "sync": "bitmap",
              "bitmap": "b",
              "bitmap-mode": "always",
              "filter-node-name": "f"
            }
          },
          {
            "type": "abort",
            "data": {}
          }
        ]
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


def run(monitor, limit):
    for step in SCENARIO['steps']:
        monitor.command(step['execute'], step['arguments'])
    nodes = monitor.command('query-named-block-nodes', {'flat': True})['return']
    [count] = [bitmap['count'] for node in nodes if node['node-name'] == 's' for bitmap in node['dirty-bitmaps']]
    if count:
        print('\nREPRODUCED: after a transaction that was aborted, %d bytes are dirty; before, there were none' % count)
        sys.exit(1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--limit', type=float, default=10, help='seconds to wait for an answer')
    limit = parser.parse_args().limit
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        for spec in SCENARIO['images']:
            image(spec)
        process = subprocess.Popen(['qemu-storage-daemon', '--chardev', 'stdio,id=monitor', '--monitor', 'monitor'],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            run(Monitor(process, limit), limit)
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
            os.chdir('/')
    print('\nnot reproduced: everything is as it should be')


main()
