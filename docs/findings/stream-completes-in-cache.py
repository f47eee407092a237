#!/usr/bin/env python3
"""A stream reports success while what it has copied can still be lost with the daemon.

A stand-alone reproducer: python3 (standard library) and qemu-utils. The scenario is stream-completes-in-cache.json, embedded below; no script can
cut the power, and killing the daemon is enough, so that this one was written by hand.
Ends with code 1 and a line REPRODUCED when the defect is there, with 0 when everything is as it should be.
"""
import argparse, json, os, select, subprocess, sys, tempfile

SCENARIO = json.loads(r"""
{
  "version": 1,
  "title": "the power fails just after a stream has reported success",
  "grain": 4096,
  "disk": {
    "power-cut": 11
  },
  "images": [
    {
      "file": "b.img",
      "format": "qcow2",
      "size": 131072,
      "cluster-size": 65536,
      "fill": [
        {
          "offset": 0,
          "length": 131072,
          "stored": "data"
        }
      ]
    },
    {
      "file": "t.img",
      "format": "qcow2",
      "size": 131072,
      "cluster-size": 65536,
      "backing-file": "b.img",
      "backing-format": "qcow2"
    }
  ],
  "steps": [
    {
      "actor": "setup",
      "execute": "blockdev-add",
      "arguments": {
        "driver": "qcow2",
        "node-name": "b",
        "file": {
          "driver": "file",
          "node-name": "f-b",
          "filename": "b.img"
        },
        "backing": null
      }
    },
    {
      "actor": "setup",
      "execute": "blockdev-add",
      "arguments": {
        "driver": "qcow2",
        "node-name": "t",
        "file": {
          "driver": "file",
          "node-name": "f-t",
          "filename": "t.img"
        },
        "backing": "b"
      }
    },
    {
      "actor": "setup",
      "execute": "block-export-add",
      "arguments": {
        "type": "nbd",
        "id": "x-t",
        "node-name": "t"
      }
    },
    {
      "actor": "monitor",
      "execute": "block-stream",
      "arguments": {
        "job-id": "j",
        "device": "t"
      }
    },
    {
      "actor": "monitor",
      "wait-job": {
        "id": "j",
        "status": "null"
      }
    },
    {
      "actor": "monitor",
      "export": "x-t",
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


def image(spec):
    options = 'cluster_size=%d' % spec['cluster-size']
    if 'backing-file' in spec:
        options += ',backing_file=%s,backing_fmt=%s' % (spec['backing-file'], spec['backing-format'])
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

    def wait_for(self, event):
        while not [e for e in self.events if e['event'] == event]:
            answer = self.line()
            self.events.append(answer)
            print(json.dumps(answer))
        return [e for e in self.events if e['event'] == event][0]


def commands():
    """Those of the scenario, without the export that the gate needs to see the power fail."""
    return [step for step in SCENARIO['steps'] if step.get('execute', 'block-export-add') != 'block-export-add']


def run(limit):
    process = subprocess.Popen(['qemu-storage-daemon', '--chardev', 'stdio,id=monitor', '--monitor', 'monitor'],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        monitor = Monitor(process, limit)
        for step in commands():
            monitor.command(step['execute'], step['arguments'])
        ended = monitor.wait_for('BLOCK_JOB_COMPLETED')
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    if 'error' in ended['data']:
        return
    length = SCENARIO['images'][1]['size']
    read = subprocess.run(['qemu-io', '-f', 'qcow2', '-c', 'read -P 0x5a 0 %d' % length, 't.img'], capture_output=True, text=True)
    print(read.stdout)
    if 'Pattern verification failed' in read.stdout:
        print('\nREPRODUCED: the stream had reported success; after the daemon was killed, t.img does not hold what b.img held')
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
