//! The NBD protocol from both sides, as far as one daemon and one simulator need it: fixed newstyle negotiation; simple
//! replies from our server, structured ones to our client.

pub mod client;
pub mod server;
pub mod wire;
