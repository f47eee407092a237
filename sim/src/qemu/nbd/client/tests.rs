//! What a session makes of replies that a sound server does not send.

use super::*;

/// A session with both contexts, and one status request in flight.
fn session(forgives: bool) -> Session {
    let (stream, _) = UnixStream::pair().expect("a pair");
    let open = Open {
        token: 1,
        cookie: 7,
        command: Command::Status,
        offset: 0,
        end: 512,
        at: 0,
        data: Vec::new(),
        error: 0,
        extents: Vec::new(),
        parts: [Vec::new(), Vec::new()],
        answered: 0,
    };
    Session {
        export: "x".to_owned(),
        stream,
        input: Vec::new(),
        output: Vec::new(),
        phase: Phase::Open,
        waiting: VecDeque::new(),
        size: 512,
        contexts: [Some(1), Some(2)],
        open: vec![open],
        failed: Vec::new(),
        forgives,
        gone: false,
    }
}

fn reply(flags: u16, kind: u16, data: &[u8]) -> Vec<u8> {
    let mut out = wire::STRUCTURED.to_be_bytes().to_vec();
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&7u64.to_be_bytes());
    out.extend_from_slice(&u32::try_from(data.len()).expect("few").to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// Which of these replies is nonsense.
fn nonsense(forgives: bool, replies: &[&[u8]]) -> Option<usize> {
    let (mut session, mut answers) = (session(forgives), Vec::new());
    let wrong = replies
        .iter()
        .position(|r| session.reply(r, &mut answers).is_err());
    assert!(answers.len() <= 1, "it is told once");
    wrong
}

#[test]
fn a_failed_status_request_is_answered_once_per_context_at_most() {
    let failed = reply(chunk::DONE, chunk::ERROR | 1, &[0, 0, 0, 5, 0, 0]);
    let status = reply(0, chunk::STATUS, &[0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0]);
    let other = reply(chunk::DONE, chunk::STATUS, &[0, 0, 0, 2, 0, 0, 2, 0, 0, 0, 0, 1]);
    let none = reply(chunk::DONE, chunk::NONE, &[]);
    assert_eq!(nonsense(false, &[&failed, &failed]), Some(1));
    assert_eq!(nonsense(true, &[&failed, &failed]), None);
    assert_eq!(nonsense(true, &[&failed, &other]), None, "the other one is well");
    assert_eq!(nonsense(true, &[&failed, &failed, &failed]), Some(2));
    assert_eq!(nonsense(true, &[&status, &failed, &failed]), Some(2));
    assert_eq!(nonsense(true, &[&failed, &none]), Some(1));
}
