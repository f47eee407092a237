//! The server with a client of its protocol that is moved by hand, and with our own.

use super::super::client::{Answer, Ask, Client};
use super::super::wire::flag;
use super::*;

/// A server, and a client of its own protocol: what the daemon does, by hand.
struct Peer {
    _directory: tempfile::TempDir,
    server: Server,
    stream: UnixStream,
    input: Vec<u8>,
}

impl Peer {
    fn new() -> Peer {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("s");
        let mut server = Server::listen(&path).expect("listens");
        server.add("disk", vec![7; 1024], 512);
        let mut peer = Peer {
            stream: Peer::connect(&path),
            _directory: directory,
            server,
            input: Vec::new(),
        };
        peer.pump();
        // Greeting, two pieces of information, the end of the negotiation.
        assert_eq!(peer.input.len(), 18 + (20 + 12) + (20 + 14) + 20);
        peer.input.clear();
        peer
    }

    fn connect(path: &Path) -> UnixStream {
        let mut stream = UnixStream::connect(path).expect("connects");
        stream.set_nonblocking(true).expect("a socket");
        let mut out = 3u32.to_be_bytes().to_vec();
        let mut go = Vec::new();
        wire::put_text(&mut go, "disk");
        go.extend_from_slice(&[0, 0]);
        wire::put_option(&mut out, option::GO, &go);
        stream.write_all(&out).expect("sent");
        stream
    }

    fn pump(&mut self) {
        self.server.pump().expect("sense");
        receive(&mut self.stream, &mut [0; 4096], &mut self.input);
    }

    fn ask(&mut self, command: Command, cookie: u64, offset: u64, length: u32, data: &[u8]) {
        let mut out = Vec::new();
        let request = Request {
            command,
            flags: flag::FUA,
            cookie,
            offset,
            length,
        };
        request.put(&mut out);
        out.extend_from_slice(data);
        self.stream.write_all(&out).expect("sent");
        self.pump();
    }

    /// The answer that is there: (error, cookie, data).
    fn answer(&mut self) -> (u32, u64, Vec<u8>) {
        self.pump();
        let mut input = Reader(&self.input);
        assert_eq!(input.u32(), wire::SIMPLE);
        let answer = (input.u32(), input.u64(), input.0.to_vec());
        self.input.clear();
        answer
    }
}

#[test]
fn a_request_is_held_until_it_is_released_in_any_order() {
    let mut peer = Peer::new();
    peer.ask(Command::Write, 1, 0, 4, &[1; 4]);
    peer.ask(Command::Read, 2, 0, 6, &[]);
    peer.ask(Command::Flush, 3, 0, 0, &[]);
    assert_eq!(peer.server.held().len(), 3);
    assert!(peer.input.is_empty(), "nobody is answered");
    peer.server.release(1);
    assert_eq!(peer.answer(), (0, 2, vec![7; 6]), "the write has no effect yet");
    peer.server.release(0);
    assert_eq!(peer.answer(), (0, 1, Vec::new()));
    assert_eq!(peer.server.disks()[0].file()[..6], [1, 1, 1, 1, 7, 7]);
    peer.server.release(0);
    assert_eq!(peer.answer(), (0, 3, Vec::new()));
}

#[test]
fn a_failed_write_has_no_effect_and_the_file_ends_where_it_was_written() {
    let mut peer = Peer::new();
    peer.ask(Command::Write, 1, 0, 2, &[1; 2]);
    peer.server.fail(0, 5, 0);
    assert_eq!(peer.answer(), (5, 1, Vec::new()));
    assert_eq!(peer.server.disks()[0].file(), [7; 1024]);
    peer.ask(Command::Write, 1, 0, 4, &[1; 4]);
    peer.server.fail(0, 28, 1);
    assert_eq!(peer.answer(), (28, 1, Vec::new()), "a part of it is carried out");
    assert_eq!(peer.server.disks()[0].file()[..2], [1, 7]);
    peer.ask(Command::Trim, 1, 0, 1024, &[]);
    peer.server.fail(0, 5, 1);
    assert_eq!(peer.answer().0, 5);
    assert_eq!(peer.server.disks()[0].file()[..2], [0, 7]);
    peer.ask(Command::Write, 2, 1024, 3, &[2; 3]);
    peer.server.release(0);
    peer.answer();
    assert_eq!(peer.server.disks()[0].file().len(), 1027);
    peer.ask(Command::WriteZeroes, 3, 1536, 1, &[]);
    peer.server.release(0);
    assert_eq!(peer.answer().0, ENOSPC);
    peer.ask(Command::Trim, 4, 0, 1024, &[]);
    peer.server.release(0);
    assert_eq!(peer.server.disks()[0].file()[1023..1025], [0, 2]);
}

#[test]
fn two_writers_contest_a_disk_and_who_hangs_up_waits_no_more() {
    let mut peer = Peer::new();
    peer.ask(Command::Trim, 1, 0, 1, &[]);
    assert!(!peer.server.disks()[0].contested());
    let path = peer.server.listener.local_addr().expect("bound");
    let mut other = Peer::connect(path.as_pathname().expect("a path"));
    peer.pump();
    let mut out = Vec::new();
    let request = Request {
        command: Command::WriteZeroes,
        flags: 0,
        cookie: 1,
        offset: 0,
        length: 1,
    };
    request.put(&mut out);
    other.write_all(&out).expect("sent");
    peer.pump();
    assert!(peer.server.disks()[0].contested());
    assert_eq!(peer.server.held().len(), 2);
    assert_ne!(peer.server.held()[0].identity, peer.server.held()[1].identity);
    // A process that another test is just starting may still hold a copy, so that dropping is not enough.
    other.shutdown(std::net::Shutdown::Both).expect("connected");
    peer.pump();
    assert_eq!((peer.server.held().len(), peer.server.connections()), (1, 1));
}

#[test]
fn our_client_and_our_server_understand_each_other_as_far_as_they_can() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("s");
    let mut server = Server::listen(&path).expect("listens");
    server.add("disk", vec![7; 1024], 0);
    let mut client = Client::new(&path);
    client
        .submit("disk", 1, Ask::Write(0, vec![9; 8], false))
        .expect("connects");
    client.submit("none", 2, Ask::Flush).expect("connects");
    client.submit("disk", 3, Ask::Read(0, 0)).expect("connects");
    for _ in 0..8 {
        server.pump().expect("sense");
        client.pump().expect("sense");
    }
    assert_eq!(client.size("disk"), Some(1024));
    let answers: Vec<_> = client.answers().collect();
    assert_eq!(
        answers,
        [(3, Answer::Read(Ok(Vec::new()))), (2, Answer::NoExport)]
    );
    server.release(0);
    client.pump().expect("sense");
    assert_eq!(client.answers().next(), Some((1, Answer::Done(Ok(())))));
    client.submit("disk", 4, Ask::Flush).expect("connected");
    client.hang_up("disk");
    assert_eq!(client.answers().next(), Some((4, Answer::Done(Err(108)))));
}
