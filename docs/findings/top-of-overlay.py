#!/usr/bin/env python3
"""A backup of the upper layer beside a snapshot in one transaction copies nothing.

A stand-alone reproducer: python3 (standard library) and qemu-utils. The scenario is top-of-overlay.json, embedded below; blkcheck's own
block layer was not ready to say what is right there,
so that this script was written by hand.
Ends with code 1 and a line REPRODUCED when the defect is there, with 0 when everything is as it should be.
"""
import argparse, json, os, select, socket, struct, subprocess, sys, tempfile

SCENARIO = json.loads(r"""
{
  "version": 1,
  "title": "a backup of the upper layer and a snapshot in one transaction",
  "grain": 512,
  "images": [
    {
      "file": "s.img",
      "format": "qcow2",
      "size": 65536,
      "cluster-size": 65536,
      "fill": [
        {
          "offset": 0,
          "length": 65536,
          "stored": "data"
        }
      ]
    },
    {
      "file": "o.img",
      "format": "qcow2",
      "size": 65536,
      "cluster-size": 65536
    },
    {
      "file": "t.img",
      "format": "qcow2",
      "size": 65536,
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
      "execute": "transaction",
      "arguments": {
        "actions": [
          {
            "type": "blockdev-backup",
            "data": {
              "sync": "top",
              "job-id": "j",
              "device": "s",
              "target": "t",
              "filter-node-name": "f"
            }
          },
          {
            "type": "blockdev-snapshot",
            "data": {
              "node": "s",
              "overlay": "o"
            }
          }
        ]
      }
    },
    {
      "actor": "monitor",
      "execute": "block-export-add",
      "arguments": {
        "type": "nbd",
        "id": "x",
        "name": "x",
        "node-name": "t"
      }
    },
    {
      "actor": "guest",
      "export": "x",
      "do": {
        "read": {
          "offset": 0,
          "length": 65536
        }
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
        if step.get('execute') in ('blockdev-add', 'transaction'):
            monitor.command(step['execute'], step['arguments'])
    monitor.settle()
    monitor.command('blockdev-del', {'node-name': 't'})
    read = subprocess.run(['qemu-io', '-r', '-f', 'qcow2', '-c', 'read -q -P 0x5a 0 65536', 't.img'], capture_output=True, text=True)
    print(read.stdout)
    if 'Pattern verification failed' in read.stdout:
        print('\nREPRODUCED: the backup succeeded, and its target does not hold what the source held')
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
