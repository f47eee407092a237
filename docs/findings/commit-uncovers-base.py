#!/usr/bin/env python3
"""A commit of a layer that is shorter than its base changes what the guest reads.

A stand-alone reproducer: python3 (standard library) and qemu-utils. The scenario is commit-uncovers-base.json, embedded below; a
command that blkcheck's own block layer does not have is in it, so that this script was written by hand.
Ends with code 1 and a line REPRODUCED when the defect is there, with 0 when everything is as it should be.
"""
import argparse, json, os, socket, struct, subprocess, sys, tempfile, time

SCENARIO = json.loads(r"""
{
  "version": 1,
  "title": "a commit of a layer that is shorter than its base",
  "grain": 512,
  "images": [
    {
      "file": "i0.img",
      "format": "qcow2",
      "size": 1024,
      "cluster-size": 512,
      "fill": [
        {
          "offset": 512,
          "length": 512,
          "stored": "data"
        }
      ]
    },
    {
      "file": "i1.img",
      "format": "qcow2",
      "size": 512,
      "cluster-size": 512,
      "backing-file": "i0.img",
      "backing-format": "qcow2"
    },
    {
      "file": "i2.img",
      "format": "qcow2",
      "size": 1024,
      "cluster-size": 512,
      "backing-file": "i1.img",
      "backing-format": "qcow2"
    }
  ],
  "steps": [
    {
      "actor": "monitor",
      "execute": "blockdev-add",
      "arguments": {
        "driver": "qcow2",
        "node-name": "n0",
        "file": {
          "driver": "file",
          "node-name": "f-n0",
          "filename": "i0.img"
        },
        "backing": null
      }
    },
    {
      "actor": "monitor",
      "execute": "blockdev-add",
      "arguments": {
        "driver": "qcow2",
        "node-name": "n1",
        "file": {
          "driver": "file",
          "node-name": "f-n1",
          "filename": "i1.img"
        },
        "backing": "n0"
      }
    },
    {
      "actor": "monitor",
      "execute": "blockdev-add",
      "arguments": {
        "driver": "qcow2",
        "node-name": "n2",
        "file": {
          "driver": "file",
          "node-name": "f-n2",
          "filename": "i2.img"
        },
        "backing": "n1"
      }
    },
    {
      "actor": "monitor",
      "execute": "block-export-add",
      "arguments": {
        "type": "nbd",
        "id": "x",
        "node-name": "n2",
        "name": "x"
      }
    },
    {
      "actor": "monitor",
      "execute": "block-commit",
      "arguments": {
        "job-id": "j",
        "device": "n2",
        "top-node": "n1",
        "base-node": "n0"
      }
    },
    {
      "actor": "guest",
      "export": "x",
      "do": {
        "read": {
          "offset": 0,
          "length": 1024
        }
      }
    }
  ],
  "beyond-model": true
}
""")
# From here on the guest has to read zeroes.
ZEROES_FROM = 512


def image(spec):
    options = []
    if 'backing-file' in spec:
        options = ['-b', spec['backing-file'], '-F', spec['backing-format']]
    subprocess.check_call(['qemu-img', 'create', '-q', '-f', 'qcow2', '-u', '-o', 'cluster_size=%d' % spec['cluster-size'],
                           *options, spec['file'], str(spec['size'])])
    for fill in spec.get('fill', []):
        open_alone = json.dumps({'driver': 'qcow2', 'backing': None, 'file': {'driver': 'file', 'filename': spec['file']}})
        subprocess.check_call(['qemu-io', '-c', 'write -q -P 0x5a %d %d' % (fill['offset'], fill['length']),
                               'json:' + open_alone], stdout=subprocess.DEVNULL)


class Monitor:
    def __init__(self, sock):
        self.file = sock.makefile('rw')
        self.file.readline()
        self.command('qmp_capabilities', {})

    def line(self):
        text = self.file.readline()
        if not text:
            sys.exit('\nREPRODUCED: the daemon died')
        return json.loads(text)

    def command(self, execute, arguments):
        self.file.write(json.dumps({'execute': execute, 'arguments': arguments}) + '\n')
        self.file.flush()
        while True:
            answer = self.line()
            if 'event' not in answer:
                print(execute, json.dumps(arguments), '->', json.dumps(answer))
                return answer

    def wait_for_job(self, job):
        # Not for its event: that may have come before the last answer.
        while any(j['id'] == job for j in self.command('query-jobs', {})['return']):
            time.sleep(0.05)


def exactly(sock, n):
    data = b''
    while len(data) < n:
        more = sock.recv(n - len(data))
        if not more:
            raise OSError('the export hangs up')
        data += more
    return data


def read(path, export, offset, length):
    """Over NBD, with simple replies. (errno, data)"""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    exactly(sock, 18)
    name = export.encode()
    data = struct.pack('>I', len(name)) + name + struct.pack('>H', 0)
    sock.sendall(struct.pack('>I', 3) + b'IHAVEOPT' + struct.pack('>II', 7, len(data)) + data)
    while True:
        _, _, kind, size = struct.unpack('>QIII', exactly(sock, 20))
        exactly(sock, size)
        if kind == 1:
            break
    sock.sendall(struct.pack('>IHHQQI', 0x25609513, 0, 0, 1, offset, length))
    _, error, _ = struct.unpack('>IIQ', exactly(sock, 16))
    return error, b'' if error else exactly(sock, length)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--limit', type=float, default=10, help='seconds to wait for an answer')
    parser.add_argument('--qemu', default='qemu-storage-daemon', help='the daemon')
    limit = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        for spec in SCENARIO['images']:
            image(spec)
        ours, theirs = socket.socketpair()
        ours.settimeout(limit.limit)
        daemon = subprocess.Popen([limit.qemu, '--chardev', 'socket,id=m,fd=0', '--monitor', 'm',
                                   '--nbd-server', 'addr.type=unix,addr.path=nbd'], stdin=theirs)
        theirs.close()
        try:
            monitor = Monitor(ours)
            for step in SCENARIO['steps']:
                if 'execute' in step:
                    arguments = step.get('arguments', {})
                    answer = monitor.command(step['execute'], arguments)
                    if 'error' in answer:
                        sys.exit('cannot tell: %s is refused' % step['execute'])
                    if 'job-id' in arguments:
                        monitor.wait_for_job(arguments['job-id'])
                    continue
                asked = step['do']['read']
                error, data = read('nbd', step['export'], asked['offset'], asked['length'])
                if error:
                    print('\nREPRODUCED: the read fails with errno %d; zeroes are right' % error)
                    return 1
                tail = data[ZEROES_FROM - asked['offset']:]
                if any(tail):
                    at = ZEROES_FROM + next(i for i, byte in enumerate(tail) if byte)
                    print('\nREPRODUCED: at 0x%x the guest reads 0x%02x; zeroes are right' % (at, data[at - asked['offset']]))
                    return 1
            print('\nnot reproduced: everything is as it should be')
            return 0
        finally:
            daemon.kill()
            daemon.wait()


sys.exit(main())
